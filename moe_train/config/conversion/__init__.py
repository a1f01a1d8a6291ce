"""Configs of other trainers, read into sections of our config: one file for each trainer, and one for what they share."""
