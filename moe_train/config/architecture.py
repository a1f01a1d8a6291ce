"""The architecture of a transformer: positions, feed-forward layers, and the features that a model uses."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from moe_train.config.attention import Attention, MultiHeadLatentAttention
from moe_train.config.families import FAMILIES, FEATURES, FamilyName, Feature, FileFormat, describe_features
from moe_train.config.section import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class DefaultRope(Section):
    """Rotary position embeddings (RoPE, arXiv:2104.09864): angle = position * theta ** (-2i / head_dim), half-split order."""

    name: Literal["default"]
    theta: PositiveFloat = 1e6


class YarnRope(Section):
    """YaRN context extension (arXiv:2309.00071).

    Low frequencies are interpolated by `factor`, high frequencies are kept, and a linear ramp joins the two ranges.
    """

    name: Literal["yarn"]
    theta: PositiveFloat = 1e6
    factor: PositiveFloat
    original_max_seq_len: Positive
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 1.0


Rope = Annotated[DefaultRope | YarnRope, Field(discriminator="name")]
"""The tagged union of position embeddings."""


class DenseFfn(Section):
    """A dense SwiGLU feed-forward layer: down(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    name: Literal["dense"]
    ffn_dim: Positive


class SoftmaxRouter(Section):
    """A router whose weights are the softmax over the logits of the selected experts (Mixtral, arXiv:2401.04088).

    bias: one value per expert, added to its probability for the selection of experts only, never to the weights. It is not
    learned by gradient: `loss.bias_update_rate` sets how far each step moves it towards an even load (arXiv:2408.15664).
    scale: factor on the weights, `routed_scaling_factor` of Mistral Small 4.
    """

    name: Literal["softmax"]
    bias: bool = False
    # A dump omits this key at its default: files that store a dump (GGUF) keep their bytes, and older readers still read them.
    scale: Annotated[PositiveFloat, Field(exclude_if=lambda scale: scale == 1)] = 1.0


class SigmoidRouter(Section):
    """A router whose weights are the sigmoids of the selected experts' logits, divided by their sum, times `scale`.

    This is the router of DeepSeek-V3 (arXiv:2412.19437, eq. 12 to 16). bias: as for the softmax router, added to the sigmoid.

    num_groups, groups_per_token: the experts form `num_groups` consecutive groups. A token selects only among the experts of its
    `groups_per_token` best groups, where the score of a group is the sum of its two best experts, biases included (section 2.1.2
    of the paper).
    """

    name: Literal["sigmoid"]
    bias: bool = False
    scale: PositiveFloat = 1.0
    num_groups: Positive = 1
    groups_per_token: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token {self.groups_per_token} exceeds num_groups {self.num_groups}; lower it")
        if self.groups_per_token == self.num_groups > 1:
            raise ValueError(f"groups_per_token {self.groups_per_token} equals num_groups, so it limits nothing; leave both out")
        return self


Router = Annotated[SoftmaxRouter | SigmoidRouter, Field(discriminator="name")]
"""The tagged union of routers."""


class DenseLayers(Section):
    """Dense first layers of a sparse model: the first `count` layers have a dense SwiGLU of width ffn_dim in place of experts.

    These are `first_k_dense_replace` and `intermediate_size` of DeepSeek-V3 (arXiv:2412.19437, section 4.2).
    """

    count: Positive
    ffn_dim: Positive


class MoeFfn(Section):
    """A sparse feed-forward layer: SwiGLU experts of width ffn_dim, of which a router selects `experts_per_token` for each token.

    num_shared_experts: additional experts that process every token (DeepSeekMoE, arXiv:2401.06066), computed together as one
    dense SwiGLU of their summed width. dense_layers: the first layers, which have no experts (null: all layers have experts).
    """

    name: Literal["moe"]
    ffn_dim: Positive
    num_experts: Positive
    experts_per_token: Positive
    router: Router = SoftmaxRouter(name="softmax")
    num_shared_experts: NonNegative = 0
    # A dump omits this key when it is null: files that store a dump (GGUF) keep their bytes, and older readers still read them.
    dense_layers: Annotated[DenseLayers | None, Field(exclude_if=lambda dense: dense is None)] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}; lower it")
        if isinstance(self.router, SigmoidRouter) and self.router.num_groups > 1:
            G = self.router.num_groups
            size = self.num_experts // self.router.num_groups
            # The score of a group is the sum of its two best experts, so it needs two.
            if self.num_experts % G or size < 2:
                raise ValueError(
                    f"router.num_groups {G} does not divide num_experts {self.num_experts} into groups of two or more; "
                    "use a smaller divisor of num_experts"
                )
            # The groups of a token have to offer enough experts.
            reachable = self.router.groups_per_token * size
            if reachable < self.experts_per_token:
                raise ValueError(
                    f"experts_per_token {self.experts_per_token} exceeds the {reachable} experts of a token's groups; "
                    "lower it, or raise router.groups_per_token"
                )
        return self


