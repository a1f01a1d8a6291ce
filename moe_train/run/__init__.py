"""A training run: from a config to its last checkpoint."""
