"""Batches: the order of records, their packing into rows, and the loader."""
