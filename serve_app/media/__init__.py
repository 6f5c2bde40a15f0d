"""Frames -> files: encode, probe, pictures, and the signed mark that they were made by AI. Knows neither Ray nor HTTP."""
