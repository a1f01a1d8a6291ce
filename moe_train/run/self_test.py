"""Self-tests on the training devices before step 0.

Attention and the grouped matmul are compared with their plain references, and a transport that only some platforms support
with one that all platforms support.

A kernel can be correct on one chip and wrong on the next: wrong gradients for empty groups, for groups that do not fill a
tile, or for a single group that holds all rows. Errors are relative to each expert's or segment's own magnitude, so that
the error of a small part cannot hide behind a large part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.machine.compiler_options import brief_options
from moe_train.machine.mesh import BATCH, axis_size, make_mesh, platform
from moe_train.model.attention import kernels, splash
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.moe import grouped_matmul as gm
from moe_train.model.moe.expert_weights import ExpertMatrix, ExpertWeights
from moe_train.model.moe.experts import ExpertSettings, Routing, run_experts
from moe_train.model.moe.transport.choose import transport_of
from moe_train.model.moe.transport.transport import TransportName
from moe_train.model.sharding.specs import activation_spec
from moe_train.run.self_test_references import attention_and_gradients, grouped_matmul_and_gradients
from moe_train.run.self_test_results import passed_once

TEST_ROWS = 1024
TEST_DIM = 256
TEST_FFN_DIM = 128
ROWS_PER_EXPERT = {
    "even": (128, 128, 128, 128, 128, 128, 128, 128),
    "empty": (0, 256, 0, 0, 300, 0, 68, 0),
    "unaligned": (1, 127, 129, 3, 255, 65, 31, 200),
    "skewed": (0, 0, 1000, 0, 1, 0, 0, 23),
    "no rows": (0, 0, 0, 0, 0, 0, 0, 0),
}
"""Rows of each of 8 experts; the remaining rows, up to TEST_ROWS, belong to no expert."""


def chosen_kernels(run: config.Run) -> dict[str, str | int | dict[str, tuple[int, ...]]]:
    """Return what `auto` resolves to on the mesh in force, for the run log.

    Returns:
        Kernel names, with block or tile sizes if the kernel can choose among several.
    """
    dtype = jnp.dtype(run.compute.dtype)
    ffn = run.model.ffn
    T = run.train.seq_len
    choices: dict[str, str | int | dict[str, tuple[int, ...]]] = {
        "attention": kernels.choose_attention_kernel(run.compute.attention, T, dtype)
    }
    if choices["attention"] == "splash":
        choices["attention_block"] = splash.block_size(T)
    if isinstance(ffn, config.MoeFfn):
        choices["grouped_matmul"] = gm.choose_grouped_matmul_kernel(run.compute.grouped_matmul)
        if choices["grouped_matmul"] == "megablox":
            D = run.model.model_dim
            f = ffn.ffn_dim // axis_size("tensor")
            rows = run.train.batch_size * T * ffn.experts_per_token  # upper bound; fewer rows use smaller tiles
            choices["grouped_matmul_tiles"] = {"gate, up": gm.tiles(rows, D, f, dtype), "down": gm.tiles(rows, f, D, dtype)}
    return choices


def run_self_tests(run: config.Run, say: Callable[[str], None]) -> None:
    """Test the kernels that the run uses, on the mesh in force, and report their errors.

    Raises:
        RuntimeError: a kernel is wrong on this device; nothing has been trained with it yet.
    """

    def report(name: str, error: float, is_known: bool = False) -> None:
        earlier = " (tested at an earlier start, with the same versions on the same kind of device)" if is_known else ""
        say(f"self-test of {name}: largest relative error {error:.1e}{earlier}")

    compute = run.compute.model_dump(mode="json")
    T = run.train.seq_len
    kernel = kernels.choose_attention_kernel(run.compute.attention, T, jnp.dtype(run.compute.dtype))
    attention = run.model.attention.model_dump(mode="json")
    test = partial(check_attention, run.model, run.compute, T)
    report("attention", *passed_once("attention", [compute, kernel, attention], test))
    if not isinstance(run.model.ffn, config.MoeFfn):
        return
    report("grouped_matmul", *passed_once("grouped_matmul", [compute], partial(check_grouped_matmul, run.compute)))
    transport = transport_of(run, jax.sharding.get_mesh().shape)
    if transport == "ragged_all_to_all":
        # Never from the cache: all processes take part in it, and their caches may differ; and it tests the links of these chips.
        report(transport, check_against_all_gather(transport))


def check_grouped_matmul(compute: config.Compute) -> float:
    """Compare the grouped matmul with its reference in all cases.

    Returns:
        The largest relative error of the result and of both gradients.

    Raises:
        RuntimeError: the error is larger than rounding in the compute dtype explains.
    """
    dtype = jnp.dtype(compute.dtype)
    device = jax.local_devices()[0]
    with jax.set_mesh(make_mesh(config.Mesh(), [device])):
        kernel = gm.choose_grouped_matmul_kernel(compute.grouped_matmul)
        tolerance = _tolerance(dtype, device)
        rng = np.random.default_rng(0)
        shapes = ((TEST_ROWS, TEST_DIM), (len(ROWS_PER_EXPERT["even"]), TEST_DIM, TEST_FFN_DIM), (TEST_ROWS, TEST_FFN_DIM))
        x_RD, w_EDF, dy_RF = (rng.normal(size=shape).astype(dtype) for shape in shapes)

        @partial(jax.shard_map, in_specs=P(), out_specs=P())  # local view, as in the model
        def with_kernel(x: jax.Array, w: jax.Array, dy: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
            y, vjp = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, sizes, kernel), x, w)
            return y, *vjp(dy)

        compiled = jax.jit(with_kernel, compiler_options=brief_options(device.platform) or None)
        worst = 0.0
        for case, sizes in ROWS_PER_EXPERT.items():
            actual = jax.device_get(compiled(x_RD, w_EDF, dy_RF, np.array(sizes, np.int32)))
            expected = grouped_matmul_and_gradients(x_RD, w_EDF, dy_RF, sizes)
            for quantity, a, b in zip(("result", "gradient of x", "gradient of w"), actual, expected, strict=True):
                error = _worst_part(a, b, sizes if quantity != "gradient of w" else None)
                if not error <= tolerance:
                    raise RuntimeError(
                        f"self-test: {quantity} of grouped_matmul={kernel} is wrong on {device.device_kind} in case {case!r}: "
                        f"relative error {error:.2g}, limit {tolerance:g}; set compute.grouped_matmul to another kernel"
                    )
                worst = max(worst, error)
    return worst


class _PackedRows(NamedTuple):
    """Two rows of test sequences: one is a single segment, the other has several segments and padding at its end."""

    starts: tuple[list[int], list[int]]
    """First position of each segment of each row; the last segment of the second row is padding."""
    positions_BT: np.ndarray
    segments_BT: np.ndarray
    """Segment numbers from 1; 0 at padding."""

    def visible(self, window: int) -> np.ndarray:
        """Return the mask (2, T, T) of causal attention within segments, in which a query sees `window` keys at most."""
        index = np.arange(self.segments_BT.shape[1])
        distance = index[:, None] - index
        same_segment = self.segments_BT[:, :, None] == self.segments_BT[:, None, :]
        return same_segment & (distance >= 0) & (distance < window)


def _packed_rows(T: int) -> _PackedRows:
    """Return two rows of T tokens, whose segments end next to the boundaries of blocks."""
    # No start is a multiple of 128, and the second segment (17 tokens) is shorter than any block.
    starts = ([0], [0, T // 3 + 5, T // 3 + 22, T - 61])
    segments_BT = np.ones((2, T), np.int32)
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (2, 1))
    for number, (start, end) in enumerate(itertools.pairwise([*starts[1], T])):
        # Modulo, so that the last segment gets 0, which marks padding.
        segments_BT[1, start:end] = (number + 1) % len(starts[1])
        positions_BT[1, start:end] = np.arange(end - start)
    return _PackedRows(starts, positions_BT, segments_BT)


def check_attention(model: config.Model, compute: config.Compute, seq_len: int) -> float:
    """Compare the attention kernel with its reference on packed sequences, with the model's windows and head size.

    Args:
        model: the model, of which the windows, the head size and the ratio of query to key heads are used.
        compute: the kernel and the compute dtype.
        seq_len: selects the kernel that sequences of this length use on the mesh in force. The test's own sequences have 256
            tokens on a CPU and 1024 elsewhere.

    Returns:
        The largest relative error of the result and of its three gradients.

    Raises:
        RuntimeError: the error is larger than rounding in the compute dtype explains.
    """
    dtype = jnp.dtype(compute.dtype)
    sizes = _head_sizes(model.attention)
    kernel = kernels.choose_attention_kernel(compute.attention, seq_len, dtype)
    device = jax.local_devices()[0]
    tolerance = _tolerance(dtype, device)
    T = 256 if device.platform == "cpu" else 1024
    rows = _packed_rows(T)
    # Two key heads suffice, as long as each serves as many query heads as in the model.
    K = 2
    N = 2 * sizes.group
    rng = np.random.default_rng(0)
    shapes = ((N, sizes.query), (K, sizes.query), (K, sizes.value), (N, sizes.value))
    q, k, v, dy = (rng.normal(size=(2, T, *shape)).astype(dtype) for shape in shapes)
    # Kernels may return anything at padding; without a gradient it cannot reach the results that are compared.
    dy[rows.segments_BT == 0] = 0

    worst = 0.0
    # Windows are shortened, so that they mask something within the test's sequences.
    for window in sorted({min(w or T, T // 4) if w else 0 for w in model.attention.windows}):
        with jax.set_mesh(make_mesh(config.Mesh(), [device])):
            actual = jax.device_get(_attention_and_gradients((q, k, v, dy), rows, kernel, window or None))
        expected = attention_and_gradients(q, k, v, dy, rows.visible(window or T))
        quantities = ("result", "gradient of q", "gradient of k", "gradient of v")
        for quantity, actual_array, expected_array in zip(quantities, actual, expected, strict=True):
            for row, row_name in enumerate(("one segment", "packed segments")):
                is_token = rows.segments_BT[row] != 0
                a, b = (x[row][is_token].reshape(is_token.sum(), -1) for x in (actual_array, expected_array))
                error = _worst_part(a, b, np.diff([*rows.starts[row], T])[:-1])
                if not error <= tolerance:
                    raise RuntimeError(
                        f"self-test: {quantity} of attention={kernel} is wrong on {device.device_kind}, window {window or 'none'}, "
                        f"{row_name}: relative error {error:.2g}, limit {tolerance:g}; set compute.attention to another kernel"
                    )
                worst = max(worst, error)
    return worst


class _HeadSizes(NamedTuple):
    """Sizes of attention that a kernel depends on."""

    group: int
    """Query heads per key head."""
    query: int
    """Dims of a query and of a key."""
    value: int
    """Dims of a value."""


def _head_sizes(attention: config.Attention) -> _HeadSizes:
    match attention:
        case config.GroupedQueryAttention(head_dim=H):
            return _HeadSizes(attention.num_heads // attention.num_kv_heads, H, H)
        case config.MultiHeadLatentAttention():
            return _HeadSizes(1, attention.qk_head_dim, attention.v_head_dim)
        case _:
            assert_never(attention)


def _attention_and_gradients(
    arrays: Sequence[np.ndarray], rows: _PackedRows, kernel: str, window: int | None
) -> tuple[jax.Array, ...]:
    """Return the attention of q, k and v, and its gradients for dy, on the mesh in force.

    Args:
        arrays: q and k (B, T, heads, dims of a query), v and dy (B, T, heads, dims of a value).
        rows: positions and segments of the tokens.
        kernel: name of the kernel.
        window: attention window; None for full attention.
    """

    def place(x: jax.Array | np.ndarray) -> jax.Array:
        return jax.sharding.reshard(x, activation_spec("BTNH"[: x.ndim]))

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, positions: jax.Array, segments: jax.Array
    ) -> tuple[jax.Array, ...]:
        q, k, v, dy, positions, segments = (place(x) for x in (q, k, v, dy, positions, segments))
        y, vjp = jax.vjp(lambda q, k, v: kernels.attend(q, k, v, TokenPlaces(positions, segments), window, kernel), q, k, v)
        return y, *vjp(dy)

    # Programs of another shape than the step's in any case, so on a CPU they need not be compiled with its effort.
    compiled = jax.jit(attend, compiler_options=brief_options(platform()) or None)
    return compiled(*arrays, rows.positions_BT, rows.segments_BT)


def _tolerance(dtype: jnp.dtype, device: jax.Device) -> float:
    """Return the largest relative error that rounding explains.

    Except on a CPU, a float32 product may round its operands to bfloat16 or tf32, so only float32 on a CPU is strict.
    """
    return 1e-5 if dtype == jnp.float32 and device.platform == "cpu" else 3e-2


def check_against_all_gather(transport: TransportName) -> float:
    """Compare a transport with all_gather on a small layer on the mesh in force.

    The cases are even routing and all tokens sent to one expert, which takes several rounds.

    Returns:
        The largest relative error of the result and of the gradients.

    Raises:
        RuntimeError: the error is larger than rounding explains.
    """
    errors = _transport_errors(transport)
    tolerance = _tolerance(jnp.dtype(jnp.float32), jax.local_devices()[0])
    worst = 0.0
    for case, spread in (("even", 1), ("one expert", 0)):
        error = float(np.max(jax.device_get(errors(jnp.int32(spread)))))
        if not error <= tolerance:
            raise RuntimeError(
                f"self-test: compute.transport {transport} gives wrong results on this mesh in case {case!r}: relative error "
                f"{error:.2g} against all_gather, limit {tolerance:g}; set compute.transport to all_to_all"
            )
        worst = max(worst, error)
    return worst


def _transport_errors(transport: TransportName) -> Any:
    """Return a compiled function of `spread` (1 for even routing, 0 for one expert) to the errors of result and gradients."""
    rows = math.prod(axis_size(axis) for axis in BATCH)
    T = 32 * axis_size("context")
    D = math.lcm(128, axis_size("fsdp"))
    F = 128 * axis_size("tensor")
    E = 2 * axis_size("expert")
    # Two experts per token, which differ with even routing, so that results have to be combined.
    A = 2
    tokens = P(BATCH, "context", None)
    into = P("expert", "fsdp", "tensor")
    out = P("expert", "tensor", "fsdp")

    @jax.jit
    def errors(spread: jax.Array) -> list[jax.Array]:
        def normal(i: int, spec: P, *shape: int) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape, out_sharding=spec) / shape[-2] ** 0.5

        gate, up = (ExpertMatrix(normal(i, into, E, D, F), None, None) for i in (0, 1))
        experts = ExpertWeights(gate, up, ExpertMatrix(normal(2, out, E, F, D), None, None))
        x, dy, weights = (normal(i, tokens, rows, T, n) for i, n in ((3, D), (4, D), (5, A)))
        row, column, choice = (jax.lax.broadcasted_iota(jnp.int32, (rows, T, A), dim, out_sharding=tokens) for dim in range(3))
        # `spread` 0 sends every token to expert 0.
        ids = (row * T + column + choice) % E * spread

        def through(transport: TransportName) -> Any:
            def layer(*primals: Any) -> jax.Array:
                x, weights, experts = primals
                routing = Routing(ids, weights, ids[..., 0] >= 0)
                return run_experts(x, routing, experts, ExpertSettings("auto", transport))[0]

            y, vjp = jax.vjp(layer, x, weights, experts)
            return jax.tree.leaves((y, vjp(dy)))

        pairs = zip(through(transport), through("all_gather"), strict=True)
        return [jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in pairs]

    return errors


def _worst_part(actual: np.ndarray, expected: np.ndarray, sizes: Sequence[int] | np.ndarray | None) -> float:
    """Return the largest error max|a - b| / max|b| among the parts that belong to different experts or segments.

    Args:
        actual: the kernel's output.
        expected: the reference's output.
        sizes: rows of each part, where the rest, owned by no expert, is one more part; None if dim 0 indexes the parts.

    Returns:
        Infinity if a part that must be zero is not.
    """
    # In float64, so that the differences themselves are not rounded.
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    cuts = list(range(1, len(actual))) if sizes is None else np.cumsum(sizes).tolist()
    worst = 0.0
    for a, b in zip(np.split(actual, cuts), np.split(expected, cuts), strict=True):
        if not a.size:
            continue
        error = np.max(np.abs(a - b))
        scale = np.max(np.abs(b))
        if scale:
            part = error / scale
        elif error == 0:
            part = 0.0
        else:
            part = np.inf
        # max() with NaN depends on the order of its arguments, so NaN becomes infinity.
        worst = max(worst, float(part)) if np.isfinite(part) else np.inf
    return worst
