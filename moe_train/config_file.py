"""A YAML file and `key.path=value` overrides -> `Config`, and back.

The YAML is of version 1.2 with its core scalars (`1e-4` is a number, `no` and `on` are words) and holds nothing but
itself: no tags, anchors, merges, includes or interpolation, and no key twice. Every fault is one line that says where:
`path:LINE: key.path: message (value …)`, or `override key.path=value: …`; all faults of a config come together.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moe_train.config import Config
from moe_train.foreign_keys import remark

KeyPath = tuple[str | int, ...]


class ConfigError(ValueError):
    """The faults of a configuration, one a line."""


# --- YAML ------------------------------------------------------------------------------------------------------

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


def _parse(text: str, origin: str) -> tuple[Any, dict[KeyPath, int]]:
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
                faults.append(f"{_at(origin, line)}: {_dotted(path)}a key is a name (value {shown})")
            elif key in mapping:
                faults.append(f"{_at(origin, line)}: {_dotted((*path, key))}stated twice; first in line {lines[*path, key]}")
            else:
                lines[*path, key] = line
                mapping[key] = _value(child, (*path, key), lines, faults, origin)
        return mapping
    return _scalar(node, _dotted(path), faults, origin)


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
    faults.append(f"{_at(origin, node.start_mark.line + 1)}: {label}{fault} (value {_shown(text)})")
    return None


# --- loading ---------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The checked `Config` of a YAML file with `key.path=value` overrides applied, the last of a key winning.

    Raises FileNotFoundError where there is no such file, and ConfigError with every fault found, one a line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder, not a config file' if path.is_dir() else 'no such config file'}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    tree, lines = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: a config is sections of `key: value` (value {_shown(tree)})")
    origins = {key_path: f"{path}:{line}" for key_path, line in lines.items()}
    for override in overrides:
        _apply(tree, origins, override)
    return _validate(tree, origins)


def _apply(tree: dict[str, Any], origins: dict[KeyPath, str], override: str) -> None:
    """Set one `key.path=value` in `tree`; numbers in the path count list items from 0."""
    origin = f"override {override}"
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.strip().split(".")):
        raise ConfigError(f"{origin}: an override is key.path=value, such as optimizer.learning_rate=1e-4")
    value, _ = _parse(text, origin)
    at: Any = tree
    path: KeyPath = ()
    parts = dotted.strip().split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        key: str | int = part
        if isinstance(at, list):
            if not (part.isdigit() and int(part) < len(at)):
                raise ConfigError(f"{origin}: {_dotted(path)}a list of {len(at)} items, counted from 0 (value {part})")
            key = int(part)
        elif not isinstance(at, dict):
            raise ConfigError(f"{origin}: {_dotted(path)}not a section, so it has no {part} (value {_shown(at)})")
        path = (*path, key)
        if last:
            at[key] = value
        else:
            if isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
                origins[path] = origin
            at = at[key]
    for below in [p for p in origins if p[: len(path)] == path]:
        del origins[below]
    origins[path] = origin


def _validate(tree: dict[str, Any], origins: dict[KeyPath, str]) -> Config:
    try:
        return Config.model_validate_json(json.dumps(tree))  # by way of JSON, where a list is a tuple to strict types
    except ValidationError as error:
        faults = {(path, message): None for path, message in _faults(error, tree)}
    raise ConfigError("\n".join(f"{_origin(origins, path)}: {_dotted(path)}{message}" for path, message in faults))


def _origin(origins: dict[KeyPath, str], path: KeyPath) -> str:
    while path not in origins:
        path = path[:-1]
    return origins[path]


# --- faults in words -------------------------------------------------------------------------------------------


def _faults(error: ValidationError, tree: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    for fault in error.errors(include_url=False):
        path, section = _key_path(fault["loc"])
        kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
        value = f" (value {_shown(given)})"
        if kind == "value_error":
            message = " ".join(str(context["error"]).split())
            yield _blamed(path, message, tree), message
        elif kind == "extra_forbidden":
            yield path, f"unknown key; {_instead(path, section)}{value}"
        elif kind == "missing":
            names = f"; a section whose name is one of {', '.join(_members(section))}" if "discriminator" in section else ""
            yield path, f"required, and missing{names}"
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            tags = re.findall(r"'([^']*)'", context.get("expected_tags", "")) or list(section["discriminator"]["mapping"])
            tag = context["discriminator"].strip("'")
            given = given.get(tag) if isinstance(given, dict) else given
            yield (
                (*path, tag),
                f"required, and missing; one of {', '.join(tags)}"
                if kind == "union_tag_not_found"
                else f"one of {', '.join(_nearest_first(str(given), tags))} (value {_shown(given)})",
            )
        elif kind == "literal_error":
            yield path, f"has to be {context['expected']}{value}"
        elif kind == "too_short" and len(given) >= context["min_length"]:
            continue  # counted after its faulty items, which have their own lines, were left out
        else:
            yield path, f"{_in_words(kind, fault['msg'])}{_quote_it(kind, given)}{value}"


def _in_words(kind: str, message: str) -> str:
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "has to be a section of keys"
    if kind == "tuple_type":
        return "has to be a list"
    if kind == "int_type":
        return "has to be a whole number"
    if kind == "bool_type":
        return "has to be true or false"
    if kind == "too_short":
        return "the list is too short; it needs 1 item or more"
    for theirs, ours in (("Input should be a valid", "has to be a"), ("Input should be", "has to be"), ("String should", "has to")):
        message = message.replace(theirs, ours)
    return message


def _quote_it(kind: str, given: Any) -> str:
    return "; quote it" if kind == "string_type" and isinstance(given, bool | int | float) else ""


def _blamed(section: KeyPath, message: str, tree: dict[str, Any]) -> KeyPath:
    """The key, stated in the config, that a check of a whole section names first; else the section."""
    here: Any = tree
    for part in section:
        here = here[part]
    for name in re.findall(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*", message):
        for base, prefix in ((here, section), (tree, ())):
            parts = name.split(".")
            for part in parts:
                base = base.get(part) if isinstance(base, dict) else None
            if base is not None:
                return (*prefix, *parts)
    return section


def _instead(path: KeyPath, section: dict[str, Any]) -> str:
    """What was probably meant by an unknown key: another tool's word, a near key of its section, or a near key elsewhere."""
    *above, key = path
    known = list(section.get("properties", {}))
    elsewhere = [p for p in _all_keys() if p.rpartition(".")[2] == key]
    here = ".".join("0" if isinstance(part, int) else part for part in above)
    siblings = [p for p in elsewhere if p.rpartition(".")[0] == here]
    if siblings:
        return f"{section['properties']['name']['const']} has none; it belongs to {' and '.join(_owners(key, here))}"
    if theirs := remark(str(key)):
        return theirs
    if near := difflib.get_close_matches(str(key), known, n=1, cutoff=0.7):
        return f"did you mean {near[0]}?"
    if elsewhere:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere))}?"
    names = {p.rpartition(".")[2]: p for p in reversed(_all_keys())}
    if near := difflib.get_close_matches(str(key), names, n=1, cutoff=0.75):
        return f"did you mean {names[near[0]]}?"
    return f"{'.'.join(map(str, above)) or 'a config'} has {', '.join(_nearest_first(str(key), known))}"


