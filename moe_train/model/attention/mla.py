"""The multi-head latent attention layer (MLA, arXiv:2405.04434, section 2.1) and its cache of latents.

Keys and values of all heads are computed from one latent of R numbers a token, and the rotary part of the key, of P numbers,
is shared by all heads:

    q        = q_b(norm(q_a(x)))               per head [nope | rope], or q_proj(x) without a latent for queries
    [c | r]  = kv_a(x)                         r is not normalized
    [k | v]  = kv_b(norm(c))                   per head
    scores   = s * (q_nope . k + rotate(q_rope) . rotate(r))
    y        = o(softmax(scores) v)

Rotary pairs are adjacent, (x[2i], x[2i + 1]), as in all files. Training computes keys and values of all heads. Decoding keeps
only norm(c) and rotate(r) and applies kv_b to queries and outputs instead of keys and values (the absorbed form), which is
the same sum in another order. Along the mesh axis `context` norm(c) and rotate(r) are all-gathered: keys and values of all
heads have many times as many numbers (26 in Mistral Small 4, 71 in Large 3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from moe_train import config
from moe_train.machine.mesh import axis_size
from moe_train.model.attention import rope
from moe_train.model.attention.cache import attend_slots, extend_values, value_spec
from moe_train.model.attention.context_parallel import gather_sequence
from moe_train.model.attention.kernels import attend
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.query_scaling import query_scale
from moe_train.model.layers import Linear, RandomSource, RMSNorm, keys_of
from moe_train.model.sharding import fsdp
from moe_train.model.sharding.specs import activation_spec, fsdp_axis, split_axes

LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms of both latents, whatever the model's `norm_eps`: transformers has it hard-wired."""
_HEADS = None
"""Mesh axis that splits the heads in a cache: none, since every head needs all numbers of a latent."""


class LatentCache(NamedTuple):
    """Cache of normalized latents and rotated shared keys, C = R + P numbers a token: slot s holds position s.

    Outside the loop over layers the array has a leading dim L.
    """

    latents_BKSC: Float[Array, "*L B 1 S C"]
    """All heads share the entries, like queries that share a single key head."""


