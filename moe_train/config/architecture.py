"""A transformer's architecture: attention, positions, feed-forward parts, and which families have what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.section import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class DefaultRope(Section):
    """Rotary positions, arXiv:2104.09864: angle = position * theta ** (-2i / head_dim), half-split order."""

    name: Literal["default"]
    theta: PositiveFloat = 1e6


class YarnRope(Section):
    """YaRN, arXiv:2309.00071: low frequencies interpolated by `factor`, high ones kept, a ramp between."""

    name: Literal["yarn"]
    theta: PositiveFloat = 1e6
    factor: PositiveFloat
    original_max_seq_len: Positive
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 1.0


Rope = Annotated[DefaultRope | YarnRope, Field(discriminator="name")]


class QueryScaling(Section):
    """Llama-4 query scaling: q *= 1 + beta * log(1 + floor(position / original_max_seq_len))."""

    beta: PositiveFloat
    original_max_seq_len: Positive


class Attention(Section):
    """Grouped-query attention. `windows` is one period of layers: null sees everything before it, a number W
    sees the last W positions (itself included); layer i takes entry i modulo the period."""

    name: Literal["gqa"] = "gqa"
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    windows: Annotated[tuple[Positive | None, ...], Field(min_length=1)] = (None,)
    query_scaling: QueryScaling | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs; use an even head_dim")
        return self


class DenseFfn(Section):
    """SwiGLU: down(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    name: Literal["dense"]
    ffn_dim: Positive


class SoftmaxRouter(Section):
    """Weights are the softmax over the logits of the chosen experts (Mixtral, arXiv:2401.04088).

    bias: of each expert, added to its probability where experts are chosen and nowhere else; not learned, but moved after
    each step towards an even load, by `loss.bias_update_rate` (arXiv:2408.15664).
    """

    name: Literal["softmax"]
    bias: bool = False


class SigmoidRouter(Section):
    """Weights are the sigmoids of the chosen experts' logits, divided by their sum, times `scale` (DeepSeek-V3,
    arXiv:2412.19437, eq. 12 to 16). bias: as a softmax router's, added to the sigmoid.

    num_groups, groups_per_token: the experts stand in groups, one after the other, and a token chooses among those of the
    groups whose two best (biases included) sum to most (section 2.1.2 there).
    """

    name: Literal["sigmoid"]
    bias: bool = False
    scale: PositiveFloat = 1.0
    num_groups: Positive = 1
    groups_per_token: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token {self.groups_per_token} exceeds num_groups {self.num_groups}")
        if self.groups_per_token == self.num_groups > 1:
            raise ValueError(f"groups_per_token {self.groups_per_token} is all of num_groups, which limits nothing; leave both out")
        return self


Router = Annotated[SoftmaxRouter | SigmoidRouter, Field(discriminator="name")]


class MoeFfn(Section):
    """Sparse SwiGLU experts of width ffn_dim, `experts_per_token` of them chosen by a router. Beside them stand
    `num_shared_experts` that every token takes (DeepSeekMoE, arXiv:2401.06066): together one dense SwiGLU, as wide as they."""

    name: Literal["moe"]
    ffn_dim: Positive
    num_experts: Positive
    experts_per_token: Positive
    router: Router = SoftmaxRouter(name="softmax")
    num_shared_experts: NonNegative = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        if isinstance(self.router, SigmoidRouter) and self.router.num_groups > 1:
            G, size = self.router.num_groups, self.num_experts // self.router.num_groups
            if self.num_experts % G or size < 2:
                raise ValueError(f"router.num_groups {G} does not divide num_experts {self.num_experts} into groups of two or more")
            if (within := self.router.groups_per_token * size) < self.experts_per_token:
                raise ValueError(f"experts_per_token {self.experts_per_token} exceeds the {within} experts of a token's groups")
        return self


Ffn = Annotated[DenseFfn | MoeFfn, Field(discriminator="name")]


class Model(Section):
    """A transformer's architecture. Sizes by their letters: vocab_size V, model_dim D, ffn_dim F, head_dim H."""

    family: Literal["mistral", "mixtral", "ministral", "ministral3", "llama"]
    vocab_size: Positive
    model_dim: Positive
    num_layers: Positive
    attention: Attention
    ffn: Ffn
    rope: Rope = DefaultRope(name="default")
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    max_seq_len: Positive = 32768
    init_stddev: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        period = len(self.attention.windows)
        if self.num_layers % period:
            raise ValueError(f"num_layers {self.num_layers} is not a multiple of the {period} attention.windows")
        if (self.family == "mixtral") != isinstance(self.ffn, MoeFfn):
            raise ValueError(f"family {self.family} does not have a {self.ffn.name} ffn; only mixtral has, and needs, moe")
        wants_yarn = self.family == "ministral3"
        if isinstance(self.rope, YarnRope) and not wants_yarn:
            raise ValueError(f"family {self.family} has no yarn rope; only ministral3 has")
        if self.attention.query_scaling and not wants_yarn:
            raise ValueError(f"family {self.family} has no attention.query_scaling; only ministral3 has")
        if len(set(self.attention.windows)) > 1 and self.family != "ministral":
            raise ValueError(f"family {self.family} has one window for all layers; interleaved windows are ministral's")
        if len({w for w in self.attention.windows if w is not None}) > 1:
            raise ValueError(f"attention.windows {list(self.attention.windows)} has several sizes; the family's layers share one")
        if isinstance(self.rope, YarnRope) and self.attention.query_scaling is not None:
            lengths = self.rope.original_max_seq_len, self.attention.query_scaling.original_max_seq_len
            if lengths[0] != lengths[1]:
                raise ValueError(f"original_max_seq_len is {lengths[0]} in rope, {lengths[1]} in query_scaling; they are the same")
        if self.family == "llama" and self.attention.windows != (None,):
            raise ValueError("family llama has no attention window; leave attention.windows out")
        return self


def without_format(model: Model) -> str | None:
    """What a model has that no file format of its family has a place for; None for one that can be exported."""
    if not isinstance(model.ffn, MoeFfn):
        return None
    router, shared = model.ffn.router, model.ffn.num_shared_experts
    has = {f"a {router.name} router": router.name != "softmax", "a router bias": router.bias, "shared experts": shared > 0}
    return " and ".join(what for what, is_there in has.items() if is_there) or None
