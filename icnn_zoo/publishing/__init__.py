"""Publishing a trained network to a registry."""
