"""Of pages and screens."""
