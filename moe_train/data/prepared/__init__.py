"""Prepared data: tokenized once, then memory-mapped, on local disk or in a bucket."""
