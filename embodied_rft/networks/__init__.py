"""Blocks of networks: encoders, heads, critics, perceptrons with their fused kernels, which weights learn."""
