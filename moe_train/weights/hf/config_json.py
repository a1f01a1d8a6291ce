"""Convert a Hugging Face `config.json` to `config.Model` and back.

Whatever would change the mathematics and is not implemented is an error. Defaults of the library have changed between versions,
so what a file does not state is derived only if every version agrees.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_train import config
from moe_train.machine.files import read_object

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"

_FAMILIES = {family.hugging_face.architecture: name for name, family in config.FAMILIES.items() if "hf" in family.formats}
_WRAPPERS = ("Mistral3ForConditionalGeneration",)
"""Vision models of which only the text model is read."""

# The only values whose meaning is implemented here.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "router_jitter_noise": (0,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "quantization_config": (None,),
}
_READ = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "layer_types"),
    *("rope_theta", "rope_parameters", "rope_scaling", "sliding_window", "tie_word_embeddings", "max_position_embeddings"),
    "initializer_range",
)
# Fields that do not affect the mathematics: bookkeeping, generation, training losses.
_IGNORED = (
    *("_name_or_path", "bos_token_id", "dtype", "eos_token_id", "is_llama_config", "output_router_logits", "pad_token_id"),
    *("pretraining_tp", "router_aux_loss_coef", "torch_dtype", "transformers.js_config", "transformers_version", "use_cache"),
    *("max_window_layers", "moe_train", "llama_4_scaling"),
)
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def read_model_config(directory: str | Path) -> config.Model:
    """Read the architecture from a model's directory (or its `config.json`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the architecture is not implemented here; the message names the field.
    """
    file = Path(directory)
    file = file / CONFIG_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory with a Hugging Face model's config.json")
    fields = read_object(file)
    try:
        return _model(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}".replace("Value error, ", "")) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _model(fields: dict[str, Any]) -> config.Model:
    names = fields.get("architectures") or []
    if len(names) == 1 and names[0] in _WRAPPERS:
        tied: dict[str, Any] = {}
        if "tie_word_embeddings" in fields:
            tied["tie_word_embeddings"] = fields["tie_word_embeddings"]
        fields = {**tied, **(fields.get("text_config") or {}), "architectures": ["Ministral3ForCausalLM"]}
        if fields.get("model_type") != "ministral3":
            raise ValueError(f"text_config.model_type is {fields.get('model_type')!r}; of vision models, ministral3's text is read")
    elif len(names) != 1 or names[0] not in _FAMILIES:
        raise ValueError(f"architectures is {names}; read are {', '.join((*_FAMILIES, *_WRAPPERS))}")
    family = _FAMILIES[fields["architectures"][0]]
    for key, allowed in _ONLY.items():
        if fields.get(key, allowed[0]) not in (*allowed, None):
            raise ValueError(f"{key} is {fields[key]!r}, which is not built here; it has to be {allowed[0]!r}")
    if unknown := sorted(set(fields) - set(_READ) - set(_ONLY) - set(_IGNORED)):
        log.warning(
            "config.json has fields that are not read here: %s; make sure that they leave the model alone", ", ".join(unknown)
        )

    def stated(key: str) -> Any:
        if fields.get(key) is None:
            raise ValueError(_not_stated(key))
        return fields[key]

    heads = stated("num_attention_heads")
    layers = stated("num_hidden_layers")
    row = config.FAMILIES[family]
    fields = {**row.hugging_face.defaults, **fields}
    rope, query_scaling = _rope(fields)
    attention = {
        "name": "gqa",
        "num_heads": heads,
        "num_kv_heads": _num_kv_heads(row, fields, heads),
        "head_dim": fields.get("head_dim") or stated("hidden_size") // heads,
        "windows": _windows(row, fields, layers),
        "query_scaling": query_scaling,
    }
    ffn: dict[str, Any] = {"name": "dense", "ffn_dim": stated("intermediate_size")}
    if row.sparse:
        experts = {"num_experts": stated("num_local_experts"), "experts_per_token": stated("num_experts_per_tok")}
        ffn = {**ffn, **experts, "name": "moe"}
    return config.Model.model_validate(
        {
            "family": family,
            "vocab_size": stated("vocab_size"),
            "model_dim": stated("hidden_size"),
            "num_layers": layers,
            "attention": attention,
            "ffn": ffn,
            "rope": rope,
            "norm_eps": stated("rms_norm_eps"),
            "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
            "max_seq_len": stated("max_position_embeddings"),
            "init_stddev": fields.get("initializer_range") or 0.02,
        }
    )


def _not_stated(key: str) -> str:
    return f"{key} is not stated, and its default differs between versions of the library; add it"


def _num_kv_heads(family: config.Family, fields: dict[str, Any], num_heads: int) -> int:
    if fields.get("num_key_value_heads"):
        return fields["num_key_value_heads"]
    if "num_key_value_heads" in family.hugging_face.defaults:
        return num_heads
    raise ValueError(_not_stated("num_key_value_heads"))


def _windows(family: config.Family, fields: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return the shortest period of windows; `layer_types` names the layers that have one."""
    if "window" not in family.features:
        return (None,)
    if "sliding_window" not in fields:
        raise ValueError(f"{_not_stated('sliding_window')} (null: none)")
    window = fields.get("sliding_window")
    kinds = fields.get("layer_types")
    if not kinds:  # one window for all layers; not expanded, since a damaged file may state a huge number of layers
        return (window,)
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {sorted(unknown)[0]!r}; built are full_attention and sliding_attention")
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers {layers}")
    if "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types has sliding_attention, but sliding_window is null")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    period = next(n for n in range(1, layers + 1) if layers % n == 0 and windows[:n] * (layers // n) == windows)
    return windows[:period]


def _rope(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read rotary positions and query scaling from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope_fields = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    kind = rope_fields.get("rope_type", rope_fields.get("type", "default"))
    theta = rope_fields.get("rope_theta", fields.get("rope_theta"))
    if theta is None:
        raise ValueError("rope_theta is stated neither on its own nor in rope_parameters; add it")
    known_keys = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "llama_4_scaling_beta", "max_position_embeddings"}
    known_keys |= {"original_max_position_embeddings"} | (set(_YARN) if kind == "yarn" else set())
    if unknown := sorted(set(rope_fields) - known_keys):
        raise ValueError(f"rope_parameters.{unknown[0]} is not built here; understood are {', '.join(sorted(known_keys))}")
    if rope_fields.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"rope_parameters.partial_rotary_factor is {rope_fields['partial_rotary_factor']}, which is not built here"
        )
    original = rope_fields.get("original_max_position_embeddings")
    scaling = None
    if beta := rope_fields.get("llama_4_scaling_beta"):
        scaling = {"beta": float(beta), "original_max_seq_len": original}
    if kind == "default":
        return {"name": "default", "theta": float(theta)}, scaling
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r}; built are default and yarn")
    if missing := [key for key in _YARN[:2] if key not in rope_fields]:
        raise ValueError(f"rope_parameters.{missing[0]} is missing, which yarn needs")
    yarn = {key: float(rope_fields[key]) for key in _YARN if key in rope_fields and key != "original_max_position_embeddings"}
    # Unless both are stated, transformers uses 0.1 * log(factor) + 1, which mscale 1 over mscale_all_dim 0 gives too.
    if not (rope_fields.get("mscale") and rope_fields.get("mscale_all_dim")):
        yarn |= {"mscale": 0.0, "mscale_all_dim": 0.0}
    return {"name": "yarn", "theta": float(theta), **yarn, "original_max_seq_len": original}, scaling


