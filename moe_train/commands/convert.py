"""`moe-train convert`: another trainer's config as a config of ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from moe_train.config import Config
from moe_train.config.conversion import axolotl, llama_factory, mistral_finetune, trl
from moe_train.config.conversion.draft import Draft
from moe_train.config.faults import explain_errors
from moe_train.config.strict_yaml import dotted, format_yaml
from moe_train.config.yaml_file import flat
from moe_train.machine.files import refuse_existing, write_text

TRAINERS: Mapping[str, Callable[[Draft, int], None]] = MappingProxyType(
    {"axolotl": axolotl.read, "llama-factory": llama_factory.read, "mistral-finetune": mistral_finetune.read, "trl": trl.read}
)
"""Name of a trainer -> the function that reads its config into a draft."""
_SIGNS = {
    "axolotl": ("base_model", "sequence_len", "micro_batch_size"),
    "llama-factory": ("finetuning_type", "cutoff_len", "stage"),
    "mistral-finetune": ("model_id_or_path", "optim", "instruct_data"),
    "trl": ("dataset_name", "use_peft", "max_length", "max_seq_length"),
}
"""Name of a trainer -> keys that only its configs have."""
_ORDER = ("name", "run_dir", "seed", "init_from", "lora", "data", "train", "optimizer", "loss", "compute", "evaluation")
"""The order of the sections in the file; others follow."""


class Conversion(NamedTuple):
    """What a conversion did."""

    trainer: str
    settings_written: int
    """Number of keys in the new file."""
    remarks: tuple[str, ...]
    """What has no equivalent or needs a look, one line each; the file has them as comments."""


def convert_config(theirs: Path, out: Path, trainer: str | None = None, devices: int = 1) -> Conversion:
    """Write a config of ours for one of another trainer.

    Args:
        theirs: its YAML file.
        out: the file to write.
        trainer: one of `TRAINERS`; None to recognize it by its keys.
        devices: number of devices that it ran on: theirs states a batch size per device, ours the whole one.

    Raises:
        ValueError: it is not the config of a trainer that is known, or one of its values cannot be read.
        FileExistsError: `out` exists.
    """
    refuse_existing(out)
    if not theirs.is_file():
        raise FileNotFoundError(f"{theirs}: no such file")
    try:
        tree = yaml.safe_load(theirs.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{theirs}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{theirs}: a config consists of `key: value` pairs")
    name = trainer or recognize(tree)
    draft = Draft({str(key): value for key, value in tree.items()}, theirs.parent)
    draft.put("name", _run_name(theirs.stem))
    try:
        TRAINERS[name](draft, devices)
    except ValueError as error:
        raise ValueError(f"{theirs}: {error}") from error
    draft.finish()
    for path, message in _faults(draft.tree):
        draft.remarks.append(f"it does not load yet: {dotted(path)}{message}")
    write_text(out, _text(draft, theirs, name))
    return Conversion(name, len(flat(draft.tree)), tuple(draft.remarks))


def recognize(tree: Mapping[str, Any]) -> str:
    """Return the name of the trainer whose keys a config has. Raises ValueError if it is unclear."""
    counts = {name: sum(key in tree for key in signs) for name, signs in _SIGNS.items()}
    best = max(counts, key=lambda name: counts[name])
    if counts[best] == 0 or list(counts.values()).count(counts[best]) > 1:
        raise ValueError(f"the trainer cannot be told from the keys; state it with --trainer: one of {', '.join(TRAINERS)}")
    return best


def _run_name(stem: str) -> str:
    """Return a file's name as the name of a run."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem).lstrip("._-") or "converted"


def _faults(tree: dict[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    """Return what still keeps the config from loading."""
    try:
        Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        return list(explain_errors(error, tree, Config))
    return []


def _text(draft: Draft, theirs: Path, trainer: str) -> str:
    """Return the file: a header, the remarks as comments, and the settings."""
    header = [f"# Converted from {theirs.name} of {trainer} by `moe-train convert`; look at it with `moe-train inspect`."]
    if draft.remarks:
        header.append("# What has no equivalent, or needs a look:")
        header += [f"# - {' '.join(line.split())}" for line in draft.remarks]
    order = [key for key in _ORDER if key in draft.tree]
    ordered = {key: draft.tree[key] for key in order + [key for key in draft.tree if key not in order]}
    # Through JSON, so that a section that stands twice is written twice: YAML would write an alias, which a config may not have.
    return "\n".join(header) + "\n\n" + format_yaml(json.loads(json.dumps(ordered)))
