"""A layer, and a *stack*: one period of layers (interleaved windows make a period of several layers), repeated.

The weights of a stack have a leading dim of repeats and are run by `jax.lax.scan`, so that compile time does not grow with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from moe_train import config
from moe_train.model.attention.kinds import Cache, apply_attention, attention_layer
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.rope import Rotation
from moe_train.model.ffn import DenseFfn
from moe_train.model.layers import RandomSource, RMSNorm, keys_of
from moe_train.model.moe.layer import MoE
from moe_train.model.moe.router import RouterStats

SAVED = ("projection", "attention", "routing", "experts")
"""Names (`jax.ad_checkpoint.checkpoint_name`) of the values that are worth their memory in the backward pass.

Remat policy `minimal` saves these and no others.
"""


class Layer(nnx.Module):
    """A transformer layer: x + attention(norm(x)), then x + ffn(norm(x)).

    Args:
        rngs: PRNG streams for the weights.
        model: model section of the config.
        compute: dtypes, kernels and rematerialization.
        window: sliding window of the attention in tokens; None for full causal attention.
        ffn: the layer's feed-forward part, dense or sparse.
    """

    def __init__(self, rngs: RandomSource, model: config.Model, compute: config.Compute, window: int | None, ffn: config.Ffn):
        dtype = jnp.dtype(compute.param_dtype)
        self.attention_norm = RMSNorm(model.model_dim, model.norm_eps, dtype)
        self.attention = attention_layer(rngs, model, compute, window)
        self.ffn_norm = RMSNorm(model.model_dim, model.norm_eps, dtype)
        self.ffn = _feed_forward(rngs, model, compute, ffn)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: TokenPlaces,
        rotation: Rotation,
        cache: Cache | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterStats | None]:
        """Apply the layer.

        Args:
            x_BTD: hidden states.
            places: positions and segments of the tokens.
            rotation: rotation by these positions (`Transformer.rotation`).
            cache: what the attention keeps of earlier positions; None outside generation.
            key: PRNG key for the dropout of the adapters; None for no dropout.

        Returns:
            The hidden states, the extended cache or None, and the router's statistics or None in a dense layer.
        """
        attention_key, ffn_key = keys_of(key, 2)
        layer_input_BTD = x_BTD
        h_BTD = self.attention_norm(x_BTD)
        y_BTD, cache = apply_attention(self.attention, h_BTD, places, rotation, cache, attention_key)
        x_BTD += y_BTD
        h_BTD = self.ffn_norm(x_BTD)
        stats = None
        if isinstance(self.ffn, MoE):
            y_BTD, stats = self.ffn(h_BTD, places.segment_ids_BT, ffn_key, layer_input_BTD)
        else:
            y_BTD = self.ffn(h_BTD, ffn_key)
        return x_BTD + y_BTD, cache, stats


def _feed_forward(rngs: RandomSource, model: config.Model, compute: config.Compute, ffn: config.Ffn) -> MoE | DenseFfn:
    match ffn:
        case config.DenseFfn():
            return DenseFfn(rngs, model, compute, ffn.ffn_dim)
        case config.MoeFfn():
            return MoE(rngs, model, compute, ffn)
        case _:
            assert_never(ffn)


class Stack(nnx.Module):
    """One period of layers, repeated; every weight has a leading dim of repeats.

    Args:
        rngs: PRNG streams for the weights.
        model: model section of the config.
        compute: dtypes, kernels and rematerialization.
        stack: windows of the period's layers, their feed-forward part and the number of repeats.
    """

    def __init__(self, rngs: RandomSource, model: config.Model, compute: config.Compute, stack: config.LayerStack):
        keys: Shaped[Array, " P R"]
        if rngs is None:
            keys = jnp.zeros((stack.period, stack.repeats))
        else:
            keys = jax.random.split(rngs.params(), (stack.period, stack.repeats))

        def repeated(window: int | None, keys: Shaped[Array, " R"]) -> Layer:
            # vmap over the keys initializes all repeats at once, and stacks each weight on dim 0.
            return jax.vmap(lambda key: Layer(None if rngs is None else nnx.Rngs(key), model, compute, window, stack.ffn))(keys)

        self.layers = nnx.List([repeated(window, k) for window, k in zip(stack.windows, keys, strict=True)])
        self.remat = compute.remat

    @property
    def repeats(self) -> int:
        """Number of repeats of the period."""
        return jax.tree.leaves(self.layers)[0].shape[0]

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: TokenPlaces,
        rotation: Rotation,
        keys: Key[Array, " R"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Apply all layers of the stack.

        Args:
            x_BTD: hidden states.
            places: positions and segments of the tokens.
            rotation: rotation by these positions.
            keys: one PRNG key per repeat, for dropout; None for no dropout.

        Returns:
            The hidden states, and the statistics of the stack's routers (layers of the stack, …); None for dense layers.
        """

        def period(
            x_BTD: Float[Array, "B T D"], layers_of_repeat: tuple[Iterable[Layer], Int[Array, ""], Key[Array, ""] | None]
        ) -> tuple[Float[Array, "B T D"], list[RouterStats | None]]:
            layers, repeat, key = layers_of_repeat
            period_stats = []
            for layer, stacked, layer_key in zip(layers, self.layers, keys_of(key, len(self.layers)), strict=True):
                if isinstance(layer.ffn, MoE) and isinstance(stacked.ffn, MoE) and self.repeats > 1:
                    layer.ffn.read_in_stack(stacked.ffn, repeat, x_BTD.dtype)
                x_BTD, _, layer_stats = layer(x_BTD, places, rotation, None, layer_key)
                period_stats.append(layer_stats)
            return x_BTD, period_stats

        # One iteration of the scan is one repeat of the period: the scan slices weights and keys on dim 0.
        x_BTD, stats = jax.lax.scan(_rematerialized(period, self.remat), x_BTD, (self.layers, jnp.arange(self.repeats), keys))
        return x_BTD, _in_order_of_layers(stats)

    def decode(
        self,
        x_BTD: Float[Array, "B T D"],
        places: TokenPlaces,
        rotation: Rotation,
        caches: Sequence[Cache],
    ) -> tuple[Float[Array, "B T D"], Sequence[Cache]]:
        """Apply all layers to further tokens of sequences in a cache.

        Args:
            x_BTD: hidden states of the further tokens.
            places: positions in the sequences, -1 for padding, and segments, 0 for padding.
            rotation: rotation by these positions.
            caches: one cache per layer of the period, with a leading dim of repeats.

        Returns:
            The hidden states, and the extended caches.
        """

        def period(
            x_BTD: Float[Array, "B T D"], layers_and_caches: tuple[Iterable[Layer], Sequence[Cache]]
        ) -> tuple[Float[Array, "B T D"], list[Cache]]:
            layers, caches = layers_and_caches
            extended = []
            for layer, cache in zip(layers, caches, strict=True):
                x_BTD, new_cache, _ = layer(x_BTD, places, rotation, cache)
                assert new_cache is not None  # a layer extends the cache that it is given
                extended.append(new_cache)
            return x_BTD, extended

        if self.repeats == 1:
            # Without a loop there is no slice of the weights, which would be a copy (see `separate_layers`).
            x_BTD, extended = period(x_BTD, jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), (self.layers, caches)))
            return x_BTD, jax.tree.map(lambda x: jax.lax.expand_dims(x, (0,)), extended)
        return jax.lax.scan(period, x_BTD, (self.layers, caches))


def _rematerialized(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap a period of layers in `jax.checkpoint`; the values that `minimal` keeps are named where they are computed (SAVED)."""
    policies = jax.checkpoint_policies
    keep = {"minimal": policies.save_only_these_names(*SAVED), "full": policies.nothing_saveable}[policy]
    return jax.checkpoint(body, policy=keep)


def _in_order_of_layers(stats: list[RouterStats | None]) -> RouterStats | None:
    """Merge the statistics of the layers of a period, (repeats, …) each, into (L, …) in the order of the layers."""
    # Stacked as (repeats, period, …), so that flattening gives the order of layers. Dense layers have None, an empty pytree.
    return jax.tree.map(lambda *xs: jnp.stack(xs, axis=1).reshape(-1, *xs[0].shape[1:]), *stats)
