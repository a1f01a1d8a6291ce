"""Model FLOPs of a run with a tower: those of the text model, and those of the tower for the pictures or sound of a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Shaped

from moe_train import config
from moe_train.model.flops import flops_per_token


def flops_of_run(run: config.Run, trained: Mapping[str, Shaped[Array, "..."] | jax.ShapeDtypeStruct] | None = None) -> float:
    """Return the model FLOPs per token of a training step of a resolved run, those of its tower for a full room included.

    Args:
        run: the resolved run.
        trained: as `adapters` of `flops_per_token`.
    """
    flops = flops_per_token(run.model, run.train.seq_len, trained)
    media = run.computed_media
    return flops if media is None else flops + flops_of_tower(run, media.units_per_row) / run.train.seq_len


def flops_of_tower(run: config.Run, units: int) -> float:
    """Return the model FLOPs of a run's tower for a row with room for `units` patches or chunks; 0 where no step runs a tower."""
    media = run.computed_media
    if media is None:
        return 0.0
    return tower_flops(media.encoder, run.model.model_dim, units, TrainedModules(run.lora, run.trained_tower))


class TrainedModules(NamedTuple):
    """What is trained of a tower and its projector."""

    lora: config.Lora | None = None
    patterns: tuple[str, ...] = ()
    """Those of full training (`vision.train` or `audio.train`)."""

    def in_full(self, module: str) -> bool:
        """Return whether a module such as `vision.projector.in_proj` is trained in full."""
        if self.lora is not None:
            return self.lora.trains_in_full(module)
        return any(config.names_module(pattern, module) for pattern in self.patterns)

    def rank(self, module: str) -> int:
        """Return the rank of a module's adapter; 0 without one."""
        targets = [] if self.lora is None else self.lora.targets_of(module, routed=False)
        return targets[0].rank if targets else 0


class _Product(NamedTuple):
    """A product with a weight of a tower or its projector."""

    module: str
    inputs: int
    outputs: int
    times: float
    """How often it is computed for a row."""


def tower_flops(encoder: config.Encoder, text_dim: int, count: int, trained: TrainedModules | None = None) -> float:
    """Return the model FLOPs of a tower and its projector for the patches or chunks of a row.

    Frozen parts before the first one that is trained have a forward pass alone. From there on the gradients of inputs take as much
    again, as do those of weights that are trained in full; adapters take three products more. The room of the row counts as full,
    with pictures of the largest size: how much of it pictures or sound fill depends on the data.

    Args:
        encoder: sizes of the tower.
        text_dim: width of the text model.
        count: patches, or chunks of sound, that the row has room for.
        trained: what is trained; None for nothing.
    """
    trained = TrainedModules() if trained is None else trained
    if isinstance(encoder, config.AudioEncoder):
        products = list(_audio_products(encoder, text_dim, count))
        positions = count * encoder.max_positions
        keys = encoder.max_positions
    else:
        products = list(_vision_products(encoder, text_dim, count))
        positions = count
        keys = min(count, (encoder.max_image_size // encoder.patch_size) ** 2)
    is_trained = [trained.in_full(product.module) or trained.rank(product.module) > 0 for product in products]
    first = is_trained.index(True) if any(is_trained) else len(products)
    in_layers = [i for i, product in enumerate(products) if ".tower.layers." in product.module]
    if first in in_layers:
        first = in_layers[0]  # gradients pass through all products of all layers but the first
    flops = 0.0
    for i, product in enumerate(products):
        passes = 1 + int(i >= first) + int(trained.in_full(product.module))
        flops += 2 * product.times * product.inputs * product.outputs * passes
        flops += 6 * product.times * trained.rank(product.module) * (product.inputs + product.outputs)
    tower_has_gradients = first <= in_layers[-1]
    # Scores and weighted values; the backward pass takes twice the forward pass.
    return flops + 2 * positions * encoder.num_layers * 2 * encoder.tower_dim * keys * (3 if tower_has_gradients else 1)


def _vision_products(encoder: config.VisionEncoder, text_dim: int, patches: int) -> Iterator[_Product]:
    """Yield the products with weights, from the pixels to the features."""
    D = encoder.tower_dim
    F = encoder.ffn_dim
    tokens = patches / encoder.patches_per_token
    yield _Product("vision.tower.patch_proj", encoder.patch_values, D, patches)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield _Product(f"vision.tower.layers.attention.{name}", D, D, patches * encoder.num_layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield _Product(f"vision.tower.layers.ffn.{name}", D, F, patches * encoder.num_layers)
    if encoder.merge_size:
        yield _Product("vision.projector.merge_proj", encoder.patches_per_token * D, D, tokens)
    yield _Product("vision.projector.in_proj", D, text_dim, tokens)
    yield _Product("vision.projector.out_proj", text_dim, text_dim, tokens)


def _audio_products(encoder: config.AudioEncoder, text_dim: int, chunks: int) -> Iterator[_Product]:
    """Yield the products with weights, from the spectrograms to the features."""
    D = encoder.tower_dim
    positions = chunks * encoder.max_positions
    # A convolution is a product with windows of three frames.
    yield _Product("audio.tower.first_conv", 3 * encoder.num_mel_bins, D, chunks * encoder.frames_per_chunk)
    yield _Product("audio.tower.second_conv", 3 * D, D, positions)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield _Product(f"audio.tower.layers.attention.{name}", D, D, positions * encoder.num_layers)
    for name in ("up_proj", "down_proj"):
        yield _Product(f"audio.tower.layers.{name}", D, encoder.ffn_dim, positions * encoder.num_layers)
    tokens = chunks * encoder.tokens_per_chunk
    yield _Product("audio.projector.in_proj", encoder.downsampling * D, text_dim, tokens)
    yield _Product("audio.projector.out_proj", text_dim, text_dim, tokens)
