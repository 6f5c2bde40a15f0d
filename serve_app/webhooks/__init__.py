"""Telling a receiver that a job has ended, by the Standard Webhooks specification. Knows neither Ray nor FastAPI."""
