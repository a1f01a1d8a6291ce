"""Floating-point operations: those that a model's mathematics asks for, and those that devices could do.

Model FLOPs leave out what a program does besides: nothing recomputed, no masked half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_train import config
from moe_train.model.paths import is_bias, is_of_experts


def flops_per_token(model: config.Model, seq_len: int, adapters: Mapping[str, Any] | None = None) -> float:
    """Model FLOPs of one token of a training step on rows of `seq_len`.

    Weights: 2 per weight that the token passes through in the forward pass, and twice that backward (gradients of
    input and weight); of experts those chosen and those shared count, the head once, the embedding's lookup not.
    Attention's scores and values: 2 * 2 * N * H per pair of query and visible key, three times as well; a query sees
    T / 2 keys on average (W - W^2 / 2T with a window W), as if each row were one sequence.
    With `adapters` ({path: array} of all that is trained, stacked on layers) the base's weights are frozen: forward and
    gradient of the input are 4 per weight, adapters are 6, and what is trained in full takes 2 more.
    """
    a, D = model.attention, model.model_dim
    attention = 2 * D * a.num_heads * a.head_dim + 2 * D * a.num_kv_heads * a.head_dim
    ffn, share = 3 * D * model.ffn.ffn_dim, 1.0
    if isinstance(model.ffn, config.MoeFfn):
        share = model.ffn.experts_per_token / model.ffn.num_experts
        ffn = ffn * (model.ffn.experts_per_token + model.ffn.num_shared_experts) + D * model.ffn.num_experts
    base = model.num_layers * (attention + ffn) + model.vocab_size * D
    keys = [seq_len / 2 if w is None or w >= seq_len else w - w * w / (2 * seq_len) for w in a.windows]
    pairs = 3 * model.num_layers * 4 * a.num_heads * a.head_dim * sum(keys) / len(keys)
    if not adapters:
        return 6 * base + pairs
    lookups = ("embed.weight", "embed.lora_a")
    used = {
        path: x.size * (share if is_of_experts(path) else 1)
        for path, x in adapters.items()
        if path not in lookups and not path.endswith(".scale") and not is_bias(path)
    }
    return 4 * base + sum((6 if ".lora_" in path else 2) * size for path, size in used.items()) + pairs
