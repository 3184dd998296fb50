"""Ways to move KV blocks between workers, and what they have in common."""
