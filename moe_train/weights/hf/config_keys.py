"""Which keys of a Hugging Face `config.json` are understood, and which of them describe the text model.

Every key is in one of the lists below. A key that is in none might change what the library computes, so it is refused unless it
switches nothing on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.fp8 import sections
from moe_train.weights.wrappers.classes import WRAPPERS, WrapperClass, wrapper_of_type

CONFIG_FILE = "config.json"
"""Name of the file that states a model's architecture."""

ARCHITECTURES = {family.hugging_face.architecture: name for name, family in config.FAMILIES.items() if "hf" in family.formats}
"""Families by the class of their text model."""
SCORING_ARCHITECTURES = {
    family.hugging_face.scoring_architecture: name
    for name, family in config.FAMILIES.items()
    if "score_head" in family.features & family.formats.get("hf", frozenset())
}
"""Families by the class of their text model with a head for classification or rewards."""
_CLASSES = ARCHITECTURES | SCORING_ARCHITECTURES

# The only values whose meaning is implemented here.
_REQUIRED: JsonObject = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "router_jitter_noise": 0,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
    # False is what switches something on here, so these are not among the keys that may be false.
    "is_causal": True,
    "causal": True,
    "use_rope": True,
    "norm_topk_prob": True,
}
_READ = (
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rms_norm_eps", "layer_types"),
    *("rope_theta", "rope_parameters", "rope_scaling", "sliding_window", "tie_word_embeddings", "max_position_embeddings"),
    *("initializer_range", "quantization_config"),
)
_READ_OF_LATENT = (
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "n_routed_experts"),
    *("n_shared_experts", "moe_intermediate_size", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
)
"""Keys of models with multi-head latent attention alone."""
_REQUIRED_OF_LATENT: JsonObject = {
    "rope_interleave": True,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
}
_REMEDIES = {
    "num_nextn_predict_layers": "remove the tensors of the layers after the last, which predict further tokens, and set it to 0"
}
_REQUIRED_BY_FAMILY: dict[config.FamilyName, JsonObject] = {
    "mistral4": {"scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
"""Keys that older files state; transformers' class computes nothing else."""
# Fields that do not affect the mathematics: bookkeeping, generation, training losses.
_IGNORED = (
    *("_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "attribute_map", "dtype"),
    # The ids of control tokens are taken from the tokenizer.
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "tokenizer_class"),
    *("is_llama_config", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "torchscript"),
    *("pretraining_tp", "router_aux_loss_coef", "torch_dtype", "transformers.js_config", "transformers_version", "use_cache"),
    # llama_4_scaling repeats, for vLLM, what rope_parameters states.
    *("max_window_layers", "moe_train", "llama_4_scaling", "base_model_tp_plan", "base_model_pp_plan", "chunk_size_feed_forward"),
    *("finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "prefix", "license"),
    *("max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams"),
    *("num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty", "diversity_penalty", "early_stopping"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "begin_suppress_tokens", "suppress_tokens"),
    *("exponential_decay_length_penalty", "remove_invalid_values", "return_dict_in_generate", "output_scores"),
    *("forced_bos_token_id", "forced_eos_token_id", "model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side"),
    # Losses of DeepSeek's own training, and how its experts are distributed.
    *("aux_loss_alpha", "seq_aux", "ep_size"),
    *("unsloth_version", "unsloth_fixed", "neftune_noise_alpha", "is_composition"),
)
_LONGEST_VALUE = 60
"""Characters of a refused value that a message shows."""


def is_wrapper(directory: str | Path) -> bool:
    """Return whether the model in a directory is a multimodal model around a text model."""
    return find_wrapper(directory) is not None


def find_wrapper(directory: str | Path) -> WrapperClass | None:
    """Return the multimodal class of the model in a directory; None for a text model."""
    return wrapper_class(read_object(Path(directory) / CONFIG_FILE))


def wrapper_class(fields: JsonObject) -> WrapperClass | None:
    """Return the multimodal class that a `config.json` states; None if it states a text model, or a class without support."""
    architectures = fields.get("architectures")
    if not architectures:
        return wrapper_of_type(fields.get("model_type"))
    if isinstance(architectures, list) and len(architectures) == 1:
        return WRAPPERS.get(architectures[0])
    return None


def text_fields(fields: JsonObject) -> tuple[config.FamilyName, JsonObject]:
    """Return the family and the fields of the text model, after checking every key.

    Raises:
        ValueError: the architecture is not supported, or a key is not understood.
    """
    wrapper = wrapper_class(fields)
    if wrapper is not None:
        return _text_fields_of_wrapper(wrapper, fields)
    architectures = fields.get("architectures")
    if not architectures:  # transformers' Auto classes decide by model_type alone
        family = next((name for name in ARCHITECTURES.values() if name == fields.get("model_type")), None)
        if family is None:
            supported = ", ".join((*ARCHITECTURES.values(), *(row.model_type for row in WRAPPERS.values())))
            raise ValueError(
                f"architectures is not stated, and model_type is {fields.get('model_type')!r}; supported model types: {supported}"
                + _advice_for_wrapper(fields)
            )
    elif not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in _CLASSES:
        supported = ", ".join((*_CLASSES, *WRAPPERS))
        raise ValueError(f"architectures is {architectures}; supported: {supported}{_advice_for_wrapper(fields)}")
    else:
        family = _CLASSES[architectures[0]]
    _check_model_type(fields, family)
    _check_keys(fields, family)
    return family, fields


def _check_model_type(fields: JsonObject, model_type: str) -> None:
    """Raise ValueError if `model_type`, by which transformers decides, is not that of `architectures`, by which vLLM does."""
    stated = fields.get("model_type")
    if stated not in (None, model_type):
        raise ValueError(
            f"architectures is {fields.get('architectures')}, but model_type is {stated!r} and not {model_type!r}; correct the one "
            "that is wrong"
        )


def _text_fields_of_wrapper(wrapper: WrapperClass, fields: JsonObject) -> tuple[config.FamilyName, JsonObject]:
    """Return the family and the fields of the text model inside a multimodal model."""
    _check_model_type(fields, wrapper.model_type)
    _check_keys({key: value for key, value in fields.items() if key not in wrapper.keys})
    text = fields.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"text_config is {_shown(text)}, but {wrapper.architecture} needs an object there; restore the file")
    families = wrapper.families()
    family = next((name for name in config.FAMILIES if name == text.get("model_type") and name in families), None)
    if family is None:
        raise ValueError(
            f"text_config.model_type is {text.get('model_type')!r}; of {wrapper.architecture}, only text models of "
            f"{' and '.join(families)} are supported"
        )
    text = {**text, "tie_word_embeddings": _is_tied(wrapper, fields, text)}
    _check_keys(text, family)
    return family, text


def _is_tied(wrapper: WrapperClass, fields: JsonObject, text: JsonObject) -> bool:
    """Return whether the embeddings of the text model are tied, as transformers decides it for this class."""
    of_whole = None if fields.get("tie_word_embeddings") is None else stated_tie(fields)
    of_text = stated_tie(text)
    match wrapper.ties:
        case "whole":
            return of_text if of_whole is None else of_whole
        case "either":
            return bool(of_whole) or of_text
        case "never":
            return False


def stated_tie(fields: JsonObject) -> bool:
    """Return `tie_word_embeddings`, false where it is not stated. Raises ValueError if it is neither true nor false."""
    tied = fields.get("tie_word_embeddings")
    if tied is not None and type(tied) is not bool:
        raise ValueError(f"tie_word_embeddings is {tied!r}; it has to be true or false")
    return bool(tied)


def _advice_for_wrapper(fields: JsonObject) -> str:
    """Return what can be done with the text model of a multimodal class that is not supported; "" for other classes."""
    text = fields.get("text_config")
    if not isinstance(text, dict):
        return ""
    text_type = text.get("model_type")
    if text_type in ARCHITECTURES.values():
        return (
            f"; its text model is a {text_type}, which can be trained alone: save model.language_model in transformers "
            "(save_pretrained) and use that folder"
        )
    return f"; it is a multimodal class, and its text model (text_config.model_type {text_type!r}) is not supported either"


def _check_keys(fields: JsonObject, family: config.FamilyName | None = None) -> None:
    """Raise ValueError if a key that might change the mathematics has a value that is not implemented.

    Args:
        fields: the fields.
        family: the family of the text model that they describe; None for those of a wrapper alone.
    """
    read: tuple[str, ...] = _READ
    required_values = _REQUIRED
    if family is not None and "mla" in config.FAMILIES[family].required:
        read += _READ_OF_LATENT
        required_values = {**_REQUIRED, **_REQUIRED_OF_LATENT, **_REQUIRED_BY_FAMILY.get(family, {})}
    for key, required in required_values.items():
        if fields.get(key, required) not in (required, None):
            remedy = f"; {_REMEDIES[key]}" if key in _REMEDIES else ""
            raise ValueError(f"{key} is {_shown(fields[key])}, which is not implemented; it has to be {required!r}{remedy}")
    sections.find_section(fields)  # refuses quantizations that are not supported
    for key, value in fields.items():
        if key not in (*read, *required_values, *_IGNORED) and not _is_off(value):
            raise ValueError(
                f"{key} is {_shown(value)}, which is not understood and may change what the model computes; if it does not, "
                f"remove it from {CONFIG_FILE}"
            )


def _is_off(value: Any) -> bool:
    """Return whether the value of an unknown key switches nothing on."""
    return value is None or value is False or value in ([], {}, "")


def _shown(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
