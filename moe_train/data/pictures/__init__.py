"""Pictures of records: read and checked, resized and normalized as in mistral-common, and cut into patches."""
