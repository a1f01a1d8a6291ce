"""Whether the settings of a PEFT adapter describe the modules that its tensors belong to, as PEFT decides it.

PEFT builds the modules that the settings select, and then leaves out every tensor that belongs to none of them, with a warning.
The tensors are read here whatever the settings say, so a file whose two halves disagree is named. Another rank than the settings
state is refused, as PEFT does: vLLM would divide alpha by the rank of the settings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moe_train.machine.files import JsonObject
from moe_train.weights.on_disk import FileTensor
from moe_train.weights.peft.pieces import ADAPTER_CONFIG
from moe_train.weights.peft.settings import rank_of

_STEM = re.compile(r"(base_model\.model\.)?(?P<module>.*?)(\.base_layer)*\.lora_(embedding_)?(?P<matrix>[AB])(\.weight)?")
_LAYER = re.compile(r"\.(?P<pattern>[^.]*)\.(?P<layer>\d+)\.")
_CONVERTED = (".experts", "block_sparse_moe", ".mlp.gate")
"""Parts of the names of experts and routers, whose targets PEFT converts between the names of two versions of transformers."""
_FUSED = ".mlp.experts"
"""End of the name of a module that holds all experts, whose rank its shape alone does not show."""
_ENDS = ("embed_tokens", "lm_head")


def unselected_modules(tensors: Collection[str], settings: Mapping[str, Any]) -> list[str]:
    """Return the modules with adapters that the settings do not select; experts and routers are not looked at.

    Args:
        tensors: names of the tensors.
        settings: adapter_config.json.
    """
    modules = {module for module in _modules(tensors) if not any(part in module for part in _CONVERTED)}
    return sorted(module for module in modules if not _is_selected(module, settings))


def num_modules(tensors: Collection[str]) -> int:
    """Return the number of modules with adapters, given the names of the tensors."""
    return len(_modules(tensors))


def _modules(tensors: Collection[str]) -> set[str]:
    matches = (_STEM.fullmatch(name) for name in tensors)
    return {match["module"] for match in matches if match}


def check_ranks(file: Path, tensors: Mapping[str, FileTensor], settings: JsonObject) -> None:
    """Raise ValueError if an adapter has another rank than the settings state; `fused` does so for all experts in one matrix.

    Args:
        file: the tensors' file, for messages.
        tensors: the tensors by name.
        settings: adapter_config.json.
    """
    for name, tensor in tensors.items():
        match = _STEM.fullmatch(name)
        if match is None or match["module"].endswith(_FUSED) or len(tensor.shape) != 2:
            continue
        rank = tensor.shape[0 if match["matrix"] == "A" else 1]
        stated = rank_of(settings, match["module"])
        if rank != stated:
            raise ValueError(
                f"{file}: {name} has rank {rank}, but r and rank_pattern of {ADAPTER_CONFIG} state {stated} for it, with which "
                "PEFT cannot load it; correct them"
            )


def _is_selected(module: str, settings: Mapping[str, Any]) -> bool:
    """Return whether PEFT puts an adapter on a module (`check_target_module_exists` in peft/tuners/tuners_utils.py)."""
    if any(f".{module}.weight".endswith(f".{name}") for name in settings.get("target_parameters") or ()):
        return True
    if settings.get("ensure_weight_tying") and module.endswith(_ENDS):
        return True  # the other end of a tied table is adapted with it
    targets = settings.get("target_modules")
    if _matches(module, settings.get("exclude_modules")) or not _matches(module, targets):
        return False
    layers = settings.get("layers_to_transform")
    if isinstance(targets, str) or layers is None or layers == []:
        return True
    match = _LAYER.search(f".{module}")
    patterns = settings.get("layers_pattern")
    if match is None or (patterns and match["pattern"] not in ([patterns] if isinstance(patterns, str) else patterns)):
        return False
    return int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)


def _matches(module: str, targets: Any) -> bool:
    """Return whether a regular expression matches a whole name, or one of a list of names is the end of it."""
    if not targets:
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets)
