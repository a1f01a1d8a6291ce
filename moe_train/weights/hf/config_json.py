"""Convert a Hugging Face `config.json` to `config.Model` and back.

Whatever would change the mathematics and is not implemented is an error. Defaults of the library have changed between versions,
so what a file does not state is derived only if every version agrees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never

from pydantic import ValidationError

from moe_train import config
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights import safetensors_files
from moe_train.weights.hf import latent, score_fields
from moe_train.weights.hf.config_keys import CONFIG_FILE, stated_tie, text_fields
from moe_train.weights.hf.config_problem import first_problem
from moe_train.weights.hf.rope_section import read_rope, rope_section
from moe_train.weights.on_disk import FloatDtype


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
    if _is_tied_against_its_files(file.parent, fields):
        fields["tie_word_embeddings"] = False
    try:
        model = _model(fields)
    except ValidationError as error:
        raise ValueError(f"{file}: {first_problem(error)}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error
    is_corrected = isinstance(model.attention, config.MultiHeadLatentAttention) and model.attention.scale_correction != "none"
    if model.family == "mistral4" and is_corrected and isinstance(model.rope, config.YarnRope):
        latent.warn_of_scale(str(file), model.rope.factor, model.rope.mscale_all_dim)
    return model


def _model(fields: JsonObject) -> config.Model:
    """Convert the fields of a `config.json`."""
    family_name, fields = text_fields(fields)
    num_layers = _stated(fields, "num_hidden_layers")
    family = config.FAMILIES[family_name]
    # Only defaults that every version of transformers agrees on are filled in.
    fields = {**family.hugging_face.defaults, **fields}
    rope_fields = rope_section(fields)
    if "mla" in family.required:
        correction, rope_fields = latent.read_scale(fields, rope_fields)
        rope, query_scaling = read_rope(fields, rope_fields)
        # The two may differ from those of other families: mscale_all_dim alone corrects the scale of scores.
        rope |= {key: rope_fields[key] for key in ("mscale", "mscale_all_dim") if rope["name"] == "yarn"}
        attention = latent.read_attention(fields, query_scaling, correction)
        ffn = latent.read_ffn(family_name, fields)
    else:
        rope, query_scaling = read_rope(fields, rope_fields)
        attention = _grouped_query(family, fields, num_layers, query_scaling)
        ffn = _ffn(family, fields)
    scores = score_fields.read_scores(fields)
    return config.Model.model_validate(
        {
            "family": family_name,
            "vocab_size": _stated(fields, "vocab_size"),
            "model_dim": _stated(fields, "hidden_size"),
            "num_layers": num_layers,
            "attention": attention,
            "ffn": ffn,
            "rope": rope,
            "norm_eps": _stated(fields, "rms_norm_eps"),
            # A head for scores is no part of the vocabulary's.
            "tie_embeddings": scores is None and stated_tie(fields),
            "scores": scores,
            "max_seq_len": _stated(fields, "max_position_embeddings"),
            "init_stddev": fields.get("initializer_range") or 0.02,
        }
    )


def _is_tied_against_its_files(directory: Path, fields: JsonObject) -> bool:
    """Return whether a wrapper's default ties the embeddings although the files have a head, which transformers then uses."""
    text = fields.get("text_config")
    if not (fields.get("tie_word_embeddings") and isinstance(text, dict) and text.get("tie_word_embeddings") is False):
        return False
    if not safetensors_files.has_model(directory):
        return False
    return any(name.endswith("lm_head.weight") for name in safetensors_files.open_model_tensors(directory))


def _grouped_query(family: config.Family, fields: JsonObject, num_layers: int, query_scaling: JsonObject | None) -> JsonObject:
    """Return the section `attention` of a model with grouped-query attention."""
    num_heads = _stated(fields, "num_attention_heads")
    return {
        "name": "gqa",
        "num_heads": num_heads,
        "num_kv_heads": _num_kv_heads(family, fields, num_heads),
        # Older files state none and have the quotient; Mistral Nemo, for one, has another size and states it.
        "head_dim": _stated(fields, "hidden_size") // num_heads if fields.get("head_dim") is None else fields["head_dim"],
        "windows": _windows(family, fields, num_layers),
        "query_scaling": query_scaling,
    }


def _ffn(family: config.Family, fields: JsonObject) -> JsonObject:
    """Return the section `ffn` of a dense model or a Mixtral."""
    ffn = {"name": "dense", "ffn_dim": _stated(fields, "intermediate_size")}
    if family.sparse:
        ffn["name"] = "moe"
        ffn["num_experts"] = _stated(fields, "num_local_experts")
        ffn["experts_per_token"] = _stated(fields, "num_experts_per_tok")
    return ffn


def _stated(fields: JsonObject, key: str) -> Any:
    """Return the value of a field. Raises ValueError if it is missing or null."""
    if fields.get(key) is None:
        raise ValueError(_not_stated(key))
    return fields[key]


def _not_stated(key: str) -> str:
    return f"{key} is not stated, and its default differs between versions of the library; add it"


def _num_kv_heads(family: config.Family, fields: JsonObject, num_heads: int) -> int:
    """Return the number of key and value heads, which equals that of query heads where the family defaults to it."""
    if fields.get("num_key_value_heads") is not None:
        return fields["num_key_value_heads"]
    if "num_key_value_heads" in family.hugging_face.defaults:
        return num_heads
    raise ValueError(_not_stated("num_key_value_heads"))


