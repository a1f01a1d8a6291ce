"""Numbers per token that a layer's attention computes, by what splits and keeps them: the basis of memory and traffic."""

from __future__ import annotations

from typing import NamedTuple, assert_never

from moe_train import config


class AttentionSizes(NamedTuple):
    """Numbers per token on all devices together, before `tensor` splits those of heads."""

    num_heads: int
    queries: int
    keys: int
    """Keys as the kernel takes them: of the key heads, or of all heads in multi-head latent attention."""
    values: int
    outputs: int
    """Weighted values of all heads, the input of the output projection."""
    latents: int
    """Results of projections into latents, which `tensor` does not split; 0 without latents."""
    expanded: int
    """Keys and values as they are projected from their latent, before the shared rotary part is joined to the keys; 0 without
    latents."""
    input_gradients: int
    """Gradients of inputs of projections to heads, which are summed over `tensor`."""
    key_latent: int
    """Latent and shared key that devices of `context` gather in place of keys and values; 0 without latents."""

    @property
    def projections_of_heads(self) -> int:
        """Results of projections to heads, which `tensor` splits."""
        return self.queries + (self.expanded or self.keys + self.values)


def attention_sizes(model: config.Model) -> AttentionSizes:
    """Return the sizes of a model's attention, which all layers share."""
    a = model.attention
    D = model.model_dim
    match a:
        case config.GroupedQueryAttention():
            queries = a.num_heads * a.head_dim
            keys = a.num_kv_heads * a.head_dim
            # The gradients of the inputs of three projections are summed.
            return AttentionSizes(a.num_heads, queries, keys, keys, queries, 0, 0, 3 * D, 0)
        case config.MultiHeadLatentAttention():
            N = a.num_heads
            into_kv_latent = a.kv_lora_rank + a.qk_rope_head_dim
            query_latent = a.q_lora_rank or 0
            return AttentionSizes(
                num_heads=N,
                queries=N * a.qk_head_dim,
                keys=N * a.qk_head_dim,
                values=N * a.v_head_dim,
                outputs=N * a.v_head_dim,
                latents=query_latent + into_kv_latent,
                expanded=N * (a.qk_nope_head_dim + a.v_head_dim),
                input_gradients=(query_latent or D) + into_kv_latent,
                key_latent=into_kv_latent,
            )
        case _:
            assert_never(a)
