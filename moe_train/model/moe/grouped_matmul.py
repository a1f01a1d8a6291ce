"""Grouped matrix product: the rows of several experts times each expert's matrix, with one backend per platform.

Contract of every backend: x_RD holds the rows of expert 0, then of expert 1, …; `group_sizes_E` is the number of rows of
each expert, at most R in sum; rows past the sum belong to no expert and their results and gradients are zero. The cost is
proportional to the rows that exist, not to R. `reference_grouped_matmul` is the exception: it is simple rather than fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_train.machine.mesh import platform
from moe_train.model.moe.expert_weights import InStack
from moe_train.model.outer_products import is_faster_transposed


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"] | InStack,
    group_sizes_E: Int[Array, " E"],
    kernel: str = "auto",
    add_to_RF: Float[Array, "R F"] | None = None,
) -> Float[Array, "R F"]:
    """Compute y[r] = x[r] @ w[expert of r].

    Args:
        x_RD: rows in the order of their experts.
        w_EDF: one matrix per expert; only the kernel `blocked` reads them in a stack.
        group_sizes_E: number of rows of each expert, at most R in sum.
        kernel: as in `config.Compute.grouped_matmul`.
        add_to_RF: what the products are added to; None for zeros.

    Returns:
        The products (R, F), zero past the last group, plus `add_to_RF`.
    """
    name = choose_grouped_matmul_kernel(kernel)
    if name == "blocked":
        return blocked_grouped_matmul(x_RD, w_EDF, group_sizes_E, add_to_RF)
    assert not isinstance(w_EDF, InStack)
    match name:
        case "reference":
            y_RF = reference_grouped_matmul(x_RD, w_EDF, group_sizes_E)
        case "megablox":
            y_RF = _megablox(x_RD, w_EDF, group_sizes_E)
        case "ragged_dot":
            y_RF = _zero_tail(jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E), group_sizes_E)
        case unknown:
            raise AssertionError(unknown)
    return y_RF if add_to_RF is None else add_to_RF + y_RF


def choose_grouped_matmul_kernel(kernel: str) -> str:
    """Resolve `auto` to the fast backend of the mesh's platform, and return other names unchanged.

    On GPU, XLA makes E masked products of each ragged_dot (24 units of FLOPs for 8 experts, forward and backward, where 3 are
    needed; compiled for H100 by JAX 0.10.2), so a loop of dense products is cheaper.
    """
    fast = {"cpu": "blocked", "tpu": "megablox", "gpu": "blocked", "cuda": "blocked"}
    return fast[platform()] if kernel == "auto" else kernel


def reference_grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"]
) -> Float[Array, "R F"]:
    """Multiply every row by every matrix and mask all but its own expert: E times the work, but plainly correct."""
    # Rows past the last group get expert E, which matches no matrix, so their results are zero.
    expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(x_RD.shape[0]), side="right")
    is_own_RE = expert_R[:, None] == jnp.arange(w_EDF.shape[0])[None, :]
    # In float32, so that results are rounded only once.
    x, w, is_own = (a.astype(jnp.float32) for a in (x_RD, w_EDF, is_own_RE))
    return jnp.einsum("RD,EDF,RE->RF", x, w, is_own).astype(x_RD.dtype)


def _zero_tail(y_RF: Float[Array, "R F"], group_sizes_E: Int[Array, " E"]) -> Float[Array, "R F"]:
    """Set the rows past the last group to zero."""
    return jnp.where(jnp.arange(y_RF.shape[0])[:, None] < jnp.sum(group_sizes_E), y_RF, 0)


# --- CPU and GPU: blocks of rows ----------------------------------------------------------------------------------

ROW_BLOCKS = (512, 128, 32)
"""Numbers of rows in one product of `_rows`, largest first.

