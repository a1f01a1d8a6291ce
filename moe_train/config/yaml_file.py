"""Read a YAML file and `key.path=value` overrides into a `Config`, and write a `Config` back.

Every error is one line that says where it is: `path:LINE: key.path: message (value …)`, or
`override key.path=value: …`. All errors of a config are reported together.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from moe_train.config import Config, strict_yaml
from moe_train.config.faults import explain_errors
from moe_train.config.origins import ConfigFile
from moe_train.config.section import Section
from moe_train.config.strict_yaml import ConfigError, KeyPath, YamlSection, dotted, parse_yaml, shown


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read and check the `Config` of a YAML file.

        config = moe_train.load_config("configs/quickstart_lora.yaml", ["train.steps=10"])

    Args:
        path: the YAML file.
        overrides: `key.path=value` settings that replace those of the file; the last one for a key wins.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: with every error, one per line.
    """
    return load_section(path, Config, overrides)


_Kind = TypeVar("_Kind", bound=Section)
"""The kind of a file: the section that its keys belong to."""


def load_section(path: str | Path, kind: type[_Kind], overrides: Iterable[str] = ()) -> _Kind:
    """Read and check a YAML file of any kind; arguments and errors are those of `load_config`."""
    return checked(read_section(path, kind, overrides), kind)


def read_section(path: str | Path, kind: type[Section], overrides: Iterable[str] = ()) -> ConfigFile:
    """Read a YAML file of any kind without checking its keys; arguments and errors are those of `load_config`."""
    path = Path(path)
    if not path.is_file():
        problem = f"no such {kind.__name__.lower()} file"
        if path.is_dir():
            problem = "is a folder, not a config file; state a YAML file, in which init_from can name a folder of a model"
            if (path / "config.yaml").is_file():
                problem = f"is a folder; state its config, {path / 'config.yaml'}"
        raise FileNotFoundError(f"{path}: {problem}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    tree, lines = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: a config consists of sections with `key: value` (value {shown(tree)})")
    origins = {key_path: f"{path}:{line}" for key_path, line in lines.items()}
    for override in overrides:
        _apply(tree, origins, override)
    return ConfigFile(tree, origins)


def _apply(tree: YamlSection, origins: dict[KeyPath, str], override: str) -> None:
    """Apply one `key.path=value` override to `tree`; numbers in the path are list indices, from 0."""
    origin = f"override {override}"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{origin}: an override has the form key.path=value, such as optimizer.learning_rate=1e-4")
    # As YAML, so that an override can set a list, null or a whole section.
    value, _ = parse_yaml(text, origin)
    section: Any = tree  # checked at each step below
    path: KeyPath = ()
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        step: str | int = part
        if isinstance(section, list):
            if not (part.isdigit() and int(part) < len(section)):
                raise ConfigError(f"{origin}: {dotted(path)}this list has {len(section)} items, counted from 0 (value {part})")
            step = int(part)
        elif not isinstance(section, dict):
            raise ConfigError(f"{origin}: {dotted(path)}this is not a section, so it has no key {part} (value {shown(section)})")
        path = (*path, step)
        if is_last:
            section[step] = value
        else:
            # An override may state the first key of a section that the file leaves out.
            if isinstance(section, dict) and section.get(part) is None:
                section[part] = {}
                origins[path] = origin
            section = section[step]
    # The override replaces everything below its key, so errors there no longer belong to lines of the file.
    for overridden in [p for p in origins if p[: len(path)] == path]:
        del origins[overridden]
    origins[path] = origin


def checked(file: ConfigFile, kind: type[_Kind]) -> _Kind:
    """Check what a file states; raise ConfigError with the origin of each error."""
    try:
        # As JSON, since strict types accept a list as a tuple only when they read JSON.
        return kind.model_validate_json(json.dumps(file.tree))
    except ValidationError as error:
        faults = {(path, message): None for path, message in explain_errors(error, file.tree, kind)}
    raise ConfigError("\n".join(f"{file.origin(path)}: {dotted(path)}{message}" for path, message in faults))


def dump(config: Config) -> str:
    """Return the config, with every default stated, as YAML that loads back to an equal `Config`."""
    return strict_yaml.format_yaml(config.model_dump(mode="json"))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flattened: dict[str, Any] = {}
    for key, subtree in tree.items():
        flattened |= flat(subtree, f"{prefix}.{key}" if prefix else key)
    return flattened
