"""Conversion of conversations to tokens and a loss mask."""
