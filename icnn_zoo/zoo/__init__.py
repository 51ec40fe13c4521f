"""Checkpoints by name: cards, registries, verified loading, and segmenting photographs."""
