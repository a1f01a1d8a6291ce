"""Encoders of inputs that are not text: pictures become rows that take the place of token embeddings."""
