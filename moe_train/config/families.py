"""The table of model families: which features each family may have, and which file formats can express it.

The checks of `Model`, the check before an export and every file layout read this table. To add a family, add a row here and
its name to `FamilyName`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FamilyName = Literal["mistral", "mixtral", "ministral", "ministral3", "llama", "mistral4", "deepseek_v3"]
"""The name of a model family."""
FileFormat = Literal["hf", "mistral", "gguf"]
"""A file format of whole models; an adapter format uses the tensor names of one of these."""
Feature = Literal[
    "mla",
    "window",
    "interleaved_windows",
    "yarn",
    "query_scaling",
    "tied_embeddings",
    "sigmoid_router",
    "router_bias",
    "router_scale",
    "shared_experts",
    "dense_layers",
    "score_head",
    "several_choices",
]
"""An architectural feature that not every family or file format supports."""

FEATURES: dict[Feature, str] = {
    "mla": "multi-head latent attention (attention.name mla)",
    "window": "an attention window (attention.windows)",
    "interleaved_windows": "interleaved attention.windows",
    "yarn": "a yarn rope",
    "query_scaling": "attention.query_scaling",
    "tied_embeddings": "tied embeddings",
    "sigmoid_router": "a sigmoid router",
    "router_bias": "a router bias",
    "router_scale": "a softmax router with a scale (ffn.router.scale)",
    "shared_experts": "shared experts",
    "dense_layers": "dense first layers",
    "score_head": "a head for classification or rewards",
    "several_choices": "several targets of which one has exactly one label",
}
"""The phrase for each feature in messages."""


HuggingFaceExperts = Literal["block_sparse_moe", "mlp", "fused"]
"""How a file of Hugging Face's layout stores routed experts: a tensor for each matrix of each expert, under Mixtral's names or
under those of a dense layer; or all experts in one tensor, with gate and up in another one.
"""


@dataclass(frozen=True)
class HuggingFaceFamily:
    """How the transformers library represents a family."""

    architecture: str
    """Class name in transformers: the value of `architectures` in config.json."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that may be missing, because every version of transformers has the same default."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Additional fields of the family's config.json, each with the only value that is supported here."""
    experts: HuggingFaceExperts = "block_sparse_moe"
    """How routed experts are stored in the files that are written."""
    heads_divide_model_dim: bool = False
    """Whether transformers rejects a model_dim that is not a multiple of num_heads."""

    @property
    def scoring_architecture(self) -> str:
        """Class name in transformers of a model with a head that scores a text."""
        return self.architecture.replace("ForCausalLM", "ForSequenceClassification")


_DENSE: frozenset[Feature] = frozenset({"window", "interleaved_windows", "yarn", "query_scaling", "tied_embeddings"})
_SCORES: frozenset[Feature] = frozenset({"score_head", "several_choices"})
"""Features of a head that scores a text. No file format can express several choices at once."""
_IN_EVERY_FORMAT: dict[FileFormat, frozenset[Feature]] = {"hf": _DENSE | {"score_head"}, "mistral": _DENSE, "gguf": _DENSE}
"""Features of dense models that each format can express. GGUF expresses a window by limiting the context to the window's
length, up to which the model behaves the same without a window.
"""


_LATENT: frozenset[Feature] = frozenset({"mla", "yarn", "tied_embeddings", "shared_experts", "dense_layers"})
"""Features that all models with multi-head latent attention may have."""
_MISTRAL4: frozenset[Feature] = _LATENT | {"query_scaling", "router_scale"}
"""Features of Mistral Small 4 and of Mistral Large 3, which differ in the dense first layers only."""
_FIXED_OF_LATENT: Mapping[str, Any] = {"attention_bias": False, "rope_interleave": True, "norm_topk_prob": True}
"""Fields that transformers has for every model with multi-head latent attention."""
_DEEPSEEK_V3: frozenset[Feature] = _LATENT | {"sigmoid_router", "router_bias"}


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    hugging_face: HuggingFaceFamily
    features: frozenset[Feature]
    """The features that a model of the family may have."""
    required: frozenset[Feature] = frozenset()
    """The features that every model of the family has."""
    sparse: bool = False
    """Whether models of the family have (and need) a sparse ffn; otherwise a dense one."""
    formats: Mapping[FileFormat, frozenset[Feature]] = field(default_factory=lambda: _IN_EVERY_FORMAT)
    """File formats that can express models of the family, each with the features that it can express."""
    vllm_adapts_ends: bool = False
    """Whether vLLM applies adapters of the embedding and the head."""


FAMILIES: dict[FamilyName, Family] = {
    "mistral": Family(HuggingFaceFamily("MistralForCausalLM"), _SCORES | {"window", "tied_embeddings"}),
    "mixtral": Family(
        HuggingFaceFamily("MixtralForCausalLM", defaults={"sliding_window": None}),
        _SCORES | {"window", "tied_embeddings", "sigmoid_router", "router_bias", "router_scale", "shared_experts", "dense_layers"},
        sparse=True,
        vllm_adapts_ends=True,
    ),
    "ministral": Family(HuggingFaceFamily("MinistralForCausalLM"), _SCORES | {"window", "interleaved_windows", "tied_embeddings"}),
    "ministral3": Family(
        HuggingFaceFamily("Ministral3ForCausalLM"), _SCORES | {"window", "yarn", "query_scaling", "tied_embeddings"}
    ),
    "llama": Family(
        HuggingFaceFamily(
            "LlamaForCausalLM",
            defaults={"rope_theta": 10000.0, "num_key_value_heads": None},  # None: equal to num_attention_heads
            fixed={"attention_bias": False, "mlp_bias": False},
            heads_divide_model_dim=True,
        ),
        _SCORES | {"tied_embeddings"},
        vllm_adapts_ends=True,
    ),
    "mistral4": Family(
        HuggingFaceFamily("Mistral4ForCausalLM", fixed=_FIXED_OF_LATENT, experts="fused"),
        _MISTRAL4,
        # transformers computes the frequencies of other kinds of rope for the whole head, and fails.
        required=frozenset({"mla", "yarn", "shared_experts"}),
        sparse=True,
        formats={"hf": _MISTRAL4, "mistral": _MISTRAL4, "gguf": _MISTRAL4},
    ),
    "deepseek_v3": Family(
        HuggingFaceFamily("DeepseekV3ForCausalLM", fixed=_FIXED_OF_LATENT, experts="mlp"),
        _DEEPSEEK_V3,
        required=frozenset({"mla", "sigmoid_router", "router_bias", "shared_experts"}),
        sparse=True,
        formats={"hf": _DEEPSEEK_V3, "gguf": _DEEPSEEK_V3},
    ),
}
"""The table."""


def family_with(features: Collection[Feature], *, sparse: bool, file_format: FileFormat) -> FamilyName:
    """Return the first family of the table that may have all of these features, for a format that does not name families.

    Args:
        features: features that the model has.
        sparse: whether the model has a sparse ffn.
        file_format: the format, which has to be able to express the family.

    Raises:
        ValueError: no family has all of these features.
    """
    for name, family in FAMILIES.items():
        may_have = family.required <= set(features) <= family.features
        if family.sparse == sparse and file_format in family.formats and may_have:
            return name
    kind = "sparse" if sparse else "dense"
    raise ValueError(f"no {kind} family can have all of {describe_features(features)}; remove some of them")


def describe_features(features: Collection[Feature]) -> str | None:
    """Join the phrases of the features in the order of the table; None if there are no features."""
    return " and ".join(phrase for feature, phrase in FEATURES.items() if feature in features) or None
