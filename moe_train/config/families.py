"""The table of families: what the models of each family may have, and which file formats can express it.

The checks of `Model`, the check before an export and every layout read this table. A new family is a new row (and its
name in `FamilyName`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FamilyName = Literal["mistral", "mixtral", "ministral", "ministral3", "llama"]
FileFormat = Literal["hf", "mistral", "gguf"]
"""A file format of whole models; an adapter's format uses the names of one of these."""
Feature = Literal[
    "window",
    "interleaved_windows",
    "yarn",
    "query_scaling",
    "tied_embeddings",
    "sigmoid_router",
    "router_bias",
    "shared_experts",
    "dense_layers",
]

FEATURES: dict[Feature, str] = {
    "window": "an attention window (attention.windows)",
    "interleaved_windows": "interleaved attention.windows",
    "yarn": "a yarn rope",
    "query_scaling": "attention.query_scaling",
    "tied_embeddings": "tied embeddings",
    "sigmoid_router": "a sigmoid router",
    "router_bias": "a router bias",
    "shared_experts": "shared experts",
    "dense_layers": "dense first layers",
}
"""Each feature in the words of messages."""


@dataclass(frozen=True)
class HuggingFace:
    """How transformers knows a family."""

    architecture: str
    """Its class: the value of `architectures` in config.json."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that may be left out, because every version of transformers has the same default."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the family has in addition, and their only values here."""
    heads_divide_model_dim: bool = False
    """Whether transformers refuses a model_dim that is not a multiple of num_heads."""


_DENSE: frozenset[Feature] = frozenset({"window", "interleaved_windows", "yarn", "query_scaling", "tied_embeddings"})
_IN_EVERY_FORMAT: dict[FileFormat, frozenset[Feature]] = {"hf": _DENSE, "mistral": _DENSE, "gguf": _DENSE}
"""gguf expresses windows by a context of the window's length, up to which the model is the same without."""


@dataclass(frozen=True)
class Family:
    """One row."""

    hugging_face: HuggingFace
    features: frozenset[Feature]
    """What a model of the family may have."""
    sparse: bool = False
    """Whether its models have a sparse ffn (they need one) or a dense one."""
    formats: Mapping[FileFormat, frozenset[Feature]] = field(default_factory=lambda: _IN_EVERY_FORMAT)
    """File formats that can express models of the family, with the features that each of them has a place for."""
    vllm_adapts_ends: bool = False
    """Whether vLLM applies adapters of the embedding and the head."""


FAMILIES: dict[FamilyName, Family] = {
    "mistral": Family(HuggingFace("MistralForCausalLM"), frozenset({"window", "tied_embeddings"})),
    "mixtral": Family(
        HuggingFace("MixtralForCausalLM", defaults={"sliding_window": None}),
        frozenset({"window", "tied_embeddings", "sigmoid_router", "router_bias", "shared_experts", "dense_layers"}),
        sparse=True,
        vllm_adapts_ends=True,
    ),
    "ministral": Family(HuggingFace("MinistralForCausalLM"), frozenset({"window", "interleaved_windows", "tied_embeddings"})),
    "ministral3": Family(HuggingFace("Ministral3ForCausalLM"), frozenset({"window", "yarn", "query_scaling", "tied_embeddings"})),
    "llama": Family(
        HuggingFace(
            "LlamaForCausalLM",
            defaults={"rope_theta": 10000.0, "num_key_value_heads": None},  # None: as many as num_attention_heads
            fixed={"attention_bias": False, "mlp_bias": False},
            heads_divide_model_dim=True,
        ),
        frozenset({"tied_embeddings"}),
        vllm_adapts_ends=True,
    ),
}


def family_with(features: Collection[Feature], *, sparse: bool, file_format: FileFormat) -> FamilyName:
    """The first family of the table whose models may have all of these, for a format that does not name families.

    Raises ValueError where no family has them together.
    """
    for name, family in FAMILIES.items():
        if family.sparse == sparse and file_format in family.formats and set(features) <= family.features:
            return name
    raise ValueError(f"no {'sparse' if sparse else 'dense'} family can have {in_words(features)}; leave out what is too much")


def in_words(features: Collection[Feature]) -> str | None:
    """The features, joined in the order of the table; None for none."""
    return " and ".join(phrase for feature, phrase in FEATURES.items() if feature in features) or None
