"""Convert between the keys of a GGUF file that describe its architecture and `config.Model`.

llama.cpp's `llama` covers Llama, Mistral and Mixtral, dense or with experts; it reads neither YaRN's settings nor a scaling of
queries. `mistral3` reads both, with one original length for the two. Neither supports sliding windows. Up to its window's length
a model is the same without the window, so that length is written as the context.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from moe_train import config
from moe_train.weights import names
from moe_train.weights.gguf.container import Gguf

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
            return _ours(opened.settings)
        return _theirs(opened)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{opened.file}: {'.'.join(map(str, first['loc']))}: {first['msg']}".replace("Value error, ", "")
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{opened.file}: {error}") from error


def _ours(settings: Mapping[str, Any]) -> config.Model:
    """Read the architecture of a file that we wrote. Raises ValueError if somebody changed the keys that llama.cpp reads."""
    model = config.Model.model_validate_json(settings[MODEL_KEY])
    expected_keys = _keys(model)
    # A tool that edits the keys of llama.cpp leaves ours behind, and the two then disagree.
    for key, value in expected_keys.items():
        plain = value if isinstance(value, str) else value.item()
        if settings.get(key) != plain:
            raise ValueError(f"{key} is {settings.get(key)}, but {value} by {MODEL_KEY}; write the file anew, or drop that key")
    return model


def _theirs(opened: Gguf) -> config.Model:
    """Read the architecture of a file that another tool wrote."""
    settings = opened.settings
    tensors = opened.tensors
    arch = settings.get("general.architecture")
    if arch not in ("llama", "mistral3"):
        raise ValueError(f"general.architecture is {arch!r}; read are 'llama' (Llama, Mistral, Mixtral) and 'mistral3'")
    if settings.get("general.type", "model") != "model":
        raise ValueError(f"general.type is {settings['general.type']!r}; give the file of a whole model")
    if settings.get("split.count", 1) not in (0, 1):
        raise ValueError(f"this is one of {settings['split.count']} parts; join them: llama-gguf-split --merge FIRST_PART OUT")
    used: set[str] = set()

    def get(key: str, default: Any = None) -> Any:
        used.add(f"{arch}.{key}")
        value = settings.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"the key {arch}.{key} is missing")
        if isinstance(value, np.ndarray):  # one value per layer
            if len({*value.tolist()}) != 1:
                raise ValueError(f"{arch}.{key} differs between layers, which is not built here")
            value = value[0].item()
        return value

    def real(key: str, default: float | None = None) -> float:
        return float(str(np.float32(get(key, default))))  # the shortest decimal that rounds to this float32

    D = get("embedding_length")
    N = get("attention.head_count")
    H = get("attention.key_length", D // N)
    only = {"attention.value_length": H, "rope.dimension_count": H, "attention.scale": H**-0.5, "logit_scale": 1.0}
    only |= {"expert_weights_scale": 1.0, "expert_shared_count": 0, "attention.causal": True}
    for key, value in only.items():
        stated = get(key, value)
        is_default_scale = key == "attention.scale" and stated == 0
        if not math.isclose(stated, value, rel_tol=1e-6) and not is_default_scale:
            raise ValueError(f"{arch}.{key} is {stated}, which is not built here; it has to be {value}")
    for name in ("rope_freqs.weight", "blk.0.rope_freqs.weight"):
        if name in tensors and np.any(tensors[name].read() != 1):
            raise ValueError(f"{name} changes the rotary frequencies (Llama 3's scaling), which is not built here")
    E = get("expert_count", 0)
    ffn: dict[str, Any] = {"name": "dense", "ffn_dim": get("feed_forward_length")}
    if E:
        ffn = {**ffn, "name": "moe", "num_experts": E, "experts_per_token": get("expert_used_count")}
    rope, scaling = _rope(arch, get, real)
    # Llama and Mistral have the same mathematics without a window; only Llama's head_dim is always D / N
    if E:
        family = "mixtral"
    elif arch == "mistral3":
        family = "ministral3"
    else:
        family = "llama" if N * H == D else "mistral"
    embedding = tensors.get(names.GGUF.embed.name)
    model = config.Model.model_validate(
        {
            "family": family,
            "vocab_size": get("vocab_size", embedding.shape[0] if embedding else None),
            "model_dim": D,
            "num_layers": get("block_count"),
            "attention": {
                "name": "gqa",
                "num_heads": N,
                "num_kv_heads": get("attention.head_count_kv", N),
                "head_dim": H,
                "query_scaling": scaling,
            },
            "ffn": ffn,
            "rope": rope,
            "norm_eps": real("attention.layer_norm_rms_epsilon"),
            "tie_embeddings": names.GGUF.head.name not in tensors,
            "max_seq_len": get("context_length"),
        }
    )
    if unread := sorted(key for key in settings if key.startswith(f"{arch}.") and key not in used):
        log.warning(
            "%s has keys that are not read here: %s; make sure that they leave the model alone", opened.file, ", ".join(unread)
        )
    return model


def _rope(arch: str, get: Callable[..., Any], real: Callable[..., float]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    theta = real("rope.freq_base", 1e4)
    kind = get("rope.scaling.type", "none")
    factor = real("rope.scaling.factor", 1.0)
    original = get("rope.scaling.original_context_length", get("context_length"))
    beta = real("attention.temperature_scale", 0.0)
    scaling = {"beta": beta, "original_max_seq_len": original} if beta else None
    if kind == "yarn":
        all_dims = real("rope.scaling.yarn_log_multiplier", 0.0)
        yarn = {"factor": factor, "original_max_seq_len": original, "mscale": 1.0 if all_dims else 0.0, "mscale_all_dim": all_dims}
        yarn |= {f"beta_{name}": real(f"rope.scaling.yarn_beta_{name}", d) for name, d in (("fast", 32.0), ("slow", 1.0))}
        if real("rope.scaling.attn_factor", 1.0) != 1:
            raise ValueError(f"{arch}.rope.scaling.attn_factor is {real('rope.scaling.attn_factor')}, which is not built here")
        return {"name": "yarn", "theta": theta, **yarn}, scaling
    if kind not in ("none", "linear") or factor != 1:
        raise ValueError(f"{arch}.rope.scaling is {kind} by {factor:g}; built are none and yarn")
    return {"name": "default", "theta": theta}, scaling


# --- ours -> keys ---


def architecture(model: config.Model) -> str:
    """Return llama.cpp's name of the architecture that computes this model."""
    return "mistral3" if model.attention.query_scaling or isinstance(model.rope, config.YarnRope) else "llama"


