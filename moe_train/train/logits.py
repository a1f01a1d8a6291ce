"""Logits of one chunk of tokens at a time, with the vocabulary split over `tensor`.

The (tokens, V) float32 logits of a batch are by far its largest array. The functions that need them (`cross_entropy`,
`token_logprobs`, `chosen_logprobs`, `top_logprobs`) go through chunks of tokens with `map_chunks` and `scan_gradients`, so that
only one chunk's logits exist at a time.

Shapes: m tokens of a device, r tokens of a chunk, v vocabulary rows of a device, D model dim. Logits are
sum_i xs_mD[i] · heads_vD[i]: the head's own product, and the LoRA delta of the head as the product of its two factors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_train.machine.mesh import batch_axes, global_axes
from moe_train.model.sharding.fsdp import gather_rows
from moe_train.model.sharding.local_view import in_local_view, index_along, vary
from moe_train.model.sharding.specs import place, spec_of

CHUNK_ELEMENTS = 2**23
"""Number of logits in one chunk (32 MiB in float32)."""
_FEW_ROWS = 512
"""Chunks of up to so many tokens may have twice as many logits: each chunk reads the whole head, which few tokens do not pay for.

With 32,000 outputs of 512 dims on a CPU, loss and gradients take 0.93 of the time with 512 tokens in a chunk in place of 256; with
8,192 outputs of 256 dims 2,048 tokens in place of 1,024 take 1.14 of it.
"""

LoraFactors = tuple[Float[Array, "B T J"], Float[Array, "V J"]]
"""Two factors whose product is the LoRA delta of the logits (`Transformer.head_lora_factors`)."""


TokenFactors = tuple[Float[Array, "m _"], ...]
"""One factor of each summand of the logits, for this device's tokens: (m, D), and with an adapter (m, J)."""
HeadFactors = tuple[Float[Array, "v _"], ...]
"""The other factors, for this device's part of the vocabulary: (v, D), and with an adapter (v, J)."""
TransposedHeadGradients = tuple[Float[Array, "_ v"], ...]
"""Sums of the gradients of `HeadFactors`, transposed, in float32."""


def on_each_device(
    local: Callable[..., Any],
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    lora_factors: LoraFactors | None,
    per_token_BT: Sequence[Shaped[Array, "B T ..."]],
    out_specs: Any,
) -> Any:
    """Run `local(xs_mD, heads_vD, *per_token_bt)` on every device with its tokens, its part of the vocabulary and all of D.

    Gradients are summed over the devices that share the inputs they belong to.

    Args:
        local: function of this device's inputs.
        hidden_BTD: hidden states after the final norm.
        head_VD: the output matrix; may be split on D and V.
        lora_factors: factors of the head's LoRA delta; None without an adapter.
        per_token_BT: further arrays with one value, or k values, per token.
        out_specs: partition specs of the results of `local`.
    """
    tokens = P(batch_axes(), "context")
    hidden_BTD = place(hidden_BTD, "BTD")
    per_token_BT = [place(x, "BTk"[: x.ndim]) for x in per_token_BT]
    if lora_factors is not None:
        lora_factors = (place(lora_factors[0], "BTJ"), lora_factors[1])
    axes = global_axes()
    factors = [(hidden_BTD, head_VD)]
    if lora_factors is not None:
        factors.append(lora_factors)
    inputs, heads = zip(*factors, strict=True)
    head_specs = tuple(spec_of(head) for head in heads)

    def run_local(
        inputs: tuple[Float[Array, "b t _"], ...], heads: tuple[Float[Array, "_ _"], ...], *per_token_bt: Shaped[Array, "b t ..."]
    ) -> Any:
        dtype = inputs[0].dtype
        # Each device of `tensor` computes a part of the gradient of xs; the cast makes that gradient the sum of the parts.
        xs = tuple(vary(x.reshape(-1, x.shape[-1]), "tensor") for x in inputs)
        gathered = tuple(gather_rows(head.astype(dtype), spec, axes) for head, spec in zip(heads, head_specs, strict=True))
        return local(xs, gathered, *per_token_bt)

    in_specs = (tokens, head_specs, *(tokens for _ in per_token_BT))
    return in_local_view(run_local, in_specs, out_specs)(inputs, heads, *per_token_BT)


def map_chunks(
    of_logits: Callable[[Float[Array, "r v"], Any], Any], xs: TokenFactors, heads: HeadFactors, per_token: Any = ()
) -> Any:
    """Compute values of each of this device's tokens from its logits, chunk by chunk.

    Args:
        of_logits: function (float32 logits of a chunk, the chunk of `per_token`) -> arrays of (r, …).
        xs: factors of the tokens.
        heads: factors of this device's part of the vocabulary.
        per_token: further arrays of (m, …).

    Returns:
        The results of `of_logits` with one row for each token.
    """
    tokens = xs[0].shape[0]
    rows = chunk_rows(tokens, heads[0].shape[0])

    def of_chunk(chunk: tuple[TokenFactors, Any]) -> Any:
        xs_r, per_token_r = chunk
        return of_logits(chunk_logits(xs_r, heads), per_token_r)

    chunks = jax.tree.map(lambda x: split_chunks(x, rows), (xs, per_token))
    return jax.tree.map(lambda x: join_chunks(x, tokens), jax.lax.map(of_chunk, chunks))


