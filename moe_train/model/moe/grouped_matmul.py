"""Grouped matrix product: the rows of several experts times each expert's matrix, with one backend per platform.

Contract of every backend: x_RD holds the rows of expert 0, then of expert 1, …; `group_sizes_E` is the number of rows of
each expert, at most R in sum; rows past the sum belong to no expert and their results and gradients are zero. The cost is
proportional to the rows that exist, not to R. `reference` is the exception: it is simple rather than fast.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train.machine.mesh import platform


def grouped_matmul(
    x_RD: Float[Array, "R D"], w_EDF: Float[Array, "E D F"], group_sizes_E: Int[Array, " E"], kernel: str = "auto"
) -> Float[Array, "R F"]:
    """Compute y[r] = x[r] @ w[expert of r].

    Args:
        x_RD: rows in the order of their experts.
        w_EDF: one matrix per expert.
        group_sizes_E: number of rows of each expert, at most R in sum.
        kernel: as in `config.Compute.grouped_matmul`.

    Returns:
        The products (R, F), zero past the last group.
    """
    match choose_kernel(kernel):
        case "reference":
            return reference(x_RD, w_EDF, group_sizes_E)
        case "blocked":
            return blocked(x_RD, w_EDF, group_sizes_E)
        case "megablox":
            return _megablox(x_RD, w_EDF, group_sizes_E)
        case "ragged_dot":
            return _zero_tail(jax.lax.ragged_dot(x_RD, w_EDF, group_sizes_E), group_sizes_E)
    raise AssertionError(kernel)


def choose_kernel(kernel: str) -> str:
    """Resolve `auto` to the fast backend of the mesh's platform, and return other names unchanged.

    On GPU, XLA makes E masked products of each ragged_dot (24 units of FLOPs for 8 experts, forward and backward, where 3 are
    needed; compiled for H100 by JAX 0.10.2), so a loop of dense products is cheaper.
    """
    fast = {"cpu": "blocked", "tpu": "megablox", "gpu": "blocked", "cuda": "blocked"}
    return fast[platform()] if kernel == "auto" else kernel


def reference(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiply every row by every matrix and mask all but its own expert: E times the work, but plainly correct."""
    # Rows past the last group get expert E, which matches no matrix, so their results are zero.
    expert_R = jnp.searchsorted(jnp.cumsum(group_sizes_E), jnp.arange(x_RD.shape[0]), side="right")
    mine_RE = expert_R[:, None] == jnp.arange(w_EDF.shape[0])[None, :]
    x, w, mine = (a.astype(jnp.float32) for a in (x_RD, w_EDF, mine_RE))  # so that results are rounded only once
    return jnp.einsum("RD,EDF,RE->RF", x, w, mine).astype(x_RD.dtype)


