"""wan-serve: an open service for video generation on one's own GPUs (the map of the rooms is in README.md)."""

__version__ = "0.1.0"
