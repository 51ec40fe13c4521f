"""Fetching and converting datasets and pretrained weights."""
