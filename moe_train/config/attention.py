"""The kinds of attention: grouped-query attention and multi-head latent attention."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moe_train.config.section import Positive, PositiveFloat, Section, as_tuple


class QueryScaling(Section):
    """Query scaling of Llama 4: q *= 1 + beta * log(1 + floor(position / original_max_seq_len))."""

    beta: PositiveFloat
    """Strength of the scaling (`llama_4_scaling_beta`)."""
    original_max_seq_len: Positive
    """Number of tokens below which queries are not scaled."""


class GroupedQueryAttention(Section):
    """Grouped-query attention (GQA, arXiv:2305.13245); this is the default when `name` is left out."""

    name: Literal["gqa"] = "gqa"
    num_heads: Positive
    """Number N of query heads."""
    num_kv_heads: Positive
    """Number K of key and value heads, a divisor of `num_heads`; each serves num_heads / num_kv_heads query heads."""
    head_dim: Positive
    """Width H of a head; even."""
    windows: Annotated[tuple[Positive | None, ...], Field(min_length=1), BeforeValidator(as_tuple)] = (None,)
    """One period of layers: layer i uses entry i modulo the period. Null attends to all previous positions, a number W to the last
    W positions, including the current one. All numbers must be equal.
    """
    query_scaling: QueryScaling | None = None
    """Scaling of queries by position, as in Ministral 3; null for none."""

    @property
    def rotated_dims(self) -> int:
        """Number of dims of a query and key that the rotary position embedding rotates."""
        return self.head_dim

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; change either")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary embeddings rotate pairs of dims; use an even head_dim")
        return self


class MultiHeadLatentAttention(Section):
    """Multi-head latent attention (MLA, arXiv:2405.04434, section 2.1): keys and values are computed from a latent of low rank.

    A query and a key have `qk_nope_head_dim` dims without positions, then `qk_rope_head_dim` rotary dims.
    """

    name: Literal["mla"]
    num_heads: Positive
    """Number N of heads."""
    q_lora_rank: Positive | None = None
    """Rank of the queries' latent; null projects queries directly."""
    kv_lora_rank: Positive
    """Rank of the latent of keys and values."""
    qk_nope_head_dim: Positive
    """Dims of a query and key without positions."""
    qk_rope_head_dim: Positive
    """Rotary dims of a query and key; the rotary part of the key is shared by all heads."""
    v_head_dim: Positive
    """Dims of a value."""
    query_scaling: QueryScaling | None = None
    """Scaling of queries by position, as in Mistral Small 4; null for none."""
    scale_correction: Literal["none", "mscale_squared"] = "none"
    """`none` divides scores by the square root of the query's dims. `mscale_squared` also multiplies them by (1 + 0.1 *
    rope.mscale_all_dim * ln rope.factor)^2, as transformers does for files that state mscale_all_dim. Readers of one model may
    differ in this, so it is recorded, and exports are written so that their reader computes it.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} is odd, but rotary embeddings rotate pairs of dims; use an even one"
            )
        return self

    @property
    def rotated_dims(self) -> int:
        """Number of dims of a query and key that the rotary position embedding rotates."""
        return self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Dims of a query and of a key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def windows(self) -> tuple[None, ...]:
        """One period of windows, as for grouped-query attention: every layer attends to all previous positions."""
        return (None,)


def _with_name(value: object) -> object:
    """Name an attention section that has no name: grouped-query attention was the only kind in older configs."""
    return {"name": "gqa", **value} if isinstance(value, dict) and "name" not in value else value


Attention = Annotated[GroupedQueryAttention | MultiHeadLatentAttention, Field(discriminator="name"), BeforeValidator(_with_name)]
"""The tagged union of attention kinds."""


def require_grouped_query(attention: Attention, purpose: str) -> GroupedQueryAttention:
    """Return the section if it is grouped-query attention.

    Args:
        attention: the section.
        purpose: what needs it, for the message, such as "plan".

    Raises:
        ValueError: it is multi-head latent attention, which is not supported for this purpose yet.
    """
    if isinstance(attention, MultiHeadLatentAttention):
        raise ValueError(f"{purpose} is not supported for multi-head latent attention (attention.name mla) yet")
    return attention
