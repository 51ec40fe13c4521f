"""Converting networks: what would change, the change itself, and guards for what comes later."""