As many blocks of each size as fit are taken from a group; the last block, of the last size, may be partly empty.
"""


def row_blocks(rows: int, experts: int) -> tuple[int, ...]:
    """Return the numbers of rows in one product for `rows` rows of `experts` experts: ROW_BLOCKS, and a smaller size for few rows.

    When tokens are decoded an expert has a row or two, of which blocks of 32 rows would compute 16 times as much. The smallest size
    is the mean number of rows, a power of two: measured for 8 experts, half or twice as many rows take up to a tenth longer.
    """
    smallest = 1
    while smallest * experts < rows:
        smallest *= 2
    return ROW_BLOCKS if smallest >= ROW_BLOCKS[-1] else (*ROW_BLOCKS, smallest)


SUM_BLOCKS = (512, 128, 32)
"""Numbers of rows in one product of the weight gradient, used as in `ROW_BLOCKS`; each product writes a whole matrix."""


@jax.custom_vjp
def blocked_grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"] | InStack,
    group_sizes_E: Int[Array, " E"],
    add_to_RF: Float[Array, "R F"] | None = None,
) -> Float[Array, "R F"]:
    """Compute the product by a loop over experts and blocks of their rows. XLA's own ragged_dot computes all E products per row.

    `add_to_RF` is overwritten block by block, so that no second array of all rows is written and read.
    """
    return _rows(x_RD, w_EDF, group_sizes_E, "RD,DF->RF", add_to_RF)


def _rows(
    x_Ri: Float[Array, "R i"],
    w_EDF: Float[Array, "E D F"] | InStack,
    group_sizes_E: Int[Array, " E"],
    equation: str,
    add_to_Ro: Float[Array, "R o"] | None = None,
) -> Float[Array, "R o"]:
    """Multiply each row by its expert's matrix ("RD,DF->RF"), or by its transpose ("RF,DF->RD")."""
    R = x_Ri.shape[0]
    E, D, F = w_EDF.shape
    outputs = F if equation == "RD,DF->RF" else D
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def rows_of_expert(e: Int[Array, ""], y_Ro: Float[Array, "R o"]) -> Float[Array, "R o"]:
        w_DF = w_EDF.of_expert(e) if isinstance(w_EDF, InStack) else w_EDF[e]

        def block(
            rows: int, start: Int[Array, ""], is_own: Bool[Array, "rows 1"] | None, y_Ro: Float[Array, "R o"]
        ) -> Float[Array, "R o"]:
            y = jnp.einsum(equation, jax.lax.dynamic_slice_in_dim(x_Ri, start, rows), w_DF)
            before = jax.lax.dynamic_slice_in_dim(y_Ro, start, rows)
            if add_to_Ro is not None:
                y += before
            if is_own is not None:
                # Rows of other groups, and those past the last group, keep what is there.
                y = jnp.where(is_own, y, before)
            return jax.lax.dynamic_update_slice_in_dim(y_Ro, y, start, 0)

        return over_blocks(starts_E[e], group_sizes_E[e], R, row_blocks(R, E), block, y_Ro)

    def expert(e: Int[Array, ""], y_Ro: Float[Array, "R o"]) -> Float[Array, "R o"]:
        # The slice of a weight is a copy, which is left out for experts without rows: most of them when a token is decoded.
        return jax.lax.cond(group_sizes_E[e] > 0, rows_of_expert, lambda _, y_Ro: y_Ro, e, y_Ro)

    start_Ro = _zeros_like(x_Ri, (R, outputs), x_Ri.dtype) if add_to_Ro is None else add_to_Ro
    return jax.lax.fori_loop(0, E, expert, start_Ro)