class ScannedGradients(NamedTuple):
    """Result of `scan_gradients`."""

    total: Any
    """The last value that was carried from chunk to chunk."""
    xs: TokenFactors
    """Gradients of the tokens' factors; they must still be summed over `tensor`."""
    heads: HeadFactors
    """Gradients of the heads' factors."""


def scan_gradients(
    of_logits: Callable[[Any, Float[Array, "r v"], Any], tuple[Any, Float[Array, "r v"]]],
    xs: TokenFactors,
    heads: HeadFactors,
    per_token: Any,
    total: Any = (),
) -> ScannedGradients:
    """Compute the gradients of both factors of the logits, given the gradient of the logits of each chunk.

    Args:
        of_logits: function (value carried so far, float32 logits of a chunk, the chunk of `per_token`) -> (value to carry on,
            gradient of the logits). Rows that pad the last chunk have zeros in `per_token`, and must have a gradient of 0 there.
        xs: factors of the tokens.
        heads: factors of this device's part of the vocabulary.
        per_token: further arrays of (m, …).
        total: value to carry from chunk to chunk.
    """
    tokens = xs[0].shape[0]
    rows = chunk_rows(tokens, heads[0].shape[0])

    def add_chunk(
        carry: tuple[Any, TransposedHeadGradients], chunk: tuple[TokenFactors, Any]
    ) -> tuple[tuple[Any, TransposedHeadGradients], TokenFactors]:
        total, dheads = carry
        xs_r, per_token_r = chunk
        total, dlogits_rv = of_logits(total, chunk_logits(xs_r, heads), per_token_r)
        dlogits_rv = dlogits_rv.astype(xs_r[0].dtype)
        return (total, add_head_gradients(dheads, dlogits_rv, xs_r)), input_gradients(dlogits_rv, heads)

    # Every chunk needs the full heads, so they are not split into chunks.
    chunks = jax.tree.map(lambda x: split_chunks(x, rows), (xs, per_token))
    (total, dheads), chunk_dxs = jax.lax.scan(add_chunk, (total, zero_head_gradients(xs[0], heads)), chunks)
    return ScannedGradients(total, tuple(join_chunks(dx, tokens) for dx in chunk_dxs), head_gradients(dheads, heads))


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """Return the number of tokens in one chunk on a device. Chunks have about equal sizes: little of the last one is padding."""
    most = max(128, CHUNK_ELEMENTS // vocabulary, min(_FEW_ROWS, 2 * CHUNK_ELEMENTS // vocabulary))
    return -(-tokens // -(-tokens // most))


def split_chunks(x: Shaped[Array, "m ..."], rows: int) -> Shaped[Array, "chunks {rows} ..."]:
    """Reshape (m, …) to (chunks, rows, …), with the last chunk padded with zeros."""
    pad = -x.shape[0] % rows
    padded = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(-1, rows, *x.shape[1:])


def join_chunks(x: Shaped[Array, "chunks rows ..."], tokens: int) -> Shaped[Array, "{tokens} ..."]:
    """Undo `split_chunks` and remove the padding."""
    return x.reshape(-1, *x.shape[2:])[:tokens]


def chunk_logits(xs_rD: TokenFactors, heads_vD: HeadFactors) -> Float[Array, "m v"]:
    """Compute the float32 logits (r, v) of a chunk for this device's part of the vocabulary."""
    pairs = zip(xs_rD, heads_vD, strict=True)
    products = (jnp.einsum("rD,vD->rv", x, w, preferred_element_type=jnp.float32) for x, w in pairs)
    return functools.reduce(jnp.add, products)


def target_hits(targets_r: Int[Array, " r"], vocabulary: int) -> Bool[Array, "r {vocabulary}"]:
    """Return (r, v), true where this device's part of the vocabulary holds the token's target."""
    # A comparison and not an index, so that a target in another device's part of the vocabulary matches nothing.
    first = index_along("tensor") * vocabulary
    return (targets_r - first)[:, None] == jnp.arange(vocabulary)


def input_gradients(dlogits_rv: Float[Array, "m v"], heads_vD: HeadFactors) -> TokenFactors:
    """Return the gradients of each of the chunk's inputs; they must still be summed over `tensor`."""
    return tuple(jnp.einsum("rv,vD->rD", dlogits_rv, w) for w in heads_vD)


def add_head_gradients(
    dheads_Dv: TransposedHeadGradients, dlogits_rv: Float[Array, "m v"], xs_rD: TokenFactors
) -> TransposedHeadGradients:
    """Add this chunk's gradients to the float32 gradients of the heads so far.

    They are transposed: a product that sums over the rows of both operands transposes its first one, here the small one. On a
    CPU it is 1.6 times as fast as with the logits first.
    """
    pairs = zip(dheads_Dv, xs_rD, strict=True)
    return tuple(dw + jnp.einsum("rD,rv->Dv", x, dlogits_rv, preferred_element_type=jnp.float32) for dw, x in pairs)


def zero_head_gradients(like: Float[Array, "..."], heads_vD: HeadFactors) -> TransposedHeadGradients:
    """Return float32 zeros that `add_head_gradients` starts from and that vary over the same mesh axes as `like`."""
    return tuple(jax.lax.full_like(like, 0, jnp.float32, w.shape[::-1]) for w in heads_vD)


def head_gradients(dheads_Dv: TransposedHeadGradients, heads_vD: HeadFactors) -> HeadFactors:
    """Return the summed gradients in the layout and dtype of the heads."""
    return tuple(dw.T.astype(w.dtype) for dw, w in zip(dheads_Dv, heads_vD, strict=True))