def _windows(family: config.Family, fields: JsonObject, num_layers: int) -> tuple[int | None, ...]:
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
        raise ValueError(f"layer_types has {sorted(unknown)[0]!r}; supported: full_attention, sliding_attention")
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers {num_layers}; state one for each layer")
    if "sliding_attention" in kinds and window is None:
        raise ValueError("layer_types has sliding_attention, but sliding_window is null; state the size of the window")
    if window is not None and set(kinds) == {"full_attention"} and "interleaved_windows" not in family.features:
        raise ValueError(
            f"layer_types has full_attention, but sliding_window is {window}, which transformers applies to every layer of "
            f"{family.hugging_face.architecture}; set it to null, or state MinistralForCausalLM"
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    for period in range(1, num_layers):
        if num_layers % period == 0 and windows[:period] * (num_layers // period) == windows:
            return windows[:period]
    return windows


def write_model_config(
    model: config.Model,
    *,
    dtype: FloatDtype,
    bos_token_id: int | None,
    eos_token_id: int | None,
    pad_token_id: int | None = None,
    router_aux_loss_coef: float = 0.0,
) -> JsonObject:
    """Return the `config.json` of an export, with old and new spellings side by side and every default stated."""
    check_expressible(model)
    fields: JsonObject = {
        "architectures": [score_fields.class_name(model)],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.model_dim,
        "num_hidden_layers": model.num_layers,
        **_attention_and_ffn(model, router_aux_loss_coef),
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
    if model.scores is not None:
        fields |= score_fields.write_scores(model.scores)
    a = model.attention
    if "window" in family.features:
        fields["sliding_window"] = next((window for window in a.windows if window is not None), None)
    if "interleaved_windows" in family.features:
        # transformers expects an entry for each layer, while our windows are one period of layers.
        kinds = ["full_attention" if window is None else "sliding_attention" for window in a.windows]
        fields["layer_types"] = kinds * (model.num_layers // len(kinds))
    if a.query_scaling is not None:  # vLLM reads this and not rope_parameters (vllm/model_executor/models/mistral.py)
        original = a.query_scaling.original_max_seq_len
        fields["llama_4_scaling"] = {"beta": a.query_scaling.beta, "original_max_position_embeddings": original}
    return fields


def _attention_and_ffn(model: config.Model, router_aux_loss_coef: float) -> JsonObject:
    """Return the sizes of attention and of the feed-forward layers."""
    a = model.attention
    ffn = model.ffn
    match a:
        case config.MultiHeadLatentAttention():
            assert isinstance(ffn, config.MoeFfn)  # as the families of latent attention are
            return latent.write_fields(model, a, ffn)
        case config.GroupedQueryAttention():
            fields: JsonObject = {
                "intermediate_size": ffn.ffn_dim,
                "num_attention_heads": a.num_heads,
                "num_key_value_heads": a.num_kv_heads,
                "head_dim": a.head_dim,
            }
        case _:
            assert_never(a)
    if isinstance(ffn, config.MoeFfn):
        fields |= {
            "num_local_experts": ffn.num_experts,
            "num_experts_per_tok": ffn.experts_per_token,
            "router_aux_loss_coef": router_aux_loss_coef,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
        }
    return fields


def check_expressible(model: config.Model) -> None:
    """Raise ValueError if a Hugging Face `config.json` cannot express `model`."""
    windows = {window for window in model.attention.windows if window is not None}
    if len(windows) > 1:
        raise ValueError(f"attention.windows has the sizes {sorted(windows)}; a config.json can state only one")
    scaling = model.attention.query_scaling
    rope = model.rope
    if scaling and isinstance(rope, config.YarnRope) and scaling.original_max_seq_len != rope.original_max_seq_len:
        raise ValueError(
            f"attention.query_scaling.original_max_seq_len {scaling.original_max_seq_len} differs from rope's "
            f"{rope.original_max_seq_len}; a config.json has one value for both"
        )
    if config.FAMILIES[model.family].hugging_face.heads_divide_model_dim and model.model_dim % model.attention.num_heads:
        raise ValueError(
            f"model_dim {model.model_dim} is not a multiple of num_heads {model.attention.num_heads}, which transformers requires"
        )


def _rope_parameters(model: config.Model) -> JsonObject:
    """Return `rope_parameters` as transformers 5 spells them."""
    rope = model.rope
    scaling = model.attention.query_scaling
    parameters: JsonObject = {"rope_type": rope.name, "rope_theta": float(rope.theta)}
    if isinstance(rope, config.YarnRope):
        parameters |= {
            "factor": float(rope.factor),
            "original_max_position_embeddings": rope.original_max_seq_len,
            "beta_fast": float(rope.beta_fast),
            "beta_slow": float(rope.beta_slow),
            "mscale": float(rope.mscale),
            "mscale_all_dim": float(rope.mscale_all_dim),
        }
        if isinstance(model.attention, config.MultiHeadLatentAttention):
            parameters |= latent.write_scale(model, model.attention, rope)
    if "query_scaling" in config.FAMILIES[model.family].features:  # transformers always applies it
        original = model.max_seq_len
        beta = 0.0  # no scaling
        if scaling is not None:
            original = scaling.original_max_seq_len
            beta = scaling.beta
        # YaRN's own original length takes precedence; where queries are scaled too, `check_expressible` has found the two equal.
        parameters = {"original_max_position_embeddings": original, **parameters, "llama_4_scaling_beta": beta}
    return parameters
