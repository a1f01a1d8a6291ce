"""External weights: models and adapters in the files of other tools, read and written."""
