"""Memory of one layer as XLA:GPU places it, fitted to programs that JAX 0.10.2 compiled for H100 without one.

The programs are in docs/measurements.md: Mixtral 8x7B, Mistral Small 4, Ministral 3 8B and Mistral 7B, trained in full and
by adapters of a base in 16 and 4 bits. Unlike XLA:TPU, it starts the gather of a matrix while another one is in use, and reuses
the space of fewer activations.
"""

from __future__ import annotations

from moe_train import config
from moe_train.plan.traffic import MicrobatchShape
from moe_train.plan.weights import ShardedWeight, numbers_per_element


def gpu_layer_bytes(
    run: config.Run, ffn: config.Ffn, stacked: list[ShardedWeight], sizes: dict[str, int], shape: MicrobatchShape
) -> int:
    """Return the bytes that the backward pass of one period of layers of one stack needs at its peak.

    Saved activations and gradients are not included.
    """
    b = shape.itemsize
    row = shape.rows * run.model.model_dim * b
    product = shape.rows * (ffn.ffn_dim // sizes["tensor"]) * b
    num_products, num_rows = _counts(run, ffn, stacked)
    activations = num_products * product + num_rows * row
    # cuDNN takes the mask of the attention as an array of (queries, keys) in the dtype of the queries.
    mask = shape.tokens * run.train.seq_len * b
    linear = 0
    for w in stacked:
        if w.kind == "linear" and not w.path.is_adapter and w.path.part != "scales":
            linear += w.elements(sizes, ("fsdp", "expert")) * numbers_per_element(w, run) * b
    matrices = [w for w in stacked if w.kind == "expert" and not w.path.is_adapter and w.path.part != "scales"]
    if not isinstance(ffn, config.MoeFfn) or not matrices:
        return activations + mask + linear
    gathered = sum(w.elements(sizes, ("fsdp",)) * numbers_per_element(w, run) * b for w in matrices)
    if any(w.path.part == "codes" for w in matrices):
        return activations + mask + linear + gathered // 3  # dequantized one matrix at a time
    ahead = gathered * 4 // 3  # of three matrices, and the one that is gathered ahead
    if not any(w.trainable for w in matrices):
        return activations + mask + linear + ahead
    # Either most activations are there, or the gradients of the matrices as well.
    return mask + linear + max(ahead + activations, 2 * ahead + 10 * product)


def _counts(run: config.Run, ffn: config.Ffn, stacked: list[ShardedWeight]) -> tuple[int, int]:
    """Return how many arrays of hidden activations, and of rows of model_dim, are there at the peak."""
    if run.compute.remat == "full":
        return (12, 4) if isinstance(ffn, config.MoeFfn) else (6, 6)
    # The saved results of gate and up are not among them; adapters need more of what follows.
    has_adapters = any(w.path.is_adapter and w.path.is_ffn for w in stacked)
    return (6, 6) if has_adapters else (3, 6)
