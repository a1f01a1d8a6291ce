"""A run's own state on disk, and the opening of a model from a directory."""
