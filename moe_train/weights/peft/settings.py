"""Read and check adapter_config.json.

Every key is in one of the lists below. A key that changes what PEFT computes is refused unless it has the value that is
implemented here, and so is a key that is in no list, whatever tool wrote it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from moe_train.machine.files import JsonObject, read_object
from moe_train.weights.peft.pieces import ADAPTER_CONFIG

MERGE_FIRST = (
    "merge it in PEFT first (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)) and use the merged "
    "model"
)
"""The remedy for every adapter that only PEFT itself can compute."""

_REQUIRED: JsonObject = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "megatron_config": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
"""Keys for which only one value is implemented."""
_READ = (
    *("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "modules_to_save", "target_parameters"),
    *("init_lora_weights", "bias", "peft_version", "r", "rank_pattern"),
)
# Keys that do not change what a trained adapter computes: what the tensors state themselves, bookkeeping, and options of training
# or of a method that another key switches on.
_IGNORED = (
    *("target_modules", "exclude_modules", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *(
        "inference_mode",
        "ensure_weight_tying",
        # The tensors show in which layers there are adapters.
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
    ),
    *("corda_config", "lora_ga_config", "velora_config", "runtime_config"),
)
_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights with which PEFT leaves the base as it is when it loads an adapter."""
_DEFAULT_RANK = 8
"""PEFT's value of r where none is stated."""
_WITHOUT_WEIGHTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""Values of peft_type that cannot be merged into the weights of a model."""
_FUSED_PARAMETERS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""Parameters of transformers 5 that are no weights of linear maps, by their names in a layer."""


def read_settings(directory: Path) -> JsonObject:
    """Read the settings of an adapter.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: the settings are malformed or not supported.
    """
    file = directory / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory with a PEFT adapter")
    settings = read_object(file)
    for key in ("target_parameters", "modules_to_save"):
        entries = settings.get(key) or []
        if not isinstance(entries, list) or not all(isinstance(name, str) for name in entries):
            raise ValueError(f"{file}: {key} is {entries!r}; it has to be a list of names")
    _check_method(file, settings)
    _check_alphas(file, settings)
    _check_ranks(file, settings)
    _check_types(file, settings)
    for key, value in settings.items():
        if key not in (*_READ, *_IGNORED) and not _is_off(key, value):
            raise ValueError(f"{file}: {key} is {value!r}, which is not supported; {MERGE_FIRST}")
    for name in settings.get("target_parameters") or ():
        # PEFT matches a name against the end of a parameter's name, from a dot on. The tensors show which weights these are.
        is_fused = any(f"model.layers.0.{parameter}".endswith(f".{_in_first_layer(name)}") for parameter in _FUSED_PARAMETERS)
        if not is_fused and (not name.endswith(".weight") or name.endswith("norm.weight")):
            supported = ", ".join(_FUSED_PARAMETERS)
            raise ValueError(
                f"{file}: target_parameters has {name!r}; supported are {supported}, ends of these, and weights of linear maps; "
                f"{MERGE_FIRST}"
            )
    return settings


def _in_first_layer(name: str) -> str:
    """Return the name of the same parameter in layer 0."""
    return re.sub(r"layers\.\d+\.", "layers.0.", name).removeprefix("model.")


def _check_method(file: Path, settings: JsonObject) -> None:
    """Raise ValueError unless the adapter is a LoRA, and one that PEFT adds to an unchanged base."""
    method = settings.get("peft_type")
    if method is None:
        raise ValueError(f'{file}: peft_type is not stated, which PEFT needs; add "peft_type": "LORA" if it is a LoRA')
    if method in _WITHOUT_WEIGHTS:
        raise ValueError(f"{file}: peft_type is {method!r}, which adds no weights that could be merged; only 'LORA' is supported")
    if method != "LORA":
        raise ValueError(f"{file}: peft_type is {method!r}, which is not supported; {MERGE_FIRST}")
    initialization = settings.get("init_lora_weights", True)
    if not any(initialization is value or initialization == value for value in _INITIALIZATIONS):
        raise ValueError(
            f"{file}: init_lora_weights is {initialization!r}, with which PEFT changes the base when it loads the adapter; convert "
            "the adapter in PEFT (save_pretrained with path_initial_model_for_weight_conversion), or "
            + MERGE_FIRST.replace("merge it in PEFT first", "merge it in PEFT")
        )
    # Models here have no biases, so the other values select nothing; biases in the file are refused by their names.
    if settings.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{file}: bias is {settings['bias']!r}; it has to be 'none', 'all' or 'lora_only'")


