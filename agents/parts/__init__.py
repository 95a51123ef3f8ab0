"""What several policies share: actors, chains of denoising steps, heads, statistics."""
