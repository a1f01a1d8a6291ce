"""Files to records: each format that is read, and where a record stands in its file."""
