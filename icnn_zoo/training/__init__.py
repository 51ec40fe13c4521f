"""Training and evaluating by Lightning."""
