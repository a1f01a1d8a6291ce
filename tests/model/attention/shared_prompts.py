"""Rows in which several answers continue one prompt, and the same texts with a prompt for each answer."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train.machine.mesh import BATCH
from moe_train.model.attention import kernels
from moe_train.model.attention.places import TokenPlaces
from tests.tiny import ONE


class SharedRows(NamedTuple):
    """Rows (B, T) with shared prompts, and where each token of the rows without them, (B, S), stands in these; -1 for padding."""

    segments: np.ndarray
    prompts: np.ndarray
    positions: np.ndarray
    source: np.ndarray
    plain_segments: np.ndarray
    plain_positions: np.ndarray


def random_rows(rows: int, T: int, longest: int, seed: int = 0) -> SharedRows:
    """Prompts of 0 to `longest` tokens with 1 to 3 answers of 1 to `longest` tokens, and padding at the end of each row."""
    rng = np.random.default_rng(seed)
    segments, positions = np.zeros((2, rows, T), np.int32)
    prompts = np.zeros((rows, T), np.int32)
    texts: list[list[np.ndarray]] = []
    for row in range(rows):
        texts.append([])
        start = 0
        segment = 1
        while True:
            prompt = int(rng.integers(0, longest + 1))
            answers = rng.integers(1, longest + 1, int(rng.integers(1, 4)))
            if start + prompt + answers.sum() > T - 3:
                break
            prompt_id = segment if prompt else None
            places = np.arange(start, start + prompt)
            for size in ([prompt] if prompt else []) + answers.tolist():
                is_prompt = segment == prompt_id
                own = np.arange(start, start + size)
                segments[row, own] = segment
                prompts[row, own] = prompt_id or segment
                positions[row, own] = np.arange(size) + (0 if is_prompt else prompt)
                if not is_prompt:
                    texts[row].append(np.concatenate([places, own]))
                start += size
                segment += 1
    S = max(sum(map(len, of_row)) for of_row in texts)
    source = np.full((rows, S), -1)
    plain_segments, plain_positions = np.zeros((2, rows, S), np.int32)
    for row, of_row in enumerate(texts):
        start = 0
        for number, places in enumerate(of_row, start=1):
            own = slice(start, start + len(places))
            source[row, own] = places
            plain_segments[row, own] = number
            plain_positions[row, own] = np.arange(len(places))
            start += len(places)
    return SharedRows(segments, prompts, positions, source, plain_segments, plain_positions)


def check_shared(kernel: str, window: int | None, rows: SharedRows, heads: tuple[int, int, int], mesh: Mesh = ONE) -> None:
    """Outputs and gradients of a kernel with shared prompts are those of the reference on rows without them."""
    B, T = rows.segments.shape
    N, K, H = heads
    rng = np.random.default_rng(1)
    q, k, v, dy = (rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K, N))
    dy[rows.segments == 0] = 0
    source = np.maximum(rows.source, 0)[:, :, None, None]
    # Each output counts once, however many copies of its token there are.
    counts = np.stack([np.bincount(of_row[of_row >= 0], minlength=T) for of_row in rows.source])
    plain_dy = np.take_along_axis(dy / np.maximum(counts, 1)[:, :, None, None], source, 1) * (rows.source >= 0)[:, :, None, None]

    def plain(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (jax.numpy.take_along_axis(x, source, 1) for x in (q, k, v))
        positions, segments = jax.numpy.asarray(rows.plain_positions), jax.numpy.asarray(rows.plain_segments)
        return kernels.reference_attention(q, k, v, kernels.attention_mask(positions, positions, segments, segments, window))

    def shared(positions: Any, segments: Any, prompts: Any, q: Any, k: Any, v: Any) -> Any:
        return kernels.attend(q, k, v, TokenPlaces(positions, segments, prompts), window, kernel)

    y, vjp = jax.vjp(plain, q, k, v)
    expected = [np.asarray(x) for x in (y, *vjp(plain_dy))]
    with jax.set_mesh(mesh):
        tokens, per_head = P(BATCH, "context"), P(BATCH, "context", "tensor", None)
        places = [jax.device_put(x, NamedSharding(mesh, tokens)) for x in (rows.positions, rows.segments, rows.prompts)]
        arrays = [jax.device_put(x, NamedSharding(mesh, per_head)) for x in (q, k, v, dy)]

        @jax.jit
        def run(places: Any, q: Any, k: Any, v: Any, dy: Any) -> Any:
            y, vjp = jax.vjp(partial(shared, *places), q, k, v)
            return y, *vjp(dy)

        actual = [np.asarray(x) for x in jax.device_get(run(places, *arrays))]
    is_text = rows.source >= 0
    outputs = np.take_along_axis(actual[0], source, 1)
    assert np.max(np.abs(outputs - expected[0])[is_text]) <= 1e-5 * np.max(np.abs(expected[0]))
    for name, a, b in zip(("dq", "dk", "dv"), actual[1:], expected[1:], strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)), name
