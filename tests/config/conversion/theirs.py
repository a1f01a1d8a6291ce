"""A config of another trainer, converted as the command does it."""

from __future__ import annotations

from pathlib import Path

from moe_train.commands.convert import Conversion, convert_config
from moe_train.config import Config
from moe_train.config.yaml_file import load_config


def converted(tmp_path: Path, text: str, trainer: str | None = None, devices: int = 1) -> tuple[Config, Conversion]:
    """Write a config, convert it, and load what became of it."""
    theirs = tmp_path / "theirs.yaml"
    out = tmp_path / "ours.yaml"
    theirs.write_text(text)
    conversion = convert_config(theirs, out, trainer, devices)
    return load_config(out), conversion
