"""`moe-train sweep`: one run for each combination of settings, one after the other, and a table of what they reached."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.config import yaml_file
from moe_train.config.strict_yaml import ConfigError


class SweptRun(NamedTuple):
    """One run of a sweep."""

    overrides: list[str]
    """All overrides, with those of its name and directory."""
    config: config.Config


def sweep_runs(path: Path, stated: Sequence[str]) -> list[SweptRun]:
    """Return the runs of a sweep, each checked as a config.

    Args:
        path: the YAML file.
        stated: `key=value` overrides; a value with commas outside of brackets and quotes, such as `key=a,b`, is swept, and several
            of them give all combinations.

    Raises:
        ConfigError: no value is swept, one is stated twice, or a combination is not valid.
    """
    fixed: list[str] = []
    swept: list[tuple[str, list[str]]] = []
    for override in stated:
        key, equals, text = override.partition("=")
        values = _split(text) if equals else []
        if len(values) < 2:
            fixed.append(override)
            continue
        if len(set(values)) < len(values):
            raise ConfigError(f"override {override}: a value is stated twice, and its runs would be the same; remove it")
        swept.append((key, values))
    if not swept:
        raise ConfigError(
            "a sweep needs a setting with several values, such as optimizer.learning_rate=1e-4,3e-4; for one run use train"
        )
    base = yaml_file.load_config(path, [*fixed, *(f"{key}={values[0]}" for key, values in swept)])
    runs = []
    for combination in itertools.product(*(values for _, values in swept)):
        chosen = [f"{key}={value}" for (key, _), value in zip(swept, combination, strict=True)]
        label = ",".join(_label(choice) for choice in chosen)
        folder = f"{base.run_dir.rstrip('/')}/{label}"
        overrides = [*fixed, *chosen, f"run_dir={folder}"]
        runs.append(SweptRun(overrides, yaml_file.load_config(path, overrides)))
    if "://" in base.run_dir:
        raise ConfigError(f"run_dir {base.run_dir} is in a bucket, but a sweep compares runs in folders; state run_dir=FOLDER")
    folders = [run.config.run_dir for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError("two runs of the sweep would have the same run_dir; sweep keys whose last parts differ")
    return runs


def _split(text: str) -> list[str]:
    """Split a value at commas outside of brackets and quotes."""
    parts = [""]
    depth = 0
    quote = ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _label(choice: str) -> str:
    """Return the name of a choice in a folder's name: the last part of its key, and its value without special characters."""
    key, _, value = choice.partition("=")
    safe = "".join(character if character.isalnum() or character in "._-+" else "-" for character in value)
    return f"{key.rpartition('.')[2]}={safe}"


def commands_of(path: Path, runs: Sequence[SweptRun]) -> list[str]:
    """Return the command line of each run, quoted for a shell."""
    return [shlex.join(["moe-train", "train", str(path), *run.overrides]) for run in runs]
