"""Tokenized once, memory-mapped afterwards, here or in a bucket."""
