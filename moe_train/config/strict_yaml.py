"""Strict YAML 1.2: text to plain values with line numbers, and back.

Only the scalars of the YAML 1.2 core schema are recognized (`1e-4` is a number, `no` and `on` are strings). Tags, anchors,
merges, includes, interpolation and duplicate keys are errors, so that a file means exactly what it shows.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, TypeAlias

import yaml

YamlValue: TypeAlias = "dict[str, YamlValue] | list[YamlValue] | str | int | float | bool | None"
"""A plain value that a YAML text stands for."""
YamlSection: TypeAlias = dict[str, YamlValue]
KeyPath = tuple[str | int, ...]
"""The path of a value: names of keys, and indices of list items."""


class ConfigError(ValueError):
    """The errors of a configuration, one per line."""


_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_CORE_SCALARS = (  # YAML 1.2.2, section 10.3.2: (tag, pattern, first characters of such a scalar)
    (_NULL, r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (_INT, r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (_FLOAT, r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    (_FLOAT, r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the scalars of YAML 1.2 that rejects anchors and aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's way to start without the scalars of YAML 1.1

    def compose_node(self, parent: yaml.Node | None, index: int | yaml.Node | None) -> yaml.Node | None:
        """Compose the next node; reject an anchor or alias."""
        # Refused before anything is composed: nested aliases could expand a small file to any size.
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            problem = "anchors and aliases are not supported; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes a string which either version of YAML would read as something else."""


for _tag, _pattern, _first in _CORE_SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse_yaml(text: str, origin: str) -> tuple[YamlValue, dict[KeyPath, int]]:
    """Parse YAML text to plain values.

    Args:
        text: The YAML text.
        origin: What each line of a ConfigError starts with: a path, or `override key=value`.

    Returns:
        The value, and the line number of every key and list item by its path.

    Raises:
        ConfigError: with every error, one per line.
    """
    try:
        # Composed rather than loaded, since only nodes know their lines and keep duplicate keys.
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_location(origin, mark.line + 1 if mark else 1)}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{_location(origin, 1)}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{_location(origin, 1)}: not valid YAML: nested too deeply") from None
    lines: dict[KeyPath, int] = {(): 1}
    faults: list[str] = []
    value = None if node is None else _value(node, (), lines, faults, origin)
    if faults:
        raise ConfigError("\n".join(faults))
    return value, lines


def _location(origin: str, line: int) -> str:
    """Return `origin:line`; an override has no lines."""
    return origin if origin.startswith("override ") else f"{origin}:{line}"


def _value(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], faults: list[str], origin: str) -> YamlValue:
    """Convert a YAML node to plain values, recording line numbers in `lines` and errors in `faults`."""
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, child in enumerate(node.value):
            lines[*path, i] = child.start_mark.line + 1
            items.append(_value(child, (*path, i), lines, faults, origin))
        return items
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, YamlValue] = {}
        for key_node, child in node.value:
            key = key_node.value
            line = key_node.start_mark.line + 1
            if key_node.tag != _STR:
                key_text = key if isinstance(key_node, yaml.ScalarNode) else "a list or section"
                faults.append(f"{_location(origin, line)}: {dotted(path)}a key must be a string (value {key_text})")
            elif key in mapping:
                faults.append(f"{_location(origin, line)}: {dotted((*path, key))}stated twice, first on line {lines[*path, key]}")
            else:
                lines[*path, key] = line
                mapping[key] = _value(child, (*path, key), lines, faults, origin)
        return mapping
    return _scalar(node, dotted(path), faults, origin)


def _scalar(node: yaml.Node, label: str, faults: list[str], origin: str) -> YamlValue:
    """Convert a scalar node, or add the reason why it is invalid to `faults`."""
    tag = node.tag
    text = node.value
    if tag == _STR:
        return text
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    fault = None
    # int() refuses very long texts with an error of its own, and no setting needs 40 digits.
    if tag == _INT and len(text) < 40:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if tag == _INT:
        fault = "the number is too large"
    elif tag == _FLOAT:
        number = math.inf
        # Infinities and NaN end in a letter and stay infinite here, so that they are refused below.
        if text[-1].isdigit() or text[-1] == ".":
            number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
        if math.isfinite(number):
            return number
        fault = "a number must be finite"
    else:
        fault = f"tags ({tag}) are not supported"
    faults.append(f"{_location(origin, node.start_mark.line + 1)}: {label}{fault} (value {shown(text)})")
    return None


def format_yaml(tree: Any) -> str:
    """Return `tree` as YAML text that `parse_yaml` reads back to an equal tree."""
    # The width keeps long strings on one line; YAML would fold them at 80 characters.
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def shown(value: Any) -> str:
    """Format a value for a message, with at most 60 characters."""
    # As JSON, which tells "true" from true.
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def dotted(path: KeyPath) -> str:
    """Format a key path as the start of a message; "" for the whole file."""
    return ".".join(map(str, path)) + ": " if path else ""
