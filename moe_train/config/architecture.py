"""A transformer's architecture: attention, positions, feed-forward parts, and which families have what."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.families import FAMILIES, FEATURES, FamilyName, Feature, FileFormat, in_words
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


class GroupedQueryAttention(Section):
    """Grouped-query attention (arXiv:2305.13245), the kind that is meant where `name` is left out.

    `windows` is one period of layers: null sees everything before it, a number W sees the last W positions (itself
    included); layer i takes entry i modulo the period.
    """

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


Attention = GroupedQueryAttention
"""The tagged union of attentions, of one member so far. A second one joins here as `GroupedQueryAttention | …`, with a
discriminator that takes a missing `name` for gqa, and as a case in `model.attention.kinds.attention_class`."""


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


class DenseLayers(Section):
    """The first `count` layers of a sparse model have a dense SwiGLU of width ffn_dim in place of experts
    (`first_k_dense_replace` and `intermediate_size` of DeepSeek-V3, arXiv:2412.19437, section 4.2)."""

    count: Positive
    ffn_dim: Positive


class MoeFfn(Section):
    """Sparse SwiGLU experts of width ffn_dim, `experts_per_token` of them chosen by a router.

    num_shared_experts: further experts that every token takes (DeepSeekMoE, arXiv:2401.06066), computed together as one
    dense SwiGLU of their summed width. dense_layers: the first layers have no experts (null: all layers have).
    """

    name: Literal["moe"]
    ffn_dim: Positive
    num_experts: Positive
    experts_per_token: Positive
    router: Router = SoftmaxRouter(name="softmax")
    num_shared_experts: NonNegative = 0
    # Left out of dumps where there are none: files that hold a dump (GGUF) keep their bytes, and older readers read them.
    dense_layers: Annotated[DenseLayers | None, Field(exclude_if=lambda dense: dense is None)] = None

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

    family: FamilyName
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
        _check_periods(self)
        _check_family(self)
        if len({w for w in self.attention.windows if w is not None}) > 1:
            raise ValueError(f"attention.windows {list(self.attention.windows)} has several sizes; the family's layers share one")
        if isinstance(self.rope, YarnRope) and self.attention.query_scaling is not None:
            lengths = self.rope.original_max_seq_len, self.attention.query_scaling.original_max_seq_len
            if lengths[0] != lengths[1]:
                raise ValueError(f"original_max_seq_len is {lengths[0]} in rope, {lengths[1]} in query_scaling; they are the same")
        return self


def _check_periods(model: Model) -> None:
    """Raise ValueError unless each stack of layers is a whole number of periods."""
    period = len(model.attention.windows)
    if model.num_layers % period:
        raise ValueError(f"num_layers {model.num_layers} is not a multiple of the {period} attention.windows")
    dense = model.ffn.dense_layers if isinstance(model.ffn, MoeFfn) else None
    if dense is None:
        return
    if dense.count % period:
        raise ValueError(f"ffn.dense_layers.count {dense.count} is not a multiple of the {period} attention.windows")
    if dense.count >= model.num_layers:
        raise ValueError(f"ffn.dense_layers.count {dense.count} leaves no sparse layer of num_layers {model.num_layers}; lower it")


def _check_family(model: Model) -> None:
    """Raise ValueError where the model has something that its family does not have."""
    family = FAMILIES[model.family]
    if family.sparse != isinstance(model.ffn, MoeFfn):
        sparse = ", ".join(name for name, row in FAMILIES.items() if row.sparse)
        raise ValueError(f"family {model.family} does not have a {model.ffn.name} ffn; only {sparse} has, and needs, moe")
    excess = features(model) - family.features
    for feature, phrase in FEATURES.items():
        if feature in excess:
            owners = ", ".join(name for name, row in FAMILIES.items() if feature in row.features)
            raise ValueError(f"family {model.family} cannot have {phrase}; only {owners} can: leave it out")


def features(model: Model) -> frozenset[Feature]:
    """What a model has of the features that not every family, or not every file format, has."""
    attention, windows, ffn = model.attention, set(model.attention.windows), model.ffn
    present: dict[Feature, bool] = {
        "window": windows != {None},
        "interleaved_windows": len(windows) > 1,
        "yarn": isinstance(model.rope, YarnRope),
        "query_scaling": attention.query_scaling is not None,
        "tied_embeddings": model.tie_embeddings,
    }
    if isinstance(ffn, MoeFfn):
        present |= {
            "sigmoid_router": isinstance(ffn.router, SigmoidRouter),
            "router_bias": ffn.router.bias,
            "shared_experts": ffn.num_shared_experts > 0,
            "dense_layers": ffn.dense_layers is not None,
        }
    return frozenset(feature for feature, is_present in present.items() if is_present)


def without_format(model: Model, file_format: FileFormat | None = None) -> str | None:
    """What a model has that a file format (None: each format of its family) has no place for, in words.

    None for a model that can be exported.
    """
    formats = FAMILIES[model.family].formats
    considered = [name for name in formats if file_format in (name, None)]
    if not considered:
        return "the architecture"
    missing = [features(model) - formats[name] for name in considered]
    return in_words(min(missing, key=len))
