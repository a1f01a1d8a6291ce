"""Device memory of a vision tower and its projector in a training step, from shapes alone."""

from __future__ import annotations

from moe_train import config
from moe_train.plan.traffic import MicrobatchShape


def vision_bytes(run: config.Run, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes that a layer of a vision tower needs at its peak, at a time when the text model needs none for a layer."""
    if run.pictures is None:
        return 0
    encoder = run.pictures.encoder
    patches = shape.tokens * run.pictures.patches_per_row // run.train.seq_len
    D = encoder.tower_dim
    t = sizes["tensor"]
    # Input, norm, and either queries, keys, values and their sum, or gate, up and their product; and the features.
    layer = 2 * D + max(4 * D, 3 * encoder.ffn_dim) // t
    features = run.model.model_dim // encoder.patches_per_token
    weights = (4 * D * D + 3 * D * encoder.ffn_dim) // t
    if _trains_tower(run):  # each array of the forward pass has a gradient, and most are needed once more
        layer *= 3
        weights *= 2
    return (patches * (layer + features) + weights) * shape.itemsize


def _trains_tower(run: config.Run) -> bool:
    """Return whether gradients flow into the vision tower, and not into its projector alone."""
    patterns: list[str] = [*run.trained_vision]
    if run.lora is not None:
        patterns += [*run.lora.train, *(pattern for target in run.lora.targets for pattern in target.modules)]
    # A pattern such as `vision.*` reaches the tower too.
    return any(pattern.startswith("vision.") and not pattern.startswith("vision.projector.") for pattern in patterns)


def saved_vision_bytes(run: config.Run, shape: MicrobatchShape) -> int:
    """Return the bytes that a vision tower and its projector keep for the backward pass; 0 if they are frozen."""
    if run.pictures is None or not run.trains_vision:
        return 0
    encoder = run.pictures.encoder
    patches = shape.tokens * run.pictures.patches_per_row // run.train.seq_len
    # Of the projector: its input and the merged squares, and both sides of its activation.
    saved = patches * 2 * encoder.tower_dim + patches // encoder.patches_per_token * 2 * run.model.model_dim
    if _trains_tower(run):
        saved += (encoder.num_layers + 1) * patches * encoder.tower_dim  # inputs of the layers, and the first norm's
    return saved * shape.itemsize
