"""Pictures and sound as arrays: what the tower takes for each row, and the tokens that its features stand for."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_train.model.sharding.collectives import gather_axis
from moe_train.model.sharding.specs import activation_spec, place


class Media(NamedTuple):
    """The pictures or the sound of a batch: N patches or chunks in each row.

    N and T are split over `context`, B like the batch. Patches that merge to one token are neighbours, in the order of rows and
    columns inside their square. Units, and the tokens of their features, are in the order in which they stand in the row.
    """

    units: Float[Array, "B N *unit"]
    """The normalized pixels (C) of each patch: channel, row, column; or the log-mel spectrogram (F, M) of each chunk."""
    places_BN2: Int[Array, "B N 2"]
    """Row and column of each patch in its picture; not used for chunks."""
    ids_BN: Int[Array, "B N"]
    """Pictures, or chunks, of a row, numbered from 1; 0 for padding."""
    feature_index_BT: Int[Array, "B T"]
    """For a token that stands for a part of a picture or a chunk, the index of its feature in the row; -1 for all other tokens."""

    def placed(self) -> Media:
        """Return the arrays with the shardings of activations."""
        # Units stand where a text model has its tokens.
        return Media(
            place(self.units, "BTC" if self.units.ndim == 3 else "BTCM"),
            place(self.places_BN2, "BTC"),
            place(self.ids_BN, "BT"),
            place(self.feature_index_BT, "BT"),
        )


class Features(NamedTuple):
    """Features of pictures or sound that have been computed, and the tokens that they stand for."""

    features_BMD: Float[Array, "B M D"]
    feature_index_BT: Int[Array, "B T"]
    """Index of a token's feature in its row, as in `Media`."""

    def placed(self) -> Features:
        """Return the arrays with the shardings of activations; features are split over `context` like tokens."""
        return Features(place(self.features_BMD, "BTD"), place(self.feature_index_BT, "BT"))


def write_features(
    x_BTD: Float[Array, "B T D"], features_BMD: Float[Array, "B M D"], feature_index_BT: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Replace the embeddings of tokens that stand for parts of pictures or sound by their features.

    Args:
        x_BTD: embeddings.
        features_BMD: features of the pictures or the sound of each row.
        feature_index_BT: index of the feature of each token; -1 to keep the embedding.
    """
    spec = activation_spec("BTD")

    def local(x: Float[Array, "b t D"], features: Float[Array, "b m D"], index: Int[Array, "b t"]) -> Float[Array, "b t D"]:
        features = gather_axis(features, "context", 1)
        chosen = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
        return jnp.where((index >= 0)[..., None], chosen.astype(x.dtype), x)

    run = jax.shard_map(local, in_specs=(spec, spec, activation_spec("BT")), out_specs=spec)
    return run(x_BTD, features_BMD, feature_index_BT)