def write_model_config(
    model: config.Model,
    *,
    dtype: config.Dtype,
    bos_token_id: int | None,
    eos_token_id: int | None,
    pad_token_id: int | None = None,
    router_aux_loss_coef: float = 0.0,
) -> dict[str, Any]:
    """Return the `config.json` of an export, with old and new spellings side by side and every default stated."""
    a = model.attention
    fields: dict[str, Any] = {
        "architectures": [config.FAMILIES[model.family].hugging_face.architecture],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "intermediate_size": model.ffn.ffn_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_stddev,
        "max_position_embeddings": model.max_seq_len,
        "rope_theta": model.rope.theta,
        "rope_parameters": _rope_parameters(model),
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    family = config.FAMILIES[model.family]
    fields |= family.hugging_face.fixed
    if "window" in family.features:
        fields["sliding_window"] = next((window for window in a.windows if window is not None), None)
    if "interleaved_windows" in family.features:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in a.windows]
        fields["layer_types"] = kinds * (model.num_layers // len(kinds))
    if a.query_scaling is not None:  # vLLM reads this and not rope_parameters (vllm/model_executor/models/mistral.py)
        original = a.query_scaling.original_max_seq_len
        fields["llama_4_scaling"] = {"beta": a.query_scaling.beta, "original_max_position_embeddings": original}
    if isinstance(model.ffn, config.MoeFfn):
        fields |= {
            "num_local_experts": model.ffn.num_experts,
            "num_experts_per_tok": model.ffn.experts_per_token,
            "router_aux_loss_coef": router_aux_loss_coef,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
        }
    check_expressible(model)
    return fields


def check_expressible(model: config.Model) -> None:
    """Raise ValueError if a Hugging Face `config.json` cannot express `model`."""
    windows = {window for window in model.attention.windows if window is not None}
    if len(windows) > 1:
        raise ValueError(f"attention.windows has {sorted(windows)}; a config.json has one size of window")
    scaling = model.attention.query_scaling
    rope = model.rope
    if scaling and isinstance(rope, config.YarnRope) and scaling.original_max_seq_len != rope.original_max_seq_len:
        raise ValueError(
            f"attention.query_scaling.original_max_seq_len {scaling.original_max_seq_len} differs from rope's "
            f"{rope.original_max_seq_len}; a config.json has one for both"
        )
    if config.FAMILIES[model.family].hugging_face.heads_divide_model_dim and model.model_dim % model.attention.num_heads:
        raise ValueError(
            f"model_dim {model.model_dim} is not a multiple of num_heads {model.attention.num_heads}, as transformers wants"
        )


def _rope_parameters(model: config.Model) -> dict[str, Any]:
    rope = model.rope
    scaling = model.attention.query_scaling
    parameters: dict[str, Any] = {"rope_type": rope.name, "rope_theta": float(rope.theta)}
    if isinstance(rope, config.YarnRope):
        parameters |= {
            "factor": float(rope.factor),
            "original_max_position_embeddings": rope.original_max_seq_len,
            "beta_fast": float(rope.beta_fast),
            "beta_slow": float(rope.beta_slow),
            "mscale": float(rope.mscale),
            "mscale_all_dim": float(rope.mscale_all_dim),
        }
    if "query_scaling" in config.FAMILIES[model.family].features:  # transformers always applies it
        original = scaling.original_max_seq_len if scaling else model.max_seq_len
        parameters = {
            "original_max_position_embeddings": original,
            **parameters,
            "llama_4_scaling_beta": scaling.beta if scaling else 0.0,
        }
    return parameters
