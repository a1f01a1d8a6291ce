"""What the path of a parameter means: its module, its layer, whether it belongs to an adapter, a router or an expert."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from moe_train import config


def is_bias(path: str) -> bool:
    """True for the path of a router's bias, which a rule moves and no gradient."""
    return path.endswith(".router.bias")


def is_of_experts(path: str) -> bool:
    """True for the path of routed experts' weights and adapters, in a sparse model."""
    return ".ffn." in path and ".router." not in path and ".shared." not in path


def is_lora(path: str) -> bool:
    """True for the path of an adapter's array."""
    return path.endswith((".lora_a", ".lora_b"))


def is_trainable(path: str, lora: config.Lora) -> bool:
    """True for the path of an adapter's array, and of a weight that is trained in full beside the adapters."""
    return is_lora(path) or any(names_module(pattern, module_of(path)) for pattern in lora.train)


def module_of(path: str) -> str:
    """`stacks.0.layers.1.ffn.router.lora_a` -> `ffn.router`; `final_norm.scale` -> `final_norm`."""
    parts = path.split(".")[:-1]
    return ".".join(parts[4:] if parts[0] == "stacks" else parts)


def names_module(pattern: str, module: str) -> bool:
    """Whether a pattern of the section `lora` names a module."""
    return pattern == module if module in config.NAMED_IN_FULL else fnmatchcase(module, pattern)


def targets_of(lora: config.Lora, module: str) -> list[config.LoraTarget]:
    """The targets that put the adapter beside a module: one, or several that share its experts."""
    return [target for target in lora.targets if any(names_module(pattern, module) for pattern in target.modules)]


def _path(keys: tuple[Any, ...]) -> str:
    """Key path of the pytree -> `stacks.0.layers.0.attention.q_proj.weight`; a Param's own `.value` is left out."""
    names = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in keys]
    return ".".join(names[:-1] if names[-1] == "value" else names)


def _kind(path: str) -> str:
    if path.endswith(".scale"):
        return "norms"
    if path.endswith(".bias"):
        return "biases"
    if ".router." in path:
        return "router"
    if path.startswith(("embed.", "head")):
        return "embeddings"
    return "matrices"
