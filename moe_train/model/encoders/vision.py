"""The Pixtral vision tower (arXiv:2410.07073) and the projector that makes rows for the text model of its patches.

In equations the patches of a row stand where a text model has its tokens: T is split over `context`. Letters: P patches, M = P / S²
tokens of pictures, S side of the square of patches that merge to one, D width of the tower, E that of the text model, N heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Shaped

from moe_train import config
from moe_train.model.attention.bidirectional import attend_segments, separated_padding
from moe_train.model.encoders.media import Media
from moe_train.model.encoders.rope_2d import rotate_2d
from moe_train.model.layers import Linear, RandomSource, RMSNorm, keys_of
from moe_train.model.sharding.specs import activation_spec, fsdp_axis, split_axes

TOWER_NORM_EPS = 1e-5
"""Constant of all norms of the tower, which no file states."""
_STDDEV = 0.02
_ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class PatchAttention(nnx.Module):
    """Attention among the patches of a picture, with rotary positions in two dimensions."""

    def __init__(self, rngs: RandomSource, encoder: config.VisionEncoder, compute: config.Compute):
        D = encoder.tower_dim
        N = encoder.num_heads
        H = D // N
        dtype = jnp.dtype(compute.param_dtype)
        by_heads = P(fsdp_axis(D), split_axes(N), None)
        self.q_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), by_heads, _STDDEV, dtype)
        self.k_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), by_heads, _STDDEV, dtype)
        self.v_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), by_heads, _STDDEV, dtype)
        self.o_proj = Linear(rngs, "BTNH,NHD->BTD", (N, H, D), P(split_axes(N), None, fsdp_axis(D)), _STDDEV, dtype)
        self.theta = encoder.theta
        self.kernel = compute.attention

    def __call__(
        self,
        x_BPD: Float[Array, "B P D"],
        places_BP2: Int[Array, "B P 2"],
        segments_BP: Int[Array, "B P"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B P D"]:
        """Attend within the pictures.

        Args:
            x_BPD: normalized hidden states.
            places_BP2: row and column of each patch.
            segments_BP: a patch sees only patches with its own segment id.
            key: PRNG key for the dropout of the adapters; None for no dropout.
        """
        q_key, k_key, v_key, o_key = keys_of(key, 4)
        q = rotate_2d(self.q_proj(x_BPD, q_key), places_BP2, self.theta)
        k = rotate_2d(self.k_proj(x_BPD, k_key), places_BP2, self.theta)
        return self.o_proj(attend_segments(q, k, self.v_proj(x_BPD, v_key), segments_BP, self.kernel), o_key)


class PatchFfn(nnx.Module):
    """Gated feed-forward layer: down(act(gate(x)) * up(x))."""

    def __init__(self, rngs: RandomSource, encoder: config.VisionEncoder, compute: config.Compute):
        D = encoder.tower_dim
        F = encoder.ffn_dim
        dtype = jnp.dtype(compute.param_dtype)
        self.gate_proj = Linear(rngs, "BTD,DF->BTF", (D, F), P(fsdp_axis(D), "tensor"), _STDDEV, dtype)
        self.up_proj = Linear(rngs, "BTD,DF->BTF", (D, F), P(fsdp_axis(D), "tensor"), _STDDEV, dtype)
        self.down_proj = Linear(rngs, "BTF,FD->BTD", (F, D), P("tensor", fsdp_axis(D)), _STDDEV, dtype)
        self.activation = encoder.activation

    def __call__(self, x_BPD: Float[Array, "B P D"], key: Key[Array, ""] | None = None) -> Float[Array, "B P D"]:
        """Apply the layer to normalized hidden states; `key` is for the dropout of the adapters."""
        gate_key, up_key, down_key = keys_of(key, 3)
        gate_BPF = _ACTIVATIONS[self.activation](self.gate_proj(x_BPD, gate_key))
        return self.down_proj(gate_BPF * self.up_proj(x_BPD, up_key), down_key)


class PatchLayer(nnx.Module):
    """A layer of the tower: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, rngs: RandomSource, encoder: config.VisionEncoder, compute: config.Compute):
        dtype = jnp.dtype(compute.param_dtype)
        self.attention_norm = RMSNorm(encoder.tower_dim, TOWER_NORM_EPS, dtype)
        self.attention = PatchAttention(rngs, encoder, compute)
        self.ffn_norm = RMSNorm(encoder.tower_dim, TOWER_NORM_EPS, dtype)
        self.ffn = PatchFfn(rngs, encoder, compute)

    def __call__(
        self,
        x_BPD: Float[Array, "B P D"],
        places_BP2: Int[Array, "B P 2"],
        segments_BP: Int[Array, "B P"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B P D"]:
        """Apply the layer; see `PatchAttention`."""
        attention_key, ffn_key = keys_of(key, 2)
        x_BPD += self.attention(self.attention_norm(x_BPD), places_BP2, segments_BP, attention_key)
        return x_BPD + self.ffn(self.ffn_norm(x_BPD), ffn_key)


class VisionTower(nnx.Module):
    """Patches to hidden states: a linear map of pixels, a norm and the layers, which are stacked on dim 0 and scanned."""

    def __init__(self, rngs: RandomSource, encoder: config.VisionEncoder, compute: config.Compute):
        D = encoder.tower_dim
        dtype = jnp.dtype(compute.param_dtype)
        # The convolution has its kernel's size as its stride, so it is a product with the pixels of each patch.
        self.patch_proj = Linear(rngs, "BTC,CD->BTD", (encoder.patch_values, D), P(None, fsdp_axis(D)), _STDDEV, dtype)
        self.patch_norm = RMSNorm(D, TOWER_NORM_EPS, dtype)
        keys: Shaped[Array, " L"] = (
            jnp.zeros(encoder.num_layers) if rngs is None else jax.random.split(rngs.params(), encoder.num_layers)
        )

        def layer_of(key: Shaped[Array, ""]) -> PatchLayer:
            return PatchLayer(None if rngs is None else nnx.Rngs(key), encoder, compute)

        self.layers = jax.vmap(layer_of)(keys)

    def __call__(self, pictures: Media, dtype: jnp.dtype, key: Key[Array, ""] | None = None) -> Float[Array, "B P D"]:
        """Return the hidden states of the last layer, without a norm, for patches with the shardings of activations.

        Args:
            pictures: pictures of each row.
            dtype: dtype of the computation.
            key: PRNG key for the dropout of the adapters; None for no dropout.
        """
        segments_BP = separated_padding(pictures.ids_BN)
        patch_key, layers_key = keys_of(key, 2)
        x_BPD = self.patch_norm(self.patch_proj(pictures.units.astype(dtype), patch_key))

        def layer_on(
            x_BPD: Float[Array, "B P D"], layer_and_key: tuple[PatchLayer, Key[Array, ""] | None]
        ) -> tuple[Float[Array, "B P D"], None]:
            layer, layer_key = layer_and_key
            return layer(x_BPD, pictures.places_BN2, segments_BP, layer_key), None

        num_layers = self.layers.attention_norm.scale.shape[0]
        keys = None if layers_key is None else jax.random.split(layers_key, num_layers)
        # Recomputed in the backward pass of a tower that is trained; a frozen one has none.
        return jax.lax.scan(jax.checkpoint(layer_on), x_BPD, (self.layers, keys))[0]


class BiasedLinear(Linear):
    """A linear map of rows, which may have a bias.

    Args:
        rngs: PRNG streams for the weight; the bias begins with zeros.
        inputs: width of the input.
        outputs: width of the output.
        dtype: dtype of weight and bias.
        has_bias: whether there is a bias.
    """

    def __init__(self, rngs: RandomSource, inputs: int, outputs: int, dtype: jnp.dtype, has_bias: bool):
        super().__init__(rngs, "BTC,CD->BTD", (inputs, outputs), P(None, fsdp_axis(outputs)), _STDDEV, dtype)
        self.bias = nnx.Param(jnp.zeros(outputs, dtype, out_sharding=P(None))) if has_bias else None

    def __call__(
        self, x: Float[Array, "B M C"], key: Key[Array, ""] | None = None, equation: str | None = None
    ) -> Float[Array, "B M D"]:
        """Apply the map; see `Linear`."""
        y = super().__call__(x, key, equation)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Projector(nnx.Module):
    """Hidden states of patches to rows of the text model: norm, merger of squares of patches, two linear maps."""

    def __init__(self, rngs: RandomSource, encoder: config.VisionEncoder, text_dim: int, compute: config.Compute):
        D = encoder.tower_dim
        dtype = jnp.dtype(compute.param_dtype)
        self.norm = RMSNorm(D, encoder.projector_norm_eps, dtype) if encoder.projector_norm else None
        self.cells = encoder.patches_per_token
        self.merge_proj = BiasedLinear(rngs, self.cells * D, D, dtype, False) if encoder.merge_size else None
        self.in_proj = BiasedLinear(rngs, D, text_dim, dtype, encoder.projector_bias)
        self.out_proj = BiasedLinear(rngs, text_dim, text_dim, dtype, encoder.projector_bias)

    def __call__(self, x_BPD: Float[Array, "B P D"], key: Key[Array, ""] | None = None) -> Float[Array, "B M E"]:
        """Return the features of the squares of patches; `key` is for the dropout of the adapters."""
        merge_key, in_key, out_key = keys_of(key, 3)
        if self.norm is not None:
            x_BPD = self.norm(x_BPD)
        if self.merge_proj is not None:
            x_BPD = self.merge_proj(_merged(x_BPD, self.cells), merge_key)
        return self.out_proj(jax.nn.gelu(self.in_proj(x_BPD, in_key), approximate=False), out_key)


def _merged(x_BPD: Float[Array, "B P D"], cells: int) -> Float[Array, "B M C"]:
    """Concatenate neighbouring patches, channel by channel: entry c * cells + i is channel c of patch i."""
    B, patches, D = x_BPD.shape
    spec = P(*activation_spec("BTD"), None)
    x_BMSD = jax.lax.reshape(x_BPD, (B, patches // cells, cells, D), out_sharding=spec)
    return jax.lax.reshape(x_BMSD.swapaxes(2, 3), (B, patches // cells, D * cells), out_sharding=activation_spec("BTD"))


class Vision(nnx.Module):
    """Tower and projector: pictures to the rows that take the place of their tokens' embeddings."""

    def __init__(self, rngs: RandomSource, encoder: config.VisionEncoder, text_dim: int, compute: config.Compute):
        self.tower = VisionTower(rngs, encoder, compute)
        self.projector = Projector(rngs, encoder, text_dim, compute)
        self.dtype = jnp.dtype(compute.dtype)

    def __call__(self, pictures: Media, key: Key[Array, ""] | None = None) -> Float[Array, "B M D"]:
        """Return the features of all pictures of each row, in the order of their tokens.

        Args:
            pictures: pictures of each row.
            key: PRNG key for the dropout of the adapters; None for no dropout.
        """
        tower_key, projector_key = keys_of(key, 2)
        return self.projector(self.tower(pictures, self.dtype, tower_key), projector_key)
