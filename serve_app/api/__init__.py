"""HTTP: routers, request and response schemas, errors, authentication."""
