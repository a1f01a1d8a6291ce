"""Whisper's encoder (arXiv:2212.04356) and the projector that makes rows for the text model of its positions, as in Voxtral.

In equations the positions of all chunks of a row stand where a text model has its tokens: T = C * S is split over `context`.
Letters: C chunks, F frames of a chunk, M frequency bands, S = F / 2 positions of a chunk, D width of the tower, E that of the text
model, N heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, Shaped

from moe_train import config
from moe_train.config.audio import STRIDE
from moe_train.model.attention.bidirectional import attend_segments, separated_padding
from moe_train.model.encoders.media import Media
from moe_train.model.layers import Linear, RandomSource, keys_of, normal
from moe_train.model.sharding.specs import activation_spec, fsdp_axis, split_axes

NORM_EPS = 1e-5
"""Constant of all norms of the tower, which no file states."""
_STDDEV = 0.02
_TAPS = 3
"""Width of both convolutions, which pad by one on either side."""


class LayerNorm(nnx.Module):
    """Layer norm, (x - mean) / std * scale + bias, computed in float32 (arXiv:1607.06450)."""

    def __init__(self, dim: int, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((dim,), dtype, out_sharding=P(None)))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype, out_sharding=P(None)))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + NORM_EPS)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class BiasedProjection(Linear):
    """A linear map with a bias.

    Args:
        rngs: PRNG streams for the weight; the bias begins with zeros.
        equation: einsum of input and weight.
        shape: shape of the weight.
        spec: partition spec of the weight.
        dtype: dtype of weight and bias.
        outputs: letters of the bias, the dims that the map adds.
    """

    def __init__(self, rngs: RandomSource, equation: str, shape: tuple[int, ...], spec: P, dtype: jnp.dtype, outputs: str):
        super().__init__(rngs, equation, shape, spec, _STDDEV, dtype)
        self.bias = nnx.Param(jnp.zeros(shape[-len(outputs) :], dtype, out_sharding=P(*(None,) * len(outputs))))
        self.outputs = outputs

    def __call__(
        self, x: Float[Array, "..."], key: Key[Array, ""] | None = None, equation: str | None = None
    ) -> Float[Array, "..."]:
        """Apply the map; see `Linear`."""
        y = super().__call__(x, key, equation)
        return y + jax.sharding.reshard(self.bias[...].astype(y.dtype), activation_spec(self.outputs))


class ChunkAttention(nnx.Module):
    """Attention among the positions of a chunk; keys have no bias, which would cancel in the softmax."""

    def __init__(self, rngs: RandomSource, encoder: config.AudioEncoder, compute: config.Compute):
        D = encoder.tower_dim
        N = encoder.num_heads
        H = D // N
        dtype = jnp.dtype(compute.param_dtype)
        by_heads = P(fsdp_axis(D), split_axes(N), None)
        self.q_proj = BiasedProjection(rngs, "BTD,DNH->BTNH", (D, N, H), by_heads, dtype, "NH")
        self.k_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), by_heads, _STDDEV, dtype)
        self.v_proj = BiasedProjection(rngs, "BTD,DNH->BTNH", (D, N, H), by_heads, dtype, "NH")
        from_heads = P(split_axes(N), None, fsdp_axis(D))
        self.o_proj = BiasedProjection(rngs, "BTNH,NHD->BTD", (N, H, D), from_heads, dtype, "D")
        self.kernel = compute.attention

    def __call__(
        self, x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Attend within the chunks.

        Args:
            x_BTD: normalized hidden states.
            segments_BT: a position sees only positions with its own segment id.
            key: PRNG key for the dropout of the adapters; None for no dropout.
        """
        q_key, k_key, v_key, o_key = keys_of(key, 4)
        q = self.q_proj(x_BTD, q_key)
        k = self.k_proj(x_BTD, k_key)
        return self.o_proj(attend_segments(q, k, self.v_proj(x_BTD, v_key), segments_BT, self.kernel), o_key)


