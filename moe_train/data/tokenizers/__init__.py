"""Tokenizers of Hugging Face and of Mistral."""
