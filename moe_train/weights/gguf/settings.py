"""Convert between the keys of a GGUF file that describe its architecture and `config.Model`.

llama.cpp's `llama` covers Llama, Mistral and Mixtral, dense or with experts; it reads neither YaRN's settings nor a scaling of
queries. `mistral3` reads both, with one original length for the two. `mistral4` and `deepseek2` are in `latent_settings`. None
supports sliding windows. Up to its window's length a model is the same without the window, so that length is written as the
context.
"""

from __future__ import annotations

import logging
import math

import numpy as np
from pydantic import ValidationError

from moe_train import config
from moe_train.machine.files import JsonObject
from moe_train.weights import names
from moe_train.weights.gguf import latent_settings
from moe_train.weights.gguf.architecture_keys import ArchitectureKeys
from moe_train.weights.gguf.container import Gguf, GgufSettings
from moe_train.weights.latent_norms import check_latent_norm_eps

log = logging.getLogger(__name__)

MODEL_KEY = "moe_train.model"
"""The key under which our files contain the whole architecture, in JSON; llama.cpp ignores it."""


def read_architecture(opened: Gguf) -> config.Model:
    """Read the architecture of a file.

    Raises:
        ValueError: the architecture is not implemented here; the message names the key.
    """
    try:
        if MODEL_KEY in opened.settings:
            return _read_own(opened.settings)
        return _read_external(opened)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{opened.file}: {location}: {first['msg']}".replace("Value error, ", "")) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{opened.file}: {error}") from error


def _read_own(settings: GgufSettings) -> config.Model:
    """Read the architecture of a file that we wrote. Raises ValueError if somebody changed the keys that llama.cpp reads."""
    model = config.Model.model_validate_json(settings[MODEL_KEY])
    # A tool that edits the keys of llama.cpp leaves ours unchanged, and the two then disagree.
    for key, value in _keys(model).items():
        expected = value if isinstance(value, str) else value.item()
        # Compared exactly, since both sides were rounded to float32.
        if settings.get(key) != expected:
            raise ValueError(
                f"{key} is {settings.get(key)}, but {value} by {MODEL_KEY}; export the model again, or remove that key"
            )
    return model


def _read_external(opened: Gguf) -> config.Model:
    """Read the architecture of a file that another tool wrote."""
    tensors = opened.tensors
    keys = ArchitectureKeys(_architecture_of(opened.settings), opened.settings)
    if keys.arch in latent_settings.ARCHITECTURES:
        has_router_bias = any(name.endswith(".exp_probs_b.bias") for name in tensors)
        sections = latent_settings.read_sections(keys, has_router_bias=has_router_bias)
    else:
        sections = _read_sections(keys, opened)
    embedding = tensors.get(names.GGUF.embed.name)
    model = config.Model.model_validate(
        {
            **sections,
            # The key is optional; the rows of the embedding tell the same.
            "vocab_size": keys.get("vocab_size", embedding.shape[0] if embedding else None),
            "model_dim": keys.get("embedding_length"),
            "num_layers": keys.get("block_count"),
            "norm_eps": keys.get_float("attention.layer_norm_rms_epsilon"),
            # Files leave out a tied head.
            "tie_embeddings": names.GGUF.head.name not in tensors,
            "max_seq_len": keys.get("context_length"),
        }
    )
    check_latent_norm_eps(model, "llama.cpp")
    if unread := keys.unread():
        log.warning(
            "%s has keys that are not read: %s; make sure that they do not change what the model computes",
            opened.file,
            ", ".join(unread),
        )
    return model


