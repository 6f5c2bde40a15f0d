"""The engine: clip -> frames. Pure torch and diffusers; knows neither Ray nor HTTP nor the store."""
