"""Benchmarks that need an accelerator; each takes --tiny, which runs the same code on the CPU in seconds."""