class AudioLayer(nnx.Module):
    """A layer of the tower: x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    def __init__(self, rngs: RandomSource, encoder: config.AudioEncoder, compute: config.Compute):
        D = encoder.tower_dim
        F = encoder.ffn_dim
        dtype = jnp.dtype(compute.param_dtype)
        self.attention_norm = LayerNorm(D, dtype)
        self.attention = ChunkAttention(rngs, encoder, compute)
        self.ffn_norm = LayerNorm(D, dtype)
        self.up_proj = BiasedProjection(rngs, "BTD,DF->BTF", (D, F), P(fsdp_axis(D), "tensor"), dtype, "F")
        self.down_proj = BiasedProjection(rngs, "BTF,FD->BTD", (F, D), P("tensor", fsdp_axis(D)), dtype, "D")

    def __call__(
        self, x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """Apply the layer; see `ChunkAttention`."""
        attention_key, up_key, down_key = keys_of(key, 3)
        x_BTD += self.attention(self.attention_norm(x_BTD), segments_BT, attention_key)
        hidden_BTF = jax.nn.gelu(self.up_proj(self.ffn_norm(x_BTD), up_key), approximate=False)
        return x_BTD + self.down_proj(hidden_BTF, down_key)


class AudioTower(nnx.Module):
    """Spectrograms to hidden states: two convolutions, positions, and the layers, which are stacked on dim 0 and scanned."""

    def __init__(self, rngs: RandomSource, encoder: config.AudioEncoder, compute: config.Compute):
        D = encoder.tower_dim
        dtype = jnp.dtype(compute.param_dtype)
        spec = P(None, fsdp_axis(D))
        # A convolution is a product with the frames of each window, one after the other.
        self.first_conv = BiasedProjection(rngs, "BTC,CD->BTD", (_TAPS * encoder.num_mel_bins, D), spec, dtype, "D")
        self.second_conv = BiasedProjection(rngs, "BTC,CD->BTD", (_TAPS * D, D), spec, dtype, "D")
        # In float32 whatever the dtype of the other weights, as transformers keeps them.
        self.positions = normal(rngs, (encoder.max_positions, D), P(None, None), _STDDEV, jnp.dtype(jnp.float32))
        keys: Shaped[Array, " L"] = (
            jnp.zeros(encoder.num_layers) if rngs is None else jax.random.split(rngs.params(), encoder.num_layers)
        )

        def layer_of(key: Shaped[Array, ""]) -> AudioLayer:
            return AudioLayer(None if rngs is None else nnx.Rngs(key), encoder, compute)

        self.layers = jax.vmap(layer_of)(keys)
        self.norm = LayerNorm(D, dtype)

    def __call__(self, sound: Media, dtype: jnp.dtype, key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Return the normalized hidden states of the last layer, for arrays with the shardings of activations.

        Args:
            sound: sound of each row.
            dtype: dtype of the computation.
            key: PRNG key for the dropout of the adapters; None for no dropout. In the adapters of convolutions it drops entries of
                windows, where PEFT drops those of frames, which are in up to three windows.
        """
        S = self.positions.shape[0]
        first_key, second_key, layers_key = keys_of(key, 3)
        frames_BTW = _windows(sound.units.astype(dtype), 1)
        x_BTD = jax.nn.gelu(self.first_conv(frames_BTW, first_key), approximate=False)
        x_BTW = _windows(_split_chunks(x_BTD, STRIDE * S), STRIDE)
        x_BTD = jax.nn.gelu(self.second_conv(x_BTW, second_key), approximate=False)
        x_BCSD = _split_chunks(x_BTD.astype(jnp.float32), S) + self.positions[...]
        x_BTD = _join_chunks(x_BCSD).astype(dtype)
        ids_BCS = jnp.broadcast_to(sound.ids_BN[..., None], (*sound.ids_BN.shape, S))
        segments_BT = separated_padding(_join_chunks(ids_BCS))

        def layer_on(
            x_BTD: Float[Array, "B T D"], layer_and_key: tuple[AudioLayer, Key[Array, ""] | None]
        ) -> tuple[Float[Array, "B T D"], None]:
            layer, layer_key = layer_and_key
            return layer(x_BTD, segments_BT, layer_key), None

        num_layers = self.layers.attention_norm.scale.shape[0]
        keys = None if layers_key is None else jax.random.split(layers_key, num_layers)
        # Recomputed in the backward pass of a tower that is trained; a frozen one has none.
        return self.norm(jax.lax.scan(jax.checkpoint(layer_on), x_BTD, (self.layers, keys))[0])


