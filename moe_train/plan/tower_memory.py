"""Device memory of a tower and its projector in a training step, from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

from moe_train import config
from moe_train.plan.traffic import MicrobatchShape


class _TowerShape(NamedTuple):
    """Sizes of a tower, in numbers."""

    positions: int
    """Patches, or positions of spectrograms, of a microbatch on a device."""
    positions_per_token: int
    dim: int
    layer: int
    """Numbers of a position that a layer needs at its peak."""
    weights: int
    """Weights of a layer."""
    num_layers: int


def tower_bytes(run: config.Run, sizes: dict[str, int], shape: MicrobatchShape) -> int:
    """Return the bytes that a layer of a tower needs at its peak, at a time when the text model needs none for a layer."""
    tower = _shape_of(run, sizes["tensor"], shape)
    if tower is None:
        return 0
    layer = tower.layer
    weights = tower.weights
    if _trains_tower(run):  # each array of the forward pass has a gradient, and most are needed once more
        layer *= 3
        weights *= 2
    features = run.model.model_dim // tower.positions_per_token
    return (tower.positions * (layer + features) + weights) * shape.itemsize


def saved_tower_bytes(run: config.Run, shape: MicrobatchShape) -> int:
    """Return the bytes that a tower and its projector keep for the backward pass; 0 if they are frozen."""
    tower = _shape_of(run, 1, shape)
    if tower is None or not run.trains_tower:
        return 0
    # Of the projector: its input and the merged squares or joined positions, and both sides of its activation.
    saved = tower.positions * 2 * tower.dim + tower.positions // tower.positions_per_token * 2 * run.model.model_dim
    if _trains_tower(run):
        saved += (tower.num_layers + 1) * tower.positions * tower.dim  # inputs of the layers, and the first norm's
    return saved * shape.itemsize


def _shape_of(run: config.Run, tensor: int, shape: MicrobatchShape) -> _TowerShape | None:
    """Return the sizes of a run's tower on a device, with `tensor` devices along that axis; None without a tower."""
    media = run.computed_media
    if isinstance(media, config.RunAudio):
        audio = media.encoder
        D = audio.tower_dim
        positions = shape.tokens * media.chunks_per_row * audio.max_positions // run.train.seq_len
        # Of the second convolution: the first one's output at twice as many frames, and the windows of three. Of a layer: input,
        # norm, and either queries, keys, values and their sum, or the hidden layer before and after its activation.
        layer = max(2 * D + max(4 * D, 2 * audio.ffn_dim) // tensor, 5 * D)
        weights = (4 * D * D + 2 * D * audio.ffn_dim) // tensor
        return _TowerShape(positions, audio.downsampling, D, layer, weights, audio.num_layers)
    if media is None:  # no tower, or one whose features are stored
        return None
    vision = media.encoder
    D = vision.tower_dim
    patches = shape.tokens * media.patches_per_row // run.train.seq_len
    # Input, norm, and either queries, keys, values and their sum, or gate, up and their product.
    layer = 2 * D + max(4 * D, 3 * vision.ffn_dim) // tensor
    weights = (4 * D * D + 3 * D * vision.ffn_dim) // tensor
    return _TowerShape(patches, vision.patches_per_token, D, layer, weights, vision.num_layers)


def _trains_tower(run: config.Run) -> bool:
    """Return whether gradients flow into the tower, and not into its projector alone."""
    patterns = [*run.trained_tower, *(() if run.lora is None else run.lora.tower_patterns)]
    # A pattern such as `vision.*` reaches the tower too.
    return any(not pattern.startswith(("vision.projector.", "audio.projector.")) for pattern in patterns)