def _is_off(key: str, value: Any) -> bool:
    """Return whether a key has the only value that is implemented or, if it is in no list, one that switches nothing on."""
    if key in _REQUIRED and value == _REQUIRED[key]:
        return True
    return value is None or value is False or value in ([], {})


def _check_types(file: Path, settings: JsonObject) -> None:
    """Raise ValueError if a setting that is read has another type than PEFT writes."""
    if settings.get("use_rslora") not in (None, True, False):
        raise ValueError(f"{file}: use_rslora is {settings['use_rslora']!r}; it has to be true or false")
    dropout = settings.get("lora_dropout") or 0.0
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"{file}: lora_dropout is {dropout!r}; it has to be a number from 0 up to, but not including, 1")
    for key in ("target_modules", "exclude_modules"):
        targets = settings.get(key)
        try:
            re.compile(targets if isinstance(targets, str) else "")
        except re.error as error:
            raise ValueError(f"{file}: {key} is {targets!r}, which is not a regular expression: {error}") from error
    if settings.get("layers_pattern") and settings.get("layers_to_transform") is None:
        raise ValueError(
            f"{file}: layers_pattern is {settings['layers_pattern']!r} without layers_to_transform, which PEFT refuses; remove it"
        )


def _check_ranks(file: Path, settings: JsonObject) -> None:
    """Raise ValueError unless every rank is a positive whole number, and every key of the pattern a regular expression."""
    patterns = settings.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: rank_pattern is {patterns!r}; it has to be an object")
    for key, rank in {"r": settings.get("r", _DEFAULT_RANK), **patterns}.items():
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{file}: {key} is {rank!r}; a rank has to be a positive whole number")
        _check_pattern(file, "rank_pattern", key)


def _check_alphas(file: Path, settings: JsonObject) -> None:
    """Raise ValueError unless every alpha is a positive number, and every key of the patterns a regular expression."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: alpha_pattern is {patterns!r}; it has to be an object")
    for key, alpha in {"lora_alpha": settings.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ValueError(f"{file}: {key} is {alpha!r}; an alpha has to be a positive number")
        _check_pattern(file, "alpha_pattern", key)


def _check_pattern(file: Path, name: str, key: str) -> None:
    """Raise ValueError unless a key of a pattern is a regular expression."""
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(f"{file}: {name} has {key!r}, which is not a regular expression: {error}") from error


def alpha_of(settings: JsonObject, module: str) -> float:
    """Return the alpha of a module by its name in the model: that of the first matching pattern, else lora_alpha."""
    return float(_value_of(settings, module, "alpha_pattern", settings["lora_alpha"]))


def rank_of(settings: JsonObject, module: str) -> int:
    """Return the rank that PEFT gives the adapter of a module by its name in the model."""
    return int(_value_of(settings, module, "rank_pattern", settings.get("r", _DEFAULT_RANK)))


def names_in_patterns(module: str) -> tuple[str, ...]:
    """Return the names under which PEFT looks for a module in its patterns, that of transformers 4 first.

    Routed experts and routers have another name in transformers 5. There gate and up are one parameter, whose rank and alpha PEFT
    takes from r and lora_alpha, whatever the patterns say (`_convert_peft_config_moe` in transformers_weight_conversion.py).
    """
    renamed = module.replace(".block_sparse_moe.", ".mlp.")
    if expert := re.fullmatch(r"(.*\.mlp\.experts)\.\d+\.(w2|down_proj)", renamed):
        return (module, f"{expert[1]}.down_proj")
    if renamed.endswith(".mlp.gate"):
        return (module, renamed, f"{renamed}.weight")
    return (module,)


def _value_of(settings: JsonObject, module: str, patterns: str, default: float) -> float:
    """Return the value of the first pattern that matches a module by its name in the model, else the default."""
    parameters = settings.get("target_parameters") or ()
    if any(f".{module}.weight".endswith(f".{name}") for name in parameters):
        module = f"{module}.weight"  # PEFT looks up the name of what it adapts, which is a parameter here
    for name in names_in_patterns(module):
        for key, value in (settings.get(patterns) or {}).items():
            # PEFT matches a pattern against the end of a module's name, from a dot on.
            if re.match(rf"(.*\.)?({key})$", name):
                return value
    return default
