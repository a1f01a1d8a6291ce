"""Sound of records: files and data URLs, samples, log-mel spectrograms, and the tokens that stand for them."""
