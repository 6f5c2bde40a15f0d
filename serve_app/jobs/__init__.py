"""Jobs: what a user asks for, and its life from `queued` to its end."""
