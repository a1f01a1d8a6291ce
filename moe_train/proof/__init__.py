"""The independent second reader: what an export should hold, what it holds, and how they compare."""
