"""Ray Serve deployments, one a file, each a thin shell over serve_app."""
