"""What a run looks like: one HTML page without outside resources."""
