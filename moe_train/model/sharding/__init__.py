"""Sharding: the layout of weights and activations, and how they are gathered and reduced."""
