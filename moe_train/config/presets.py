"""Architectures by name: `model: {preset: mixtral-8x7b}` states the sizes of a published model, so that nothing is downloaded.

The sizes are those of the config.json or params.json that come with the weights. To add a model, add its sections here and its
name to `PresetName`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

PresetName = Literal[
    "mistral-7b",
    "mistral-nemo",
    "ministral-8b",
    "ministral3-3b",
    "ministral3-8b",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "mistral-small-4",
    "mistral-large-3",
    "deepseek-v3",
]
"""The name of an architecture of this table."""


def _grouped(num_heads: int = 32, **more: Any) -> dict[str, Any]:
    """Return grouped-query attention with 8 key and value heads of 128 dims, which most of these models have."""
    return {"name": "gqa", "num_heads": num_heads, "num_kv_heads": 8, "head_dim": 128, **more}


def _latent(num_heads: int, q_rank: int, kv_rank: int, nope_dim: int, **more: Any) -> dict[str, Any]:
    """Return latent attention with 64 rotary dims and values of 128 dims."""
    ranks = {"q_lora_rank": q_rank, "kv_lora_rank": kv_rank}
    dims = {"qk_nope_head_dim": nope_dim, "qk_rope_head_dim": 64, "v_head_dim": 128}
    return {"name": "mla", "num_heads": num_heads, **ranks, **dims, **more}


def _yarn(theta: float, factor: float, original: int) -> dict[str, Any]:
    return {"name": "yarn", "theta": theta, "factor": factor, "original_max_seq_len": original}


def _scaling(original: int) -> dict[str, Any]:
    return {"beta": 0.1, "original_max_seq_len": original}


def _dense(ffn_dim: int) -> dict[str, Any]:
    return {"name": "dense", "ffn_dim": ffn_dim}


def _moe(ffn_dim: int, num_experts: int, experts_per_token: int, **more: Any) -> dict[str, Any]:
    return {"name": "moe", "ffn_dim": ffn_dim, "num_experts": num_experts, "experts_per_token": experts_per_token, **more}


def _sizes(family: str, vocab_size: int, model_dim: int, num_layers: int, max_seq_len: int) -> dict[str, Any]:
    return {
        "family": family,
        "vocab_size": vocab_size,
        "model_dim": model_dim,
        "num_layers": num_layers,
        "max_seq_len": max_seq_len,
    }


_TEKKEN = 131072
"""Size of the vocabulary of Mistral's Tekken tokenizers."""

PRESETS: Mapping[str, dict[str, Any]] = {
    "mistral-7b": {**_sizes("mistral", 32768, 4096, 32, 32768), "attention": _grouped(), "ffn": _dense(14336)},
    "mistral-nemo": {**_sizes("mistral", _TEKKEN, 5120, 40, 131072), "attention": _grouped(), "ffn": _dense(14336)},
    "ministral-8b": {
        **_sizes("ministral", _TEKKEN, 4096, 36, 32768),
        "attention": _grouped(windows=[None, 32768, 32768, 32768]),
        "ffn": _dense(12288),
        "rope": {"name": "default", "theta": 1e8},
    },
    "ministral3-3b": {
        **_sizes("ministral3", _TEKKEN, 3072, 26, 262144),
        "attention": _grouped(query_scaling=_scaling(16384)),
        "ffn": _dense(9216),
        "rope": _yarn(1e6, 16.0, 16384),
        "tie_embeddings": True,
    },
    "ministral3-8b": {
        **_sizes("ministral3", _TEKKEN, 4096, 34, 262144),
        "attention": _grouped(query_scaling=_scaling(16384)),
        "ffn": _dense(14336),
        "rope": _yarn(1e6, 16.0, 16384),
    },
    "mixtral-8x7b": {**_sizes("mixtral", 32000, 4096, 32, 32768), "attention": _grouped(), "ffn": _moe(14336, 8, 2)},
    "mixtral-8x22b": {**_sizes("mixtral", 32768, 6144, 56, 65536), "attention": _grouped(48), "ffn": _moe(16384, 8, 2)},
    "mistral-small-4": {
        **_sizes("mistral4", _TEKKEN, 4096, 36, 1048576),
        "attention": _latent(32, 1024, 256, 64, query_scaling=_scaling(8192)),
        "ffn": _moe(2048, 128, 4, num_shared_experts=1),
        "rope": _yarn(1e4, 128.0, 8192),
        "norm_eps": 1e-6,
    },
    "mistral-large-3": {
        **_sizes("mistral4", _TEKKEN, 7168, 61, 294912),
        "attention": _latent(128, 1536, 512, 128, query_scaling=_scaling(8192)),
        "ffn": _moe(4096, 128, 4, num_shared_experts=1, dense_layers={"count": 3, "ffn_dim": 16384}),
        "rope": _yarn(1e4, 36.0, 8192),
        "norm_eps": 1e-6,
    },
    "deepseek-v3": {
        **_sizes("deepseek_v3", 129280, 7168, 61, 163840),
        "attention": _latent(128, 1536, 512, 128, scale_correction="mscale_squared"),
        "ffn": _moe(
            2048,
            256,
            8,
            num_shared_experts=1,
            router={"name": "sigmoid", "bias": True, "scale": 2.5, "num_groups": 8, "groups_per_token": 4},
            dense_layers={"count": 3, "ffn_dim": 18432},
        ),
        "rope": _yarn(1e4, 40.0, 4096),
        "norm_eps": 1e-6,
    },
}
"""Name -> the `model` section, without the keys that have its defaults."""


def expand_preset(section: object) -> object:
    """Replace `preset` in a `model` section by the keys that it stands for; keys that the section states itself win.

    Inside a section such as `ffn` single keys may be stated too, unless they name another kind.

    Raises:
        ValueError: there is no such preset.
    """
    if not isinstance(section, dict) or section.get("preset") is None:
        return section
    stated = {key: value for key, value in section.items() if key != "preset"}
    name = section["preset"]
    if name not in PRESETS:
        raise ValueError(f"preset {name} is not known; one of {', '.join(get_args(PresetName))}")
    return _merged(PRESETS[name], stated)


def _merged(preset: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a preset with those that are stated, section by section."""
    merged = dict(preset)
    for key, value in stated.items():
        original = merged.get(key)
        # Another kind of a section, such as a dense ffn, replaces the preset's whole section.
        if (
            isinstance(value, dict)
            and isinstance(original, dict)
            and value.get("name", original.get("name")) == original.get("name")
        ):
            merged[key] = _merged(original, value)
        else:
            merged[key] = value
    return merged
