"""A run's own state on disk, and loading a model from a directory."""