def _read_sections(keys: ArchitectureKeys, opened: Gguf) -> JsonObject:
    """Read the sections `attention`, `ffn` and `rope` of a model with grouped-query attention, and its family."""
    D = keys.get("embedding_length")
    N = keys.get("attention.head_count")
    H = keys.get("attention.key_length", D // N)
    _check_required(keys, opened, head_dim=H)
    num_experts = keys.get("expert_count", 0)
    ffn = {"name": "dense", "ffn_dim": keys.get("feed_forward_length")}
    if num_experts:
        ffn |= {"name": "moe", "num_experts": num_experts, "experts_per_token": keys.get("expert_used_count")}
    rope, query_scaling = _rope(keys)
    # Without a window, Llama and Mistral have the same mathematics; only Llama's head_dim is always D / N.
    if num_experts:
        family = "mixtral"
    elif keys.arch == "mistral3":
        family = "ministral3"
    elif N * H == D:
        family = "llama"
    else:
        family = "mistral"
    attention = {
        "name": "gqa",
        "num_heads": N,
        "num_kv_heads": keys.get("attention.head_count_kv", N),
        "head_dim": H,
        "query_scaling": query_scaling,
    }
    return {"family": family, "attention": attention, "ffn": ffn, "rope": rope}


def _architecture_of(settings: GgufSettings) -> str:
    """Return llama.cpp's name of the architecture. Raises ValueError unless the file is a complete, supported model."""
    arch = settings.get("general.architecture")
    if arch not in ("llama", "mistral3", *latent_settings.ARCHITECTURES):
        raise ValueError(
            f"general.architecture is {arch!r}; supported: 'llama' (Llama, Mistral, Mixtral), 'mistral3', 'mistral4', 'deepseek2'"
        )
    if settings.get("general.type", "model") != "model":
        raise ValueError(f"general.type is {settings['general.type']!r}; give the file of a complete model")
    if settings.get("split.count", 1) not in (0, 1):
        raise ValueError(f"this is one of {settings['split.count']} parts; join them: llama-gguf-split --merge FIRST_PART OUT")
    return arch


def _check_required(keys: ArchitectureKeys, opened: Gguf, head_dim: int) -> None:
    """Raise ValueError unless every key that would change the mathematics has the only value that is implemented."""
    required = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.scale": head_dim**-0.5,
        "logit_scale": 1.0,
        "expert_weights_scale": 1.0,
        "expert_shared_count": 0,
        "attention.causal": True,
    }
    for key, value in required.items():
        stated = keys.get(key, value)
        # A stated attention.scale of 0 means the usual 1 / sqrt(head_dim).
        is_default_scale = key == "attention.scale" and stated == 0
        if not math.isclose(stated, value, rel_tol=1e-6) and not is_default_scale:
            raise ValueError(f"{keys.arch}.{key} is {stated}, which is not implemented; it has to be {value}")
    for name in ("rope_freqs.weight", "blk.0.rope_freqs.weight"):
        if name in opened.tensors and np.any(opened.tensors[name].read() != 1):
            raise ValueError(f"{name} changes the rotary frequencies (Llama 3's scaling), which is not implemented")


