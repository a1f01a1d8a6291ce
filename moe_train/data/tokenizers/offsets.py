"""Find the tokens that touch a span of characters, from the offsets that the tokenizers library computes."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

from moe_train.data.tokenizers.tokenizer import Span


def touching(encoding: tokenizers.Encoding, span: Span) -> Span:
    """Return the tokens (first, last + 1) with characters in the span; a token without characters counts as one character long."""
    start, stop = span
    first = _first_token(encoding, range(start, stop))
    if first is None:
        return 0, 0
    last = _first_token(encoding, range(stop - 1, -1, -1))
    assert last is not None, "the first token is in reach of this search"
    # A character may be spread over several byte-level tokens, of which `char_to_token` returns one.
    while first and (chars := encoding.token_to_chars(first - 1)) and chars[0] >= start:
        first -= 1
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) and chars[0] < stop:
        last += 1
    return first, last + 1


def _first_token(encoding: tokenizers.Encoding, positions: Iterable[int]) -> int | None:
    """Return the token of the first of these characters that belongs to one; None if none of them does."""
    for position in positions:
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