Ffn = Annotated[DenseFfn | MoeFfn, Field(discriminator="name")]
"""The tagged union of feed-forward layers."""


class Model(Section):
    """The architecture of a transformer. Letters of the sizes: vocab_size V, model_dim D, ffn_dim F, head_dim H."""

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
        # config.json has a single `sliding_window`, and per layer only whether it applies.
        if len({w for w in self.attention.windows if w is not None}) > 1:
            raise ValueError(
                f"attention.windows {list(self.attention.windows)} has several sizes; "
                "use the same size in all layers that have a window"
            )
        if isinstance(self.rope, YarnRope) and self.attention.query_scaling is not None:
            of_rope = self.rope.original_max_seq_len
            of_queries = self.attention.query_scaling.original_max_seq_len
            if of_rope != of_queries:
                raise ValueError(
                    f"original_max_seq_len is {of_rope} in rope and {of_queries} in query_scaling; use the same value in both"
                )
        _check_scale_correction(self)
        return self


def _check_scale_correction(model: Model) -> None:
    """Raise ValueError if the correction of the softmax scale has no effect."""
    attention = model.attention
    if not isinstance(attention, MultiHeadLatentAttention) or attention.scale_correction == "none":
        return
    if not isinstance(model.rope, YarnRope) or not model.rope.mscale_all_dim or model.rope.factor <= 1:
        raise ValueError(
            "attention.scale_correction mscale_squared has no effect without a yarn rope with a factor above 1 and an "
            "mscale_all_dim other than 0; use none, or change rope"
        )


def _check_periods(model: Model) -> None:
    """Raise ValueError unless each stack of layers is a whole number of periods."""
    period = len(model.attention.windows)
    # Each repetition of the period is one step of the scan over layers, so a stack cannot end inside a period.
    if model.num_layers % period:
        raise ValueError(f"num_layers {model.num_layers} is not a multiple of the {period} attention.windows; change either")
    dense = model.ffn.dense_layers if isinstance(model.ffn, MoeFfn) else None
    if dense is None:
        return
    # Layer i uses window i modulo the period in the whole model, so the second stack has to begin a period too.
    if dense.count % period:
        raise ValueError(f"ffn.dense_layers.count {dense.count} is not a multiple of the {period} attention.windows; change either")
    if dense.count >= model.num_layers:
        raise ValueError(f"ffn.dense_layers.count {dense.count} leaves no sparse layer of num_layers {model.num_layers}; lower it")


def _check_family(model: Model) -> None:
    """Raise ValueError if the model uses a feature that its family does not have, or lacks one that every such model has."""
    family = FAMILIES[model.family]
    if family.sparse != isinstance(model.ffn, MoeFfn):
        sparse = ", ".join(name for name, row in FAMILIES.items() if row.sparse)
        raise ValueError(
            f"family {model.family} cannot have a {model.ffn.name} ffn: {sparse} must have a moe ffn, and all others a dense one; "
            "change model.ffn or model.family"
        )
    present = features(model)
    for feature, phrase in FEATURES.items():
        if feature in family.required - present:
            raise ValueError(f"family {model.family} must have {phrase}; add it, or change model.family")
    excess = present - family.features
    for feature, phrase in FEATURES.items():
        if feature in excess:
            owners = ", ".join(name for name, row in FAMILIES.items() if feature in row.features)
            raise ValueError(f"family {model.family} cannot have {phrase}; only {owners} can; leave it out, or change model.family")


def features(model: Model) -> frozenset[Feature]:
    """Return the features of a model that not every family, or not every file format, supports."""
    attention = model.attention
    windows = set(attention.windows)
    ffn = model.ffn
    present: dict[Feature, bool] = {
        "mla": isinstance(attention, MultiHeadLatentAttention),
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
            "router_scale": isinstance(ffn.router, SoftmaxRouter) and ffn.router.scale != 1,
            "shared_experts": ffn.num_shared_experts > 0,
            "dense_layers": ffn.dense_layers is not None,
        }
    return frozenset(feature for feature, is_present in present.items() if is_present)


def without_format(model: Model, file_format: FileFormat | None = None) -> str | None:
    """Describe the features of a model that a file format cannot express.

    Args:
        model: the architecture.
        file_format: the format to check; None for all formats of the model's family, of which the one that lacks the fewest
            features counts.

    Returns:
        The missing features as text for a message, or None if the model can be exported.
    """
    formats = FAMILIES[model.family].formats
    considered = [name for name in formats if file_format in (None, name)]
    if not considered:
        return "the architecture"
    missing = [features(model) - formats[name] for name in considered]
    return describe_features(min(missing, key=len))
