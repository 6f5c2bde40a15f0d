"""Who goes next, and at what cost. Pure: no torch, no Ray, no clock; times come in as numbers (Unix seconds)."""