def _nearest_first(word: str, choices: Sequence[str]) -> list[str]:
    return sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, word.lower(), choice.lower()).ratio())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path)) + ": " if path else ""


# --- the shape of a config -------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of a config file, with which editors complete and check keys."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


_SCHEMA = json_schema()


def _follow(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema behind a reference, or behind `X or null`."""
    if "$ref" in schema:
        return _follow(_SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    for choice in schema.get("anyOf", ()):
        if choice.get("type") != "null":
            return _follow(choice)
    return schema


def _members(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tag -> section of a tagged union; one section, without a tag, for a plain one; nothing for other values."""
    if "discriminator" in schema:
        return {tag: _follow({"$ref": ref}) for tag, ref in schema["discriminator"]["mapping"].items()}
    return {"": schema} if "properties" in schema else {}


def _key_path(loc: tuple[str | int, ...]) -> tuple[KeyPath, dict[str, Any]]:
    """pydantic's location, which names the tags it passed, as (key path of the file, schema of the innermost section)."""
    path: KeyPath = ()
    schema = section = _SCHEMA
    for part in loc:
        if "discriminator" in schema:
            schema = section = _members(schema)[str(part)]
            continue
        section = schema if "properties" in schema else section
        path = (*path, part)
        below = schema.get("items", {}) if isinstance(part, int) else schema.get("properties", {}).get(part, {})
        schema = _follow(below)
    return path, schema if "discriminator" in schema else section


def _keys(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """(key path, tag of the section it is in) of everything below `schema`; lists are entered at item 0."""
    schema = _follow(schema)
    if schema.get("type") == "array":
        yield from _keys(schema["items"], f"{prefix}0.")
    for tag, section in _members(schema).items():
        for key, below in section["properties"].items():
            yield f"{prefix}{key}", tag
            yield from _keys(below, f"{prefix}{key}.")


def _all_keys() -> list[str]:
    """Every key path that a config can have."""
    return list(dict.fromkeys(path for path, _ in _keys(_SCHEMA, "")))


def _owners(key: str | int, section: str) -> list[str]:
    return [tag for path, tag in _keys(_SCHEMA, "") if path == f"{section}.{key}" and tag]


# --- writing ---------------------------------------------------------------------------------------------------


def dump(config: Config) -> str:
    """The resolved config, every default stated, as YAML that loads back to an equal `Config`."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: x for key, below in tree.items() for path, x in flat(below, f"{prefix}.{key}" if prefix else key).items()}