class MultiHeadLatentAttention(nnx.Module):
    """Projections, latents, rotary position embedding and attention of one layer.

    Args:
        rngs: PRNG streams for the weights.
        model: model section of the config.
        attention: its attention section.
        compute: dtypes and kernels.
    """

    def __init__(
        self, rngs: RandomSource, model: config.Model, attention: config.MultiHeadLatentAttention, compute: config.Compute
    ):
        D = model.model_dim
        N = attention.num_heads
        Q = attention.q_lora_rank
        R = attention.kv_lora_rank
        H = attention.qk_head_dim
        W = attention.v_head_dim
        std = model.init_stddev
        dtype = jnp.dtype(compute.param_dtype)
        heads = split_axes(N)
        # `nnx.data` makes None a child of the pytree, which later may hold a module.
        self.q_proj: Linear | None = nnx.data(None)
        self.q_a_proj: Linear | None = nnx.data(None)
        self.q_a_norm: RMSNorm | None = nnx.data(None)
        self.q_b_proj: Linear | None = nnx.data(None)
        if Q is None:
            self.q_proj = Linear(rngs, "BTD,DNH->BTNH", (D, N, H), P("fsdp", heads, None), std, dtype)
        else:
            self.q_a_proj = Linear(rngs, "BTD,DQ->BTQ", (D, Q), P("fsdp", None), std, dtype)
            self.q_a_norm = RMSNorm(Q, LATENT_NORM_EPS, dtype)
            self.q_b_proj = Linear(rngs, "BTQ,QNH->BTNH", (Q, N, H), P(fsdp_axis(Q), heads, None), std, dtype)
        C = R + attention.qk_rope_head_dim
        U = attention.qk_nope_head_dim + W
        self.kv_a_proj = Linear(rngs, "BTD,DC->BTC", (D, C), P("fsdp", None), std, dtype)
        self.kv_a_norm = RMSNorm(R, LATENT_NORM_EPS, dtype)
        self.kv_b_proj = Linear(rngs, "BTR,RNU->BTNU", (R, N, U), P(fsdp_axis(R), heads, None), std, dtype)
        self.o_proj = Linear(rngs, "BTNW,NWD->BTD", (N, W, D), P(heads, None, "fsdp"), std, dtype)
        self.sizes = attention
        self.correction = rope.scale_correction(attention, model.rope)
        self.kernel = compute.attention

    @staticmethod
    def empty_cache(
        attention: config.MultiHeadLatentAttention, num_layers: int, batch_size: int, max_len: int, dtype: jnp.dtype
    ) -> LatentCache:
        """Return an empty cache for the `num_layers` layers of one place in the period, stacked on dim 0.

        Args:
            attention: attention section of the model config.
            num_layers: number of layers in the stack that share this place.
            batch_size: number of sequences.
            max_len: largest number of tokens of a sequence.
            dtype: dtype of the latents.
        """
        shape = (num_layers, batch_size, 1, max_len, attention.kv_lora_rank + attention.qk_rope_head_dim)
        return LatentCache(jnp.zeros(shape, dtype, out_sharding=P(None, *value_spec(_HEADS))))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: TokenPlaces,
        rotation: rope.Rotation,
        cache: LatentCache | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        """Attend within x, or, with a cache, continue the sequences in the cache with x.

        Args:
            x_BTD: normalized hidden states.
            places: positions and segments of the tokens; with a cache, only positions are used.
            rotation: rotation of the rotary dims by these positions.
            cache: latents of earlier positions; None to attend within x only.
            key: PRNG key for the dropout of the adapters; None for no dropout.

        Returns:
            The output (B, T, D), and the cache extended by the latents of x, or None without a cache.
        """
        q_key, kv_a_key, kv_b_key, o_key = keys_of(key, 4)
        q_BTNH = self._queries(x_BTD, places.positions_BT, rotation, q_key)
        compressed_BTC = self.kv_a_proj(x_BTD, kv_a_key)
        R = self.sizes.kv_lora_rank
        latent_BTR = self.kv_a_norm(compressed_BTC[..., :R])
        shared_BT1P = rope.rotate_interleaved(compressed_BTC[:, :, None, R:], rotation)
        if cache is None:
            k_BSNH, v_BSNW = self._keys_and_values_of_sequence(latent_BTR, shared_BT1P[:, :, 0], kv_b_key)
            y_BTNW = attend(q_BTNH, k_BSNH, v_BSNW, places, None, self.kernel)
        else:
            # Shared keys enter the cache rotated, so decoding rotates only the new ones.
            new_BT1C = jnp.concatenate([latent_BTR[:, :, None], shared_BT1P], axis=-1)
            cache = LatentCache(extend_values(cache.latents_BKSC, new_BT1C, places.positions_BT, _HEADS))
            y_BTNW = self._attend_latents(q_BTNH, cache, places.positions_BT)
        return self.o_proj(y_BTNW, o_key), cache

    def _queries(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        rotation: rope.Rotation,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "B T N H"]:
        """Return the queries with rotated last dims, times all factors on the scores but the inverse square root of H."""
        if self.q_proj is not None:
            q_BTNH = self.q_proj(x_BTD, key)
        else:
            assert self.q_a_proj is not None and self.q_a_norm is not None and self.q_b_proj is not None
            a_key, b_key = keys_of(key, 2)
            q_BTNH = self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BTD, a_key)), b_key)
        n = self.sizes.qk_nope_head_dim
        rotated_BTNP = rope.rotate_interleaved(q_BTNH[..., n:], rotation)
        q_BTNH = jnp.concatenate([q_BTNH[..., :n], rotated_BTNP], axis=-1)
        if self.sizes.query_scaling is not None:
            factor_BT11 = self.correction * query_scale(self.sizes.query_scaling, positions_BT)
            return q_BTNH * factor_BT11.astype(q_BTNH.dtype)
        return q_BTNH if self.correction == 1 else q_BTNH * jnp.asarray(self.correction, q_BTNH.dtype)

    def _keys_and_values_of_sequence(
        self, latent_BTR: Float[Array, "B T R"], shared_BTP: Float[Array, "B T P"], key: Key[Array, ""] | None
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N W"]]:
        """Return keys and values of all heads, of the whole sequence on each device of `context` (`gather_sequence`)."""
        # Dropout comes before the gather, so that the same numbers are dropped on every mesh.
        dropped_BTR = self.kv_b_proj.apply_dropout(latent_BTR, key)
        if axis_size("context") == 1:
            return self._keys_and_values(latent_BTR, dropped_BTR, shared_BTP)
        parts = [latent_BTR, shared_BTP]
        if dropped_BTR is not latent_BTR:
            parts.append(dropped_BTR)
        gathered_BSC = gather_sequence(jnp.concatenate(parts, axis=-1))
        R = self.sizes.kv_lora_rank
        C = R + self.sizes.qk_rope_head_dim
        latent_BSR = gathered_BSC[..., :R]
        dropped_BSR = latent_BSR if len(parts) == 2 else gathered_BSC[..., C:]
        # Saved for the backward pass, like the results of other projections, they would take memory for the whole sequence.
        return self._keys_and_values(latent_BSR, dropped_BSR, gathered_BSC[..., R:C], saved=False)

    def _keys_and_values(
        self,
        latent_BTR: Float[Array, "B T R"],
        dropped_BTR: Float[Array, "B T R"],
        shared_BTP: Float[Array, "B T P"],
        saved: bool = True,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N W"]]:
        """Return keys and values of all heads; every key ends with the shared rotary part.

        Args:
            latent_BTR: normalized latents.
            dropped_BTR: the same after the dropout of the adapter of kv_b.
            shared_BTP: rotated shared parts of the keys.
            saved: whether remat `minimal` keeps the results of kv_b for the backward pass.
        """
        heads_BTNU = self.kv_b_proj.apply(latent_BTR, dropped_BTR, saved)
        n = self.sizes.qk_nope_head_dim
        shape = (*heads_BTNU.shape[:-1], self.sizes.qk_rope_head_dim)
        # Created split over heads: its gradient is then summed on each device before it crosses devices.
        shared_BTNP = jnp.broadcast_to(shared_BTP[:, :, None], shape, out_sharding=activation_spec("BTNP"))
        return jnp.concatenate([heads_BTNU[..., :n], shared_BTNP], axis=-1), heads_BTNU[..., n:]

    def _attend_latents(
        self, q_BTNH: Float[Array, "B T N H"], cache: LatentCache, positions_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T N W"]:
        """Attend to the cache in the absorbed form: q . (k_b c) = (k_b^T q) . c, and sum_s w_s (v_b c_s) = v_b sum_s w_s c_s."""
        n = self.sizes.qk_nope_head_dim
        R = self.sizes.kv_lora_rank
        absorbed_BTNC = jnp.concatenate([self._into_latent(q_BTNH[..., :n]), q_BTNH[..., n:]], axis=-1)
        # Scores are divided by the square root of the width that `attend_slots` sees, C, where the layer's own is H.
        absorbed_BTNC *= jnp.asarray(math.sqrt(absorbed_BTNC.shape[-1] / q_BTNH.shape[-1]), q_BTNH.dtype)
        values_BKSC = cache.latents_BKSC
        # With all heads as rows, the product reads the latents as they are: the swap is no copy.
        keys_BKCS = jnp.swapaxes(values_BKSC, 2, 3)
        y_BTNR = attend_slots(absorbed_BTNC, keys_BKCS, values_BKSC[..., :R], positions_BT, None, _HEADS)
        return self._from_latent(y_BTNR)[..., n:]

    def _into_latent(self, q_BTNn: Float[Array, "B T N n"]) -> Float[Array, "B T N R"]:
        """Apply the transposed key part of kv_b to queries without their rotary part."""
        # Zeros in place of the value part select the key part without slicing the weight, which may be quantized.
        q_BTNU = jnp.pad(q_BTNn, ((0, 0), (0, 0), (0, 0), (0, self.sizes.v_head_dim)))
        y_BTNR = fsdp.project("BTNU,RNU->BTNR", q_BTNU, self.kv_b_proj.weight[...])
        adapter = self.kv_b_proj.adapter()
        if adapter is None:
            return y_BTNR
        a_RJ, b_JNU = adapter
        return y_BTNR + fsdp.project("BTNJ,RJ->BTNR", fsdp.project("BTNU,JNU->BTNJ", q_BTNU, b_JNU), a_RJ)

    def _from_latent(self, y_BTNR: Float[Array, "B T N R"]) -> Float[Array, "B T N U"]:
        """Apply kv_b to a latent of each head."""
        heads_BTNU = fsdp.project("BTNR,RNU->BTNU", y_BTNR, self.kv_b_proj.weight[...])
        adapter = self.kv_b_proj.adapter()
        if adapter is None:
            return heads_BTNU
        a_RJ, b_JNU = adapter
        return heads_BTNU + fsdp.project("BTNJ,JNU->BTNU", fsdp.project("BTNR,RJ->BTNJ", y_BTNR, a_RJ), b_JNU)
