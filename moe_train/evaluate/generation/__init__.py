"""Generation on the device: compiled blocks of tokens, sampling, continuous batching, stop texts and streams."""
