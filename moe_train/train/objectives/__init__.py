"""Objectives: what a model learns from a batch, one file per objective."""