def _zero_tail(y_RF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Set the rows past the last group to zero."""
    return jnp.where(jnp.arange(y_RF.shape[0])[:, None] < jnp.sum(group_sizes_E), y_RF, 0)


# --- CPU and GPU: blocks of rows ----------------------------------------------------------------------------------

ROW_BLOCKS = (512, 128, 32)
"""Numbers of rows in one product of `_rows`, largest first.

As many blocks of each size as fit are taken from a group; the last block, of the last size, may be partly empty.
"""
SUM_BLOCKS = (512, 128, 32)
"""Numbers of rows in one product of the weight gradient, used as in `ROW_BLOCKS`; each product writes a whole matrix."""


@jax.custom_vjp
def blocked(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Compute the product by a loop over experts and blocks of their rows. XLA's own ragged_dot computes all E products per row."""
    return _rows(x_RD, w_EDF, group_sizes_E, "RD,DF->RF")


def _rows(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, equation: str) -> jax.Array:
    """Multiply each row by its expert's matrix, or by its transpose."""
    F = w_EDF.shape[2] if equation == "RD,DF->RF" else w_EDF.shape[1]
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def expert(e: jax.Array, y_RF: jax.Array) -> jax.Array:
        w_DF = w_EDF[e]

        def block(rows: int, start: jax.Array, mine: jax.Array | None, y_RF: jax.Array) -> jax.Array:
            y = jnp.einsum(equation, jax.lax.dynamic_slice_in_dim(x_RD, start, rows), w_DF)
            if mine is not None:
                y = jnp.where(mine, y, jax.lax.dynamic_slice_in_dim(y_RF, start, rows))
            return jax.lax.dynamic_update_slice_in_dim(y_RF, y, start, 0)

        return _over_blocks(starts_E[e], group_sizes_E[e], x_RD.shape[0], ROW_BLOCKS, block, y_RF)

    return jax.lax.fori_loop(0, w_EDF.shape[0], expert, _zeros_like(x_RD, (x_RD.shape[0], F), x_RD.dtype))


def _zeros_like(x: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Return zeros that vary along the mesh axes that x varies along, as a loop's carry must from the start."""
    return jax.lax.full_like(x, 0, dtype, shape)


def _over_blocks(start: jax.Array, size: jax.Array, R: int, sizes: tuple[int, ...], block, carry):
    """Fold `block(rows, start, mine, carry)` over the rows of one group; `rows` is static, one of `sizes`.

    Blocks of the last size are kept inside the R rows and may contain rows of other groups. `mine` (rows, 1) marks the rows
    that belong to the group and are not done yet; it is None if all do.
    """
    sizes = tuple(b for b in sizes if b <= R) or (R,)
    end = start + size
    for rows in sizes[:-1]:
        count = (end - start) // rows
        carry = jax.lax.fori_loop(0, count, lambda i, c, n=rows, at=start: block(n, at + i * n, None, c), carry)
        start += count * rows

    def last(i: jax.Array, carry):
        rows, wanted = sizes[-1], start + i * sizes[-1]
        # `dynamic_slice` would shift a block that passes the end anyway; shifted here, the mask knows about it.
        begin = jnp.minimum(wanted, R - rows)
        row = begin + jnp.arange(rows)[:, None]
        return block(rows, begin, (row >= wanted) & (row < end), carry)

    return jax.lax.fori_loop(0, -(-(end - start) // sizes[-1]), last, carry)


def _weight_gradient(x_RD: jax.Array, dy_RF: jax.Array, group_sizes_E: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Compute dw[e], the sum of the outer products of the rows of e, accumulated in float32."""
    E, (R, D), F = group_sizes_E.shape[0], x_RD.shape, dy_RF.shape[1]
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def block(rows: int, start: jax.Array, mine: jax.Array | None, dw_DF: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(x_RD, start, rows)
        x = x if mine is None else jnp.where(mine, x, 0)
        dy = jax.lax.dynamic_slice_in_dim(dy_RF, start, rows)
        return dw_DF + jnp.einsum("RD,RF->DF", x, dy, preferred_element_type=jnp.float32)

    def expert(e: jax.Array, dw_EDF: jax.Array) -> jax.Array:
        dw_DF = _over_blocks(starts_E[e], group_sizes_E[e], R, SUM_BLOCKS, block, _zeros_like(x_RD, (D, F), jnp.dtype("float32")))
        return jax.lax.dynamic_update_index_in_dim(dw_EDF, dw_DF.astype(dtype), e, 0)

    return jax.lax.fori_loop(0, E, expert, _zeros_like(x_RD, (E, D, F), dtype))


def _blocked_forward(x_RD, w_EDF, group_sizes_E):
    return blocked(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _blocked_backward(saved, dy_RF):
    x_RD, w_EDF, group_sizes_E = saved
    dx_RD = _rows(dy_RF, w_EDF, group_sizes_E, "RF,DF->RD")
    return dx_RD, _weight_gradient(x_RD, dy_RF, group_sizes_E, w_EDF.dtype), None


blocked.defvjp(_blocked_forward, _blocked_backward)


# --- TPU: Pallas megablox ------------------------------------------------------------------------------------------
# Pallas calls do not declare along which mesh axes their results vary: `shard_map` around them needs check_vma=False.


@jax.custom_vjp
def _megablox(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiply with Megablox's kernels and our own gradient.

    Megablox's own gradient leaves rows of dx past the sum uninitialized, and tiles the products of the backward pass as if they
    had the shape of the forward pass.
    """
    return _gmm(x_RD, w_EDF, group_sizes_E, transpose=False)


def _gmm(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, transpose: bool) -> jax.Array:
    """Multiply each row by its expert's matrix, or by its transpose; tiles of rows past the sum are not visited."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows, out = x_RD.shape[0], w_EDF.shape[1 if transpose else 2]
    x_RD = _pad_rows(x_RD)
    tiling = tiles(rows, x_RD.shape[1], out, x_RD.dtype)
    kwargs = {"transpose_rhs": transpose, "interpret": platform() == "cpu"}
    y = gmm(x_RD, w_EDF, group_sizes_E, x_RD.dtype, tiling, **kwargs)
    return _zero_tail(y[:rows], group_sizes_E)


def tiles(rows: int, inner: int, outer: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Return Megablox's tile sizes for a product (rows, inner) x (inner, outer), in this order."""
    return _row_tile(rows), _tile(inner, dtype), _tile(outer, dtype)


def _row_tile(rows: int) -> int:
    return 512 if rows >= 512 else 128


def _pad_rows(x_RD: jax.Array) -> jax.Array:
    return jnp.pad(x_RD, ((0, -x_RD.shape[0] % _row_tile(x_RD.shape[0])), (0, 0)))


def _tile(dim: int, dtype: jnp.dtype) -> int:
    """Return the largest tile that divides `dim` without being small; two buffers of each operand must fit into VMEM."""
    limit = 2048 // dtype.itemsize
    return dim if dim <= limit else next((t for t in range(limit, limit // 2, -128) if dim % t == 0), limit)


def _megablox_forward(x_RD, w_EDF, group_sizes_E):
    return _megablox(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _megablox_backward(saved, dy_RF):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_RD, w_EDF, group_sizes_E = saved
    dx_RD = _gmm(dy_RF, w_EDF, group_sizes_E, transpose=True)
    tiling = tiles(x_RD.shape[0], x_RD.shape[1], dy_RF.shape[1], x_RD.dtype)
    x_DR, dy_RF = _pad_rows(x_RD).swapaxes(0, 1), _pad_rows(dy_RF)
    dw_EDF = tgmm(x_DR, dy_RF, group_sizes_E, w_EDF.dtype, tiling, interpret=platform() == "cpu")
    return dx_RD, dw_EDF, None


_megablox.defvjp(_megablox_forward, _megablox_backward)
