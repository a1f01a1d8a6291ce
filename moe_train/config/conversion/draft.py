"""A config of another trainer while it is read, and our config while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from moe_train.config.conversion.values import as_names, as_number
from moe_train.config.other_trainers import remark
from moe_train.config.strict_yaml import shown


class Draft:
    """Our config in the making: its sections as plain values, and remarks about what has no equivalent.

    Args:
        theirs: the keys and values of the other trainer's config.
        folder: where its file is.
    """

    def __init__(self, theirs: Mapping[str, Any], folder: Path = Path()):
        self.folder = folder
        self.tree: dict[str, Any] = {}
        self.remarks: list[str] = []
        self._unread = dict(theirs)
        self._devices = 1

    def __contains__(self, name: str) -> bool:
        """Return whether a key of theirs is stated and not read yet."""
        return self._unread.get(name) is not None

    def peek(self, name: str) -> Any:
        """Return the value of a key that is read elsewhere; None if it is not stated, or was read."""
        return self._unread.get(name)

    def take(self, *names: str, default: Any = None) -> Any:
        """Return the value of the first of these keys that is stated and not null, and mark all of them as read."""
        result = default
        is_found = False
        for name in names:
            value = self._unread.pop(name, None)
            if value is not None and not is_found:
                result = value
                is_found = True
        return result

    def number(self, *names: str, default: float | None = None) -> float | None:
        """Return the value of a key as a number; YAML 1.1 reads `1e-4` as text."""
        value = self.take(*names, default=default)
        if value is None:
            return None
        return as_number(names[0], value)

    def whole(self, *names: str, default: int | None = None) -> int | None:
        """Return the value of a key as a whole number."""
        value = self.number(*names, default=default)
        if value is not None and value != int(value):
            raise ValueError(f"{names[0]} has to be a whole number (value {shown(value)})")
        return None if value is None else int(value)

    def flag(self, *names: str) -> bool:
        """Return whether a key is true; `auto`, which several trainers have, counts as true."""
        return self.take(*names, default=False) in (True, "true", "True", "auto")

    def assume(self, **defaults: Any) -> None:
        """Take these values for keys that theirs leaves out, whose default is not ours."""
        for name, value in defaults.items():
            if self._unread.get(name) is None:
                self._unread[name] = value

    def put(self, path: str, value: Any) -> None:
        """Set one of our keys, given its dotted path, unless the value is None."""
        if value is None:
            return
        *sections, key = path.split(".")
        tree = self.tree
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[key] = value

    def note(self, name: str, reason: str) -> None:
        """Record why one of their keys is not written, or is written in another way."""
        self.remarks.append(f"{name}: {reason}")

    def finish(self) -> None:
        """Record every key that nobody has read; those that are null, false or empty say nothing."""
        for name, value in self._unread.items():
            if value in (None, False, "", [], {}):
                continue
            reason = remark(name) or "moe_train has no such setting"
            self.note(name, f"{reason} (value {shown(value)})")
        self._unread.clear()


def local_model(draft: Draft, name: str) -> str:
    """Return the directory of a model; a name on the Hugging Face Hub becomes a directory to download it to."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return name
    directory = f"models/{PurePosixPath(name).name}"
    draft.note("init_from", f"models are read from a directory; download it: hf download {name} --local-dir {directory}")
    return directory


LAYERS = {
    "q_proj": "attention.q_proj",
    "k_proj": "attention.k_proj",
    "v_proj": "attention.v_proj",
    "o_proj": "attention.o_proj",
    "gate_proj": "ffn.gate_proj",
    "up_proj": "ffn.up_proj",
    "down_proj": "ffn.down_proj",
    "w1": "ffn.gate_proj",
    "w3": "ffn.up_proj",
    "w2": "ffn.down_proj",
    "gate_up_proj": "ffn.gate_proj",
    "q_a_proj": "attention.q_a_proj",
    "q_b_proj": "attention.q_b_proj",
    "kv_a_proj_with_mqa": "attention.kv_a_proj",
    "kv_b_proj": "attention.kv_b_proj",
    "gate": "ffn.router",
    "router": "ffn.router",
    "lm_head": "head",
    "embed_tokens": "embed",
    "norm": "final_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Last part of a module's name in transformers -> our name of the module."""
EVERY_LINEAR = ("attention.*", "ffn.*")
"""Patterns for every linear map of a layer; the router is named only by its own name."""


def modules(draft: Draft, key: str, value: Any) -> list[str]:
    """Return our names of modules that a list, a comma-separated text or `all-linear` names."""
    result: list[str] = []
    for word in as_names(key, value):
        if word in ("all", "all-linear"):
            return list(EVERY_LINEAR)
        ours = LAYERS.get(word.rpartition(".")[2])
        if ours is None:
            draft.note(key, f"the module {word} is not known; `moe-train inspect` lists the modules of the model")
        elif ours not in result:
            result.append(ours)
            if word.endswith("gate_up_proj"):
                result.append("ffn.up_proj")
    return result
