"""Content policy: what the service refuses to make."""
