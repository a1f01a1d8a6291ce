"""YAML 1.2 <-> plain values, and the line of each.

Its core scalars alone are read (`1e-4` is a number, `no` and `on` are words), and a text holds nothing but itself: no
tags, anchors, merges, includes or interpolation, and no key twice.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]


class ConfigError(ValueError):
    """The faults of a configuration, one a line."""


_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_CORE_SCALARS = (  # YAML 1.2.2, section 10.3.2; `first` are the characters that such a scalar can start with
    (_NULL, r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (_INT, r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (_FLOAT, r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    (_FLOAT, r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's way to start without the scalars of YAML 1.1

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read; write the value out", event.start_mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes a string that either version of YAML would read as something else."""


for _tag, _pattern, _first in _CORE_SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse(text: str, origin: str) -> tuple[Any, dict[KeyPath, int]]:
    """`text` as plain values, and the line of every key and list item. ConfigError lines start with `origin`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{_at(origin, mark.line + 1 if mark else 1)}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{_at(origin, 1)}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{_at(origin, 1)}: not valid YAML: nested too deeply") from None
    lines: dict[KeyPath, int] = {(): 1}
    faults: list[str] = []
    value = None if node is None else _value(node, (), lines, faults, origin)
    if faults:
        raise ConfigError("\n".join(faults))
    return value, lines


def _at(origin: str, line: int) -> str:
    return origin if origin.startswith("override ") else f"{origin}:{line}"


def _value(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], faults: list[str], origin: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, child in enumerate(node.value):
            lines[*path, i] = child.start_mark.line + 1
            items.append(_value(child, (*path, i), lines, faults, origin))
        return items
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, child in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag != _STR:
                shown = key if isinstance(key_node, yaml.ScalarNode) else "a list or section"
                faults.append(f"{_at(origin, line)}: {dotted(path)}a key is a name (value {shown})")
            elif key in mapping:
                faults.append(f"{_at(origin, line)}: {dotted((*path, key))}stated twice; first in line {lines[*path, key]}")
            else:
                lines[*path, key] = line
                mapping[key] = _value(child, (*path, key), lines, faults, origin)
        return mapping
    return _scalar(node, dotted(path), faults, origin)


def _scalar(node: yaml.Node, label: str, faults: list[str], origin: str) -> Any:
    tag, text = node.tag, node.value
    if tag == _STR:
        return text
    if tag == _NULL:
        return None
    if tag == _BOOL:
        return text.lower() == "true"
    fault = None
    if tag == _INT and len(text) < 40:
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if tag == _INT:
        fault = "too large a number"
    elif tag == _FLOAT:
        number = float(text.replace(".inf", "inf").replace(".nan", "nan")) if text[-1].isdigit() or text[-1] == "." else math.inf
        if math.isfinite(number):
            return number
        fault = "a number has to be finite"
    else:
        fault = f"tags ({tag}) are not read"
    faults.append(f"{_at(origin, node.start_mark.line + 1)}: {label}{fault} (value {shown(text)})")
    return None


def write(tree: Any) -> str:
    """`tree` as YAML that `parse` reads back as it is."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def shown(value: Any) -> str:
    """A value as a message quotes it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def dotted(path: KeyPath) -> str:
    """The key path that a message begins with."""
    return ".".join(map(str, path)) + ": " if path else ""
