"""Multimodal models around a text model: their classes, their towers, and how these are carried into exports."""
