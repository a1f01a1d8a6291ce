"""Model FLOPs: the floating-point operations that the mathematics of a model asks for.

They exclude everything else that a program computes: recomputation, and the masked half of attention.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    not. Attention scores and values: 2 * 2 * N * H per pair of query and visible key, also times three; a query sees T / 2 keys
    on average (W - W^2 / 2T with a window W), as if each row were one sequence.

    Args:
        model: model section of the config.
        seq_len: tokens of a row, T.
        adapters: {path: array} of everything that is trained, stacked over layers, if the base weights are frozen: forward and
            input gradient then take 4 per base weight, adapters take 6, and weights that are trained in full take 2 more.
            None or empty for full training.
    """
    D = model.model_dim
    N = model.attention.num_heads
    K = model.attention.num_kv_heads
    H = model.attention.head_dim
    # Projections of queries and outputs (N heads), and of keys and values (K heads).
    attention = 2 * D * N * H + 2 * D * K * H
    # The head's product; the embedding is a lookup, without FLOPs.
    base = model.vocab_size * D
    keys = 0.0
    for stack in config.stacks(model):
        base += stack.num_layers * (attention + _ffn_weights(D, stack.ffn))
        keys += stack.repeats * sum(_visible_keys(seq_len, window) for window in stack.windows)
    # Scores and weighted values, 2 FLOPs per entry each; the backward pass takes twice the forward pass.
    pairs = 3 * 4 * N * H * keys
    if not adapters:
        return 6 * base + pairs
    trained = sum(_adapter_flops(model, ParameterPath.parse(path), x.size) for path, x in adapters.items())
    return 4 * base + trained + pairs


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