def _rope(keys: ArchitectureKeys) -> tuple[JsonObject, JsonObject | None]:
    """Return the section `rope` of a model config, and the scaling of queries, which uses the same original length."""
    theta = keys.get_float("rope.freq_base", 1e4)
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.get_float("rope.scaling.factor", 1.0)
    original = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
    beta = keys.get_float("attention.temperature_scale", 0.0)
    query_scaling = None
    if beta:
        query_scaling = {"beta": beta, "original_max_seq_len": original}
    if kind == "yarn":
        # llama.cpp assumes an mscale of 1. Without the key, cos and sin are scaled by 0.1 log(factor) + 1: two zeros here.
        mscale_all_dim = keys.get_float("rope.scaling.yarn_log_multiplier", 0.0)
        yarn = {
            "name": "yarn",
            "theta": theta,
            "factor": factor,
            "original_max_seq_len": original,
            "mscale": 1.0 if mscale_all_dim else 0.0,
            "mscale_all_dim": mscale_all_dim,
            "beta_fast": keys.get_float("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": keys.get_float("rope.scaling.yarn_beta_slow", 1.0),
        }
        attn_factor = keys.get_float("rope.scaling.attn_factor", 1.0)
        if attn_factor != 1:
            raise ValueError(f"{keys.arch}.rope.scaling.attn_factor is {attn_factor}, which is not implemented; it has to be 1")
        return yarn, query_scaling
    # Linear scaling by 1 is none.
    if kind not in ("none", "linear") or factor != 1:
        raise ValueError(f"{keys.arch}.rope.scaling is {kind} by {factor:g}; supported: none and yarn")
    return {"name": "default", "theta": theta}, query_scaling


# --- writing -----------------------------------------------------------------------------------------------------


def architecture(model: config.Model) -> str:
    """Return llama.cpp's name of the architecture that computes this model."""
    if isinstance(model.attention, config.MultiHeadLatentAttention):
        return latent_settings.architecture(model)
    if model.attention.query_scaling or isinstance(model.rope, config.YarnRope):
        return "mistral3"
    return "llama"


def _keys(model: config.Model) -> GgufSettings:
    """Return the keys that llama.cpp reads."""
    check_latent_norm_eps(model, "llama.cpp")
    arch = architecture(model)
    settings: GgufSettings = {"general.architecture": arch}
    if isinstance(model.attention, config.MultiHeadLatentAttention):
        keys = latent_settings.latent_keys(model, model.attention)
    else:
        keys = _grouped_query_keys(model, model.attention)
    for key, value in keys.items():
        settings[f"{arch}.{key}"] = _typed(value)
    return settings


def _grouped_query_keys(model: config.Model, a: config.GroupedQueryAttention) -> dict[str, int | float | str | bool]:
    """Return the keys of a model with grouped-query attention, without the name of the architecture."""
    rope = model.rope
    scaling = a.query_scaling
    # llama.cpp has no windows for these architectures: up to the smallest window, attention is the same without it.
    context = min([model.max_seq_len, *(window for window in a.windows if window is not None)])
    keys: dict[str, int | float | str | bool] = {
        "vocab_size": model.vocab_size,
        "context_length": context,
        "embedding_length": model.model_dim,
        "block_count": model.num_layers,
        "feed_forward_length": model.ffn.ffn_dim,
        "attention.head_count": a.num_heads,
        "attention.head_count_kv": a.num_kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.dimension_count": a.head_dim,
        "rope.freq_base": float(rope.theta),
    }
    if isinstance(model.ffn, config.MoeFfn):
        keys |= {"expert_count": model.ffn.num_experts, "expert_used_count": model.ffn.experts_per_token}
    if isinstance(rope, config.YarnRope):
        if rope.mscale and rope.mscale_all_dim and rope.mscale != 1:
            raise ValueError(f"rope.mscale is {rope.mscale}; llama.cpp assumes 1; export to another format")
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_max_seq_len,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
            "rope.scaling.yarn_log_multiplier": float(rope.mscale_all_dim) if rope.mscale else 0.0,
        }
    elif scaling:
        # llama.cpp takes the original length of the queries' scaling from rope's key, so it is stated without YaRN too.
        keys |= {"rope.scaling.type": "none", "rope.scaling.original_context_length": scaling.original_max_seq_len}
    if scaling:
        keys["attention.temperature_scale"] = float(scaling.beta)
    return keys


def _typed(value: int | float | str | bool) -> str | np.generic:
    """Return a value in the type in which llama.cpp expects it."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return np.bool_(value)
    # The Python type decides, so `_keys` applies float() to what a config may state as an integral number.
    return np.uint32(value) if isinstance(value, int) else np.float32(value)


def architecture_settings(model: config.Model) -> GgufSettings:
    """Return the keys that describe an architecture. Raises ValueError if llama.cpp would compute it differently."""
    return {**_keys(model), MODEL_KEY: model.model_dump_json()}


def warnings(model: config.Model) -> list[str]:
    """Return warnings for the user of the file, as complete sentences."""
    context = int(_keys(model)[f"{architecture(model)}.context_length"])
    if context == model.max_seq_len:
        return []
    return [
        f"llama.cpp has no sliding windows for this architecture: the file states a context of {context} tokens, up to which the "
        f"model is exact, instead of {model.max_seq_len}"
    ]
