"""From a conversation to tokens and a loss mask."""
