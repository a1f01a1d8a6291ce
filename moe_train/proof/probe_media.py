"""Features of a probe picture or of probe sound: what the tower in the files of an export makes of it, compared with the base's or
the trained tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_train import config
from moe_train.machine.mesh import BATCH
from moe_train.model.encoders.media import Media
from moe_train.model.parameters import Parameters, combine_some, parameters
from moe_train.model.paths import ParameterPath
from moe_train.model.transformer import abstract_model
from moe_train.proof.carried import CarriedFrom
from moe_train.proof.checks import Fault, Finding, MetricValue, NotChecked
from moe_train.proof.round_weights import round_weights
from moe_train.weights import arrays, external
from moe_train.weights.arrays import LazyParameters

Encoder = config.VisionEncoder | config.AudioEncoder
"""The sizes of a tower and its projector."""
TOKENS = (2, 3)
"""Rows and columns of tokens of the probe picture: two sides, so that rows and columns cannot be confused."""
STORED_NUMBERS = 8
"""Numbers of each feature that the record keeps."""


class Tower(NamedTuple):
    """A vision or audio tower with its projector, and the text model whose width the features have."""

    encoder: Encoder
    model: config.Model
    lora: config.Lora | None = None
    """The section of the adapters of the tower; None without any."""

    def shapes(self) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
        """Return the structure of the whole model, in float32 with plain kernels, and the shapes of the tower's weights."""
        compute = config.Compute(dtype="float32", param_dtype="float32", attention="reference", grouped_matmul="blocked")
        structure, shapes = parameters(abstract_model(self.model, compute, None, self.encoder))
        return structure, {path: like for path, like in shapes.items() if ParameterPath.parse(path).is_tower}


def check_features(
    directory: Path, origin: CarriedFrom, tower: Tower, trained: LazyParameters, dtype: str, tolerance: float | None
) -> tuple[Finding, np.ndarray]:
    """Compare the features of the files with those of the base's tower, with the trained weights in place of the base's.

    Args:
        directory: the export.
        origin: the base.
        tower: the tower of both.
        trained: trained weights and adapters of the tower; empty for a frozen one.
        dtype: dtype of trained tensors in the files.
        tolerance: largest difference over the largest feature; None for only a measurement.

    Returns:
        What was found, and the features of the files.

    Raises:
        Fault: the features differ.
    """
    _, shapes = tower.shapes()
    loaded = external.load_external_parameters(origin.base, shapes)
    if trained:
        rounded = jnp.dtype({"fp8": "bfloat16"}.get(dtype, dtype))
        merged = round_weights(arrays.read_lazy(trained), tower.lora, rounded)
        loaded |= {path: x.astype(jnp.float32) for path, x in merged.items()}
    expected = probe_features(tower, loaded)
    features = features_of_files(directory, tower)
    source = "the trained tower" if trained else f"the tower of {origin.base}"
    return _compare(features, expected, tower, source, tolerance), features


def check_features_again(directory: Path, tower: Tower, recorded: list[list[float]], tolerance: float) -> Finding:
    """Compare the features of the files with those in the record of the export. Raises Fault if they differ."""
    features = features_of_files(directory, tower)[:, :STORED_NUMBERS]
    return _compare(features, np.asarray(recorded), tower, "the export", tolerance)


def features_of_files(directory: Path, tower: Tower) -> np.ndarray:
    """Return the features of the probe through the tower in the files of a model."""
    _, shapes = tower.shapes()
    return probe_features(tower, external.load_external_parameters(directory, shapes))


def encoder_in_files(directory: Path) -> Encoder:
    """Return the sizes of the tower in the files of a model. Raises NotChecked if there is none that can be computed."""
    encoder = external.find_encoder(directory)
    if encoder is None:
        raise NotChecked("the files have no tower that can be computed: none, or a quantized one")
    return encoder


def probe_features(tower: Tower, weights: Mapping[str, jax.Array]) -> np.ndarray:
    """Return the features (tokens, width) of the probe in float32, on the mesh in force."""
    structure, _ = tower.shapes()
    mesh = jax.sharding.get_mesh()
    context = mesh.shape["context"]
    encoder = tower.encoder
    probe = _random_sound(encoder, context) if isinstance(encoder, config.AudioEncoder) else _random_picture(encoder, context)
    rows = math.prod(mesh.shape[axis] for axis in BATCH)
    media = Media(*(np.tile(x, (rows, *(1,) * x.ndim)) for x in probe))  # type: ignore[arg-type]
    # By default a TPU rounds the operands of float32 products to bfloat16.
    with jax.default_matmul_precision("highest"):
        features = _features(structure, dict(weights), media)
    return np.asarray(features)[: encoder.num_features(int(np.count_nonzero(probe.ids)))]


@partial(jax.jit, static_argnums=0)
def _features(structure: Any, weights: Parameters, media: Media) -> jax.Array:
    model = combine_some(structure, weights)
    return jax.sharding.reshard(model.media_features(media.placed()), jax.sharding.PartitionSpec())[0]


class _Probe(NamedTuple):
    """The fields of `Media` for one row, as NumPy arrays."""

    units: np.ndarray
    places: np.ndarray
    ids: np.ndarray
    feature_index: np.ndarray


def _random_picture(encoder: config.VisionEncoder, context: int) -> _Probe:
    """Return a picture of random pixels, padded to patches that divide over the axis `context`."""
    side = encoder.cell_size
    height, width = TOKENS
    patches = height * width * encoder.patches_per_token
    multiple = context * encoder.patches_per_token
    padded = -(-patches // multiple) * multiple
    places = np.zeros((padded, 2), np.int32)
    # Patches of a token are neighbours, so places count through the square of each token in turn.
    grid = np.stack(np.meshgrid(np.arange(height * side), np.arange(width * side), indexing="ij"), axis=-1)
    places[:patches] = grid.reshape(height, side, width, side, 2).swapaxes(1, 2).reshape(-1, 2)
    ids = (np.arange(padded) < patches).astype(np.int32)
    return _Probe(_random(padded, encoder), places, ids, _no_tokens(context))


def _random_sound(encoder: config.AudioEncoder, context: int) -> _Probe:
    """Return a chunk of random sound, padded to chunks that divide over the axis `context`."""
    ids = (np.arange(context) == 0).astype(np.int32)
    return _Probe(_random(context, encoder), np.zeros((context, 2), np.int32), ids, _no_tokens(context))


def _random(units: int, encoder: Encoder) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(units, *encoder.unit_shape)).astype(np.float32)


def _no_tokens(context: int) -> np.ndarray:
    """Return the index of features for a row without tokens, since only the features are compared."""
    return np.full(context, -1, np.int32)


def _compare(features: np.ndarray, expected: np.ndarray, tower: Tower, source: str, tolerance: float | None) -> Finding:
    """Compare features. Raises Fault if they differ by more than the tolerance."""
    probe = "probe sound" if isinstance(tower.encoder, config.AudioEncoder) else "a probe picture"
    largest = float(np.abs(expected).max())
    difference = float(np.abs(features - expected).max()) / max(largest, 1e-30)
    metrics: dict[str, MetricValue] = {"tolerance": tolerance, "features": difference, "tokens": len(features)}
    if not math.isfinite(difference) or (tolerance is not None and not difference <= tolerance):
        raise Fault(f"features of {probe} are off by {difference:.3g} of the largest; the tolerance is {tolerance}")
    return Finding(
        f"features of {probe} ({len(features)} tokens) are those of {source}, off by {difference:.1e} of the largest", metrics
    )
