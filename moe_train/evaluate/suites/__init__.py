"""Suites: questions with known answers, put to a model and graded item by item."""
