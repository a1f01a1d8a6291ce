"""Chunks of tokens."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moe_train.train import logits


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_chunks_join_to_what_was_split(tokens: int) -> None:
    x = jnp.arange(1, tokens * 3 + 1).reshape(tokens, 3)
    chunks = logits.split_chunks(x, min(tokens, 128))
    assert chunks.shape == (-(-tokens // 128), min(tokens, 128), 3) and chunks.sum() == x.sum()
    np.testing.assert_array_equal(logits.join_chunks(chunks, tokens), x)


def test_a_chunk_has_as_many_logits_as_stated_but_128_tokens_at_least() -> None:
    assert logits.chunk_rows(2048, 32_000) == 512
    assert logits.chunk_rows(4096, 8192) == 1024
    assert logits.chunk_rows(100_000, logits.CHUNK_ELEMENTS) == 128
    # 10 chunks of 262 would have 157 rows of padding.
    assert logits.chunk_rows(2463, 64_000) == 247
    assert logits.chunk_rows(7, 32_000) == 7
