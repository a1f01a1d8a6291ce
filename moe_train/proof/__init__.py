"""The independent second reader: what an export should contain, what it contains, and how they compare."""