def _keys(model: config.Model) -> dict[str, Any]:
    a = model.attention
    rope = model.rope
    scaling = a.query_scaling
    arch = architecture(model)
    context = min([model.max_seq_len, *(window for window in a.windows if window is not None)])
    keys: dict[str, Any] = {
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
            raise ValueError(f"rope.mscale is {rope.mscale}; llama.cpp takes it for 1")
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope.factor),
            "rope.scaling.original_context_length": rope.original_max_seq_len,
            "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
            "rope.scaling.yarn_log_multiplier": float(rope.mscale_all_dim) if rope.mscale else 0.0,
        }
    elif scaling:
        keys |= {"rope.scaling.type": "none", "rope.scaling.original_context_length": scaling.original_max_seq_len}
    if scaling:
        keys["attention.temperature_scale"] = float(scaling.beta)
    kinds: dict[type, Callable[[Any], Any]] = {int: np.uint32, float: np.float32, str: str}
    return {"general.architecture": arch, **{f"{arch}.{key}": kinds[type(value)](value) for key, value in keys.items()}}


def architecture_settings(model: config.Model) -> dict[str, Any]:
    """Return the keys that describe an architecture. Raises ValueError if llama.cpp would compute it differently."""
    return {**_keys(model), MODEL_KEY: model.model_dump_json()}


def warnings(model: config.Model) -> list[str]:
    """Return what a user of the file has to know."""
    context = int(_keys(model)[f"{architecture(model)}.context_length"])
    if context == model.max_seq_len:
        return []
    return [f"llama.cpp has no sliding windows here: the file says a context of {context} tokens, up to which it is exact"]
