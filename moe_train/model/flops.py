"""Floating-point operations: those that a model's mathematics asks for, and those that devices could do.

Model FLOPs leave out what a program does besides: nothing recomputed, no masked half.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.devices import DEVICES
from moe_train.model.moe import is_bias, is_of_experts


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


KINDS: dict[str, str | float] = {
    **{"v5p": "v5p", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "tpu7x": "tpu7x"},
    "v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "h100 pcie": 756e12,  # nvidia.com H100 data sheet, without sparsity
    **{"h200": "h200", "h100": "h100", "b200": "b200", "a100": "a100"},
    "l40s": 362e12,  # nvidia.com L40S data sheet, without sparsity
}
"""Words of jax's device_kind, the first that match -> the row of `DEVICES`, or bfloat16 FLOP/s of a chip that has none there.
jax calls a v5p "TPU v5"."""


def peak_flops(devices: Sequence[jax.Device]) -> tuple[float | None, str]:
    """(FLOP/s that all `devices` could reach, where the figure is from).

    Accelerators: the bfloat16 figure of `devices`. CPUs: a float32 product measured here, once for each process, since a
    process's devices share its cores. (None, why) for a chip that is not in the table.
    """
    device = devices[0]
    if device.platform == "cpu":
        processes = len({d.process_index for d in devices})
        return processes * measured_matmul_flops(), "a float32 product of 1024^3, measured"
    kind = device.device_kind.lower()
    for words, chip in KINDS.items():
        if words in kind:
            flops = DEVICES[chip].flops["bfloat16"] / DEVICES[chip].devices_per_chip if isinstance(chip, str) else chip
            return len(devices) * flops, f"{len(devices)} x {flops / 1e12:g} TFLOP/s (bfloat16, {device.device_kind})"
    return None, f"no figure for {device.device_kind}"


def measured_matmul_flops(size: int = 1024) -> float:
    """FLOP/s of the best of three float32 products on the first device of this process."""
    with jax.default_device(jax.local_devices()[0]):
        x = jnp.asarray(np.ones((size, size), np.float32))
        product = jax.jit(jnp.matmul)
        jax.block_until_ready(product(x, x))
        best = math.inf
        for _ in range(3):
            begun = time.perf_counter()
            jax.block_until_ready(product(x, x))
            best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
