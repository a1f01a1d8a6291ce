"""Model FLOPs: the floating-point operations that the mathematics of a model asks for.

They exclude everything else that a program computes: recomputation, and the masked half of attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import jax
from jaxtyping import Array, Shaped

from moe_train import config
from moe_train.model.paths import ParameterPath


def flops_per_token(
    model: config.Model, seq_len: int, adapters: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct] | None = None
) -> float:
    """Return the model FLOPs per token of a training step on rows of `seq_len` tokens.

    Weights: 2 FLOPs per weight that the token passes through in the forward pass, and twice that in the backward pass (gradients
    of input and weight). Of the experts, the chosen and the shared ones count; the head counts once, the embedding lookup does
    not. Attention scores and values: 2 * 2 * N * H per pair of query and visible key (2 * N * (H + W) if values have W dims), also
    times three; a query sees T / 2 keys on average (W - W^2 / 2T with a window W), as if each row were one sequence.

    Args:
        model: model section of the config.
        seq_len: tokens of a row, T.
        adapters: {path: array} of everything that is trained, stacked over layers, if the base weights are frozen: forward and
            input gradient then take 4 per base weight, adapters take 6, and weights that are trained in full take 2 more.
            None or empty for full training.
    """
    D = model.model_dim
    attention = _attention_weights(D, model.attention)
    # The head's product; the embedding is a lookup, without FLOPs.
    base = (model.vocab_size if model.scores is None else model.scores.num_outputs) * D
    keys = 0.0
    for stack in config.stacks(model):
        base += stack.num_layers * (attention + _ffn_weights(D, stack.ffn))
        keys += stack.repeats * sum(_visible_keys(seq_len, window) for window in stack.windows)
    # Scores and weighted values, 2 FLOPs per entry each; the backward pass takes twice the forward pass.
    pairs = 3 * 2 * _pair_entries(model.attention) * keys
    if not adapters:
        return 6 * base + pairs
    trained = 0.0
    for name, x in adapters.items():
        path = ParameterPath.parse(name)
        if not path.is_tower:  # whose products are not those of every token
            trained += _adapter_flops(model, path, x.size)
    return 4 * base + trained + pairs


def _attention_weights(model_dim: int, attention: config.Attention) -> int:
    """Return the number of weights of a layer's attention; a token passes through all of them."""
    D = model_dim
    a = attention
    match a:
        case config.GroupedQueryAttention():
            # Projections of queries and outputs, and of keys and values.
            return 2 * D * a.num_heads * a.head_dim + 2 * D * a.num_kv_heads * a.head_dim
        case config.MultiHeadLatentAttention():
            query_dims = a.num_heads * a.qk_head_dim
            queries = D * query_dims if a.q_lora_rank is None else a.q_lora_rank * (D + query_dims)
            into_latent = D * (a.kv_lora_rank + a.qk_rope_head_dim)
            from_latent = a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
            return queries + into_latent + from_latent + a.num_heads * a.v_head_dim * D
        case _:
            assert_never(a)


def _pair_entries(attention: config.Attention) -> int:
    """Return the number of products of a query with a key, and of a weight with its value, over all heads."""
    match attention:
        case config.GroupedQueryAttention(num_heads=N, head_dim=H):
            return 2 * N * H
        case config.MultiHeadLatentAttention(num_heads=N):
            return N * (attention.qk_head_dim + attention.v_head_dim)
        case _:
            assert_never(attention)


def _ffn_weights(model_dim: int, ffn: config.Ffn) -> int:
    """Return the number of weights that a token passes through in a layer's feed-forward part."""
    dense = 3 * model_dim * ffn.ffn_dim
    if not isinstance(ffn, config.MoeFfn):
        return dense
    return dense * (ffn.experts_per_token + ffn.num_shared_experts) + model_dim * ffn.num_experts


def _visible_keys(seq_len: int, window: int | None) -> float:
    """Return the number of keys that a query of a row sees on average."""
    if window is None or window >= seq_len:
        return seq_len / 2
    # The first W queries see W / 2 keys on average and the other T - W see W: (W * W / 2 + (T - W) * W) / T.
    return window - window * window / (2 * seq_len)


def _adapter_flops(model: config.Model, path: ParameterPath, size: int) -> float:
    """Return the FLOPs per token of an array that is trained on top of a frozen base."""
    is_lookup = path.is_embedding and path.leaf in ("weight", "lora_a")
    # Lookups, norms and router biases involve no matrix product.
    if is_lookup or path.is_norm or path.is_router_bias:
        return 0.0
    # A token passes through the chosen experts only.
    share = 1.0
    if isinstance(model.ffn, config.MoeFfn) and path.is_expert(model):
        share = model.ffn.experts_per_token / model.ffn.num_experts
    # 4 FLOPs of a weight that is trained in full are in the base's count already; only its own gradient is missing.
    return (6 if path.is_adapter else 2) * size * share