def _zeros_like(x: Float[Array, "..."], shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Return zeros that vary along the mesh axes that x varies along, as a loop's carry must from the start."""
    return jax.lax.full_like(x, 0, dtype, shape)


_Carry = TypeVar("_Carry", bound=Shaped[Array, "..."])
_Block = Callable[[int, Int[Array, ""], Bool[Array, "rows 1"] | None, _Carry], _Carry]


def over_blocks(
    start: Int[Array, ""], size: Int[Array, ""], R: int, block_sizes: tuple[int, ...], block: _Block, carry: _Carry
) -> _Carry:
    """Fold `block(rows, start, is_own, carry)` over the rows of one group; `rows` is static, one of `block_sizes`.

    Blocks of the last size are kept inside the R rows and may contain rows of other groups. `is_own` (rows, 1) marks the rows
    that belong to the group and are not done yet; it is None if all do.
    """
    # `dynamic_slice` cannot take more rows than there are.
    fitting = tuple(rows for rows in block_sizes if rows <= R) or (R,)
    last_rows = fitting[-1]
    end = start + size
    for rows in fitting[:-1]:
        count = (end - start) // rows
        carry = jax.lax.fori_loop(0, count, lambda i, c, n=rows, at=start: block(n, at + i * n, None, c), carry)
        start += count * rows

    def last(i: Int[Array, ""], carry: _Carry) -> _Carry:
        unclamped = start + i * last_rows
        # `dynamic_slice` would shift a block that passes the end anyway; shifted here, the mask knows about it.
        begin = jnp.minimum(unclamped, R - last_rows)
        row = begin + jnp.arange(last_rows)[:, None]
        return block(last_rows, begin, (row >= unclamped) & (row < end), carry)

    return jax.lax.fori_loop(0, -(-(end - start) // last_rows), last, carry)


def _weight_gradient(
    x_RD: Float[Array, "R D"], dy_RF: Float[Array, "R F"], group_sizes_E: Int[Array, " E"], dtype: jnp.dtype
) -> Float[Array, "E D F"]:
    """Compute dw[e], the sum of the outer products of the rows of e, accumulated in float32."""
    E = group_sizes_E.shape[0]
    R, D = x_RD.shape
    F = dy_RF.shape[1]
    if is_faster_transposed(D, F):
        return jnp.swapaxes(_weight_gradient(dy_RF, x_RD, group_sizes_E, dtype), 1, 2)
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def block(
        rows: int, start: Int[Array, ""], is_own: Bool[Array, "rows 1"] | None, dw_DF: Float[Array, "D F"]
    ) -> Float[Array, "D F"]:
        x = jax.lax.dynamic_slice_in_dim(x_RD, start, rows)
        if is_own is not None:
            # Masking one operand is enough, since the product sums over rows.
            x = jnp.where(is_own, x, 0)
        dy = jax.lax.dynamic_slice_in_dim(dy_RF, start, rows)
        return dw_DF + jnp.einsum("RD,RF->DF", x, dy, preferred_element_type=jnp.float32)

    def expert(e: Int[Array, ""], dw_EDF: Float[Array, "E D F"]) -> Float[Array, "E D F"]:
        start, size = starts_E[e], group_sizes_E[e]
        zeros_DF = _zeros_like(x_RD, (D, F), jnp.dtype("float32"))
        dw_DF = over_blocks(start, size, R, SUM_BLOCKS, block, zeros_DF)
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF.astype(dtype), e, 0)

    return jax.lax.fori_loop(0, E, expert, _zeros_like(x_RD, (E, D, F), dtype))


_Residuals = tuple[Float[Array, "R D"], Float[Array, "E D F"] | InStack, Int[Array, " E"]]
"""What the forward pass saves for the backward pass: the factors of the products."""
_Added = tuple[()] | None
"""Whether the products were added to something: no array, but a structure that the backward pass sees, () or None."""


def _blocked_forward(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"] | InStack,
    group_sizes_E: Int[Array, " E"],
    add_to_RF: Float[Array, "R F"] | None = None,
) -> tuple[Float[Array, "R F"], tuple[_Residuals, _Added]]:
    y_RF = blocked_grouped_matmul(x_RD, w_EDF, group_sizes_E, add_to_RF)
    return y_RF, ((x_RD, w_EDF, group_sizes_E), None if add_to_RF is None else ())


def _blocked_backward(
    saved: tuple[_Residuals, _Added], dy_RF: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], Any, None, Float[Array, "R F"] | None]:
    (x_RD, w_EDF, group_sizes_E), added = saved
    dx_RD = _rows(dy_RF, w_EDF, group_sizes_E, "RF,DF->RD")
    dw_EDF = _weight_gradient(x_RD, dy_RF, group_sizes_E, w_EDF.dtype)
    # A weight in a stack has its gradient in `own`, and None in place of the others.
    dw = InStack(None, None, dw_EDF) if isinstance(w_EDF, InStack) else dw_EDF  # type: ignore[arg-type]
    return dx_RD, dw, None, None if added is None else dy_RF


blocked_grouped_matmul.defvjp(_blocked_forward, _blocked_backward)


# --- TPU: Pallas megablox ------------------------------------------------------------------------------------------
# Pallas calls do not declare along which mesh axes their results vary: `shard_map` around them needs check_vma=False.


@jax.custom_vjp
def _megablox(x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"]) -> Float[Array, "R F"]:
    """Multiply with Megablox's kernels and our own gradient.

    Megablox's own gradient leaves rows of dx past the sum uninitialized, and tiles the products of the backward pass as if they
    had the shape of the forward pass.
    """
    return _gmm(x_RD, w_EDF, group_sizes_E, transpose=False)


def _gmm(
    x_Ri: Float[Array, "R i"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"], transpose: bool
) -> Float[Array, "R o"]:
    """Multiply each row by its expert's matrix, or by its transpose; tiles of rows past the sum are not visited."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, inputs = x_Ri.shape
    outputs = w_EDF.shape[1 if transpose else 2]
    tiling = tiles(rows, inputs, outputs, x_Ri.dtype)
    kwargs = {"transpose_rhs": transpose, "interpret": platform() == "cpu"}
    y_Ro = gmm(_pad_rows(x_Ri), w_EDF, group_sizes_E, x_Ri.dtype, tiling, **kwargs)
    return _zero_tail(y_Ro[:rows], group_sizes_E)


def tiles(rows: int, inner: int, outer: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Return Megablox's tile sizes for a product (rows, inner) x (inner, outer), in this order."""
    return _row_tile(rows), _tile(inner, dtype), _tile(outer, dtype)


def _row_tile(rows: int) -> int:
    return 512 if rows >= 512 else 128


def _pad_rows(x_RD: Float[Array, "R D"]) -> Float[Array, "P D"]:
    """Pad with rows of zeros to a multiple of the row tile."""
    rows = x_RD.shape[0]
    return jnp.pad(x_RD, ((0, -rows % _row_tile(rows)), (0, 0)))


def _tile(dim: int, dtype: jnp.dtype) -> int:
    """Return the largest tile that divides `dim` without being small; two buffers of each operand must fit into VMEM."""
    limit = 2048 // dtype.itemsize
    if dim <= limit:
        return dim
    # Steps of 128, the lanes of a register.
    return next((t for t in range(limit, limit // 2, -128) if dim % t == 0), limit)


_MegabloxResiduals = tuple[Float[Array, "R D"], Float[Array, "E D F"], Int[Array, " E"]]
"""As `_Residuals`; these kernels read no weight in a stack."""


def _megablox_forward(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"]
) -> tuple[Float[Array, "R F"], _MegabloxResiduals]:
    return _megablox(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _megablox_backward(
    saved: _MegabloxResiduals, dy_RF: Float[Array, "R F"]
) -> tuple[Float[Array, "R D"], Float[Array, "E D F"], None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_RD, w_EDF, group_sizes_E = saved
    dx_RD = _gmm(dy_RF, w_EDF, group_sizes_E, transpose=True)
    tiling = tiles(x_RD.shape[0], x_RD.shape[1], dy_RF.shape[1], x_RD.dtype)
    # tgmm takes its first operand with the rows last.
    x_DP = _pad_rows(x_RD).swapaxes(0, 1)
    dw_EDF = tgmm(x_DP, _pad_rows(dy_RF), group_sizes_E, w_EDF.dtype, tiling, interpret=platform() == "cpu")
    return dx_RD, dw_EDF, None


_megablox.defvjp(_megablox_forward, _megablox_backward)
