"""Readers of records: each supported file format, and where a record is in its file."""
