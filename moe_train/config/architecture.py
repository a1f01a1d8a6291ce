"""The architecture of a transformer: positions, feed-forward layers, and the features that a model uses."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from moe_train.config.attention import Attention, MultiHeadLatentAttention
from moe_train.config.families import FAMILIES, FEATURES, FamilyName, Feature, FileFormat, describe_features
from moe_train.config.presets import PresetName, expand_preset
from moe_train.config.router import Router, SigmoidRouter, SoftmaxRouter
from moe_train.config.score_head import ScoreHead
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
    """Base of the rotary frequencies."""


class YarnRope(Section):
    """YaRN context extension (arXiv:2309.00071).

    Low frequencies are interpolated by `factor`, high frequencies are kept, and a linear ramp joins the two ranges.
    """

    name: Literal["yarn"]
    theta: PositiveFloat = 1e6
    """Base of the rotary frequencies."""
    factor: PositiveFloat
    """Factor by which low frequencies are interpolated: the new context divided by `original_max_seq_len`."""
    original_max_seq_len: Positive
    """Context in tokens that the model was trained with before the extension."""
    beta_fast: PositiveFloat = 32.0
    """Number of rotations within the original context above which a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """Number of rotations within the original context below which a frequency is interpolated in full."""
    mscale: NonNegativeFloat = 1.0
    """Numerator of the correction of rotary values, as in DeepSeek's files; equal to `mscale_all_dim`, the correction cancels."""
    mscale_all_dim: NonNegativeFloat = 1.0
    """Denominator of the correction of rotary values; latent attention also reads it (`attention.scale_correction`)."""


Rope = Annotated[DefaultRope | YarnRope, Field(discriminator="name")]
"""The tagged union of position embeddings."""


class DenseFfn(Section):
    """A dense SwiGLU feed-forward layer: down(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    name: Literal["dense"]
    ffn_dim: Positive
    """Width F of the hidden layer (`intermediate_size` of Hugging Face)."""


class DenseLayers(Section):
    """Dense first layers of a sparse model: the first `count` layers have a dense SwiGLU of width ffn_dim in place of experts.

    These are `first_k_dense_replace` and `intermediate_size` of DeepSeek-V3 (arXiv:2412.19437, section 4.2).
    """

    count: Positive
    """Number of first layers without experts (`first_k_dense_replace`)."""
    ffn_dim: Positive
    """Width F of the hidden layer of each of them (`intermediate_size`)."""


class MoeFfn(Section):
    """A sparse feed-forward layer: SwiGLU experts, of which a router selects `experts_per_token` for each token."""

    name: Literal["moe"]
    ffn_dim: Positive
    """Width F of each expert's hidden layer (`moe_intermediate_size`; Mixtral calls it `intermediate_size`)."""
    num_experts: Positive
    """Number E of routed experts in a layer (`num_local_experts`)."""
    experts_per_token: Positive
    """Number A of experts that process each token (`num_experts_per_tok`). Compute grows in proportion."""
    router: Router = SoftmaxRouter(name="softmax")
    """How experts are selected and weighted; by default the softmax router of Mixtral."""
    num_shared_experts: NonNegative = 0
    """Number of additional experts that process every token (DeepSeekMoE, arXiv:2401.06066), computed together as one dense SwiGLU
    of their summed width.
    """
    # A dump omits this key when it is null: files that store a dump (GGUF) keep their bytes, and older readers still read them.
    dense_layers: Annotated[DenseLayers | None, Field(exclude_if=lambda dense: dense is None)] = None
    """First layers that have a dense feed-forward layer in place of experts; null: all layers have experts."""

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
    """Family of the model, which decides what it may have and which file formats can express it."""
    vocab_size: Positive
    """Number V of token ids; at least the tokenizer's. A multiple of 128 is fastest on accelerators."""
    model_dim: Positive
    """Width D of the residual stream (`hidden_size`)."""
    num_layers: Positive
    """Number L of layers."""
    attention: Attention
    """Attention of every layer: grouped-query (`gqa`, also if `name` is left out) or latent (`mla`)."""
    ffn: Ffn
    """Feed-forward layers: `dense`, or `moe` with experts and a router. The family decides which of them is allowed."""
    rope: Rope = DefaultRope(name="default")
    """Rotary position embeddings; `yarn` extends the context."""
    norm_eps: PositiveFloat = 1e-5
    """Constant added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the head uses the matrix of the embedding. Usual for small models only."""
    max_seq_len: Positive = 32768
    """Context in tokens that exports state; `train.seq_len` may not exceed it."""
    init_stddev: PositiveFloat = 0.02
    """Standard deviation of the initial weights; it matters for training from random weights, and for a new head."""
    # A dump omits this key when it is null: files that store a dump keep their bytes, and older readers still read them.
    scores: Annotated[ScoreHead | None, Field(exclude_if=lambda scores: scores is None)] = None
    """Head that scores a text in place of the one that predicts tokens; null for a language model. The objective decides it."""

    preset: PresetName | None = Field(default=None, exclude=True)
    """Published model whose sizes fill in all keys that are not stated. The resolved config states the keys themselves."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, section: object) -> object:
        return expand_preset(section)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Require the sizes in the schema for editors only where no preset states them."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["if"] = {"properties": {"preset": {"type": "string"}}, "required": ["preset"]}
        schema["else"] = {"required": schema.pop("required")}
        return schema

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
        "score_head": model.scores is not None,
        "several_choices": model.scores is not None and model.scores.has_several_choices,
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


def require_vocabulary(model: Model, purpose: str) -> None:
    """Raise ValueError if the model has a head that scores texts, and so predicts no tokens.

    Args:
        model: the architecture.
        purpose: what the model is needed for, for the message.
    """
    if model.scores is not None:
        names = ", ".join(model.scores.output_names)
        raise ValueError(f"the model scores texts ({names}) and predicts no tokens, so it cannot {purpose}; use moe-train classify")


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