def _windows(x_BCFM: Float[Array, "B C F M"], stride: int) -> Float[Array, "B T W"]:
    """Return the frames of each window of a convolution, one after the other, for the positions of all chunks of a row."""

    def local(x: Float[Array, "b c F M"]) -> Float[Array, "b t W"]:
        length = x.shape[2]
        padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
        taps = [padded[:, :, tap : tap + length : stride] for tap in range(_TAPS)]
        joined = jnp.concatenate(taps, axis=-1)
        return joined.reshape(x.shape[0], -1, joined.shape[-1])

    spec = activation_spec("BTC")
    return jax.shard_map(local, in_specs=P(*spec, None), out_specs=spec)(x_BCFM)


def _split_chunks(x_BTD: Shaped[Array, "B T D"], length: int) -> Shaped[Array, "B C S D"]:
    """Split the positions of a row into chunks of `length`."""
    B, T, D = x_BTD.shape
    return jax.lax.reshape(x_BTD, (B, T // length, length, D), out_sharding=P(*activation_spec("BT"), None, None))


def _join_chunks(x: Shaped[Array, "B C S *dims"]) -> Shaped[Array, "B T *dims"]:
    """Put the positions of the chunks of a row one after the other."""
    B, C, S, *dims = x.shape
    return jax.lax.reshape(x, (B, C * S, *dims), out_sharding=P(*activation_spec("BT"), *(None,) * len(dims)))


class AudioProjector(nnx.Module):
    """Hidden states to rows of the text model: neighbouring positions concatenated, and two linear maps without biases."""

    def __init__(self, rngs: RandomSource, encoder: config.AudioEncoder, text_dim: int, compute: config.Compute):
        width = encoder.downsampling * encoder.tower_dim
        dtype = jnp.dtype(compute.param_dtype)
        spec = P(None, fsdp_axis(text_dim))
        self.downsampling = encoder.downsampling
        self.in_proj = Linear(rngs, "BTC,CD->BTD", (width, text_dim), spec, _STDDEV, dtype)
        self.out_proj = Linear(rngs, "BTC,CD->BTD", (text_dim, text_dim), spec, _STDDEV, dtype)

    def __call__(self, x_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None) -> Float[Array, "B M E"]:
        """Return the features of the tokens; `key` is for the dropout of the adapters."""
        in_key, out_key = keys_of(key, 2)
        B, T, D = x_BTD.shape
        shape = (B, T // self.downsampling, self.downsampling * D)
        x_BMC = jax.lax.reshape(x_BTD, shape, out_sharding=activation_spec("BTC"))
        return self.out_proj(jax.nn.gelu(self.in_proj(x_BMC, in_key), approximate=False), out_key)


class Audio(nnx.Module):
    """Tower and projector: sound to the rows that take the place of their tokens' embeddings."""

    def __init__(self, rngs: RandomSource, encoder: config.AudioEncoder, text_dim: int, compute: config.Compute):
        self.tower = AudioTower(rngs, encoder, compute)
        self.projector = AudioProjector(rngs, encoder, text_dim, compute)
        self.dtype = jnp.dtype(compute.dtype)

    def __call__(self, sound: Media, key: Key[Array, ""] | None = None) -> Float[Array, "B M E"]:
        """Return the features of all chunks of each row, in the order of their tokens.

        Args:
            sound: sound of each row.
            key: PRNG key for the dropout of the adapters; None for no dropout.
        """
        tower_key, projector_key = keys_of(key, 2)
        return self.projector(self.tower(sound, self.dtype, tower_key), projector_key)
