"""Every key that a kind of file can have: its type, default and description, for `moe-train explain` and the reference page."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic.json_schema import JsonSchemaValue

from moe_train.config.other_trainers import remark
from moe_train.config.schema import FileSchema, item_schema, schema_of
from moe_train.config.section import Section


class KeyEntry(NamedTuple):
    """One key of a section."""

    path: str
    """Path of the key; `[]` stands for an item of a list, as in `data.train[].weight`."""
    kinds: tuple[str, ...]
    """Kinds of the section that have the key, such as `adamw` and `lion`; empty if the section has only one kind."""
    type: str
    """Type and limits in words, or the values that are allowed."""
    default: str | None
    """Default as YAML's flow style, or in words where it has no such form; None if the key is required."""
    description: str


class SectionEntry(NamedTuple):
    """One kind of a section, with its keys."""

    path: str
    """Path of the section; "" for the file itself."""
    kind: str
    """Value of `name` that selects this kind; "" if the section has only one kind."""
    description: str
    keys: tuple[KeyEntry, ...]


@functools.cache
def sections(kind: type[Section]) -> tuple[SectionEntry, ...]:
    """Return every kind of every section of a file, each before the sections inside it."""
    schema = schema_of(kind)
    return tuple(_below(schema, schema.root, ""))


def keys(kind: type[Section]) -> list[KeyEntry]:
    """Return every key of a file; kinds of one section that share a key, with equal type, default and text, share an entry."""
    merged: dict[tuple[str, str, str | None, str], list[str]] = {}
    for section in sections(kind):
        for key in section.keys:
            merged.setdefault((key.path, key.type, key.default, key.description), []).extend(key.kinds)
    entries = []
    for (path, type_text, default, description), kinds in merged.items():
        entries.append(KeyEntry(path, tuple(dict.fromkeys(kinds)), type_text, default, description))
    return entries


def explain(key: str, kind: type[Section]) -> list[KeyEntry]:
    """Return the entries of a key.

    Args:
        key: its path; list indices, `[]` and leading sections may be left out (`rounding`, `data.train.0.weight`).
        kind: the kind of file, such as `Config`.

    Raises:
        ValueError: there is no such key; the message suggests the nearest ones.
    """
    wanted = _plain(key)
    entries = keys(kind)
    exact = [entry for entry in entries if _plain(entry.path) == wanted]
    if exact:
        return exact
    at_the_end = [entry for entry in entries if _plain(entry.path).endswith(f".{wanted}")]
    if at_the_end:
        return at_the_end
    raise ValueError(f"no setting is called {key}; {_suggestion(key, wanted, entries)}")


def _suggestion(key: str, wanted: str, entries: list[KeyEntry]) -> str:
    """Suggest what an unknown key was meant to be: another trainer's name for a setting, or a similar path or name."""
    trainer_remark = remark(wanted.rpartition(".")[2])
    if trainer_remark:
        return trainer_remark
    paths = {_plain(entry.path): entry.path for entry in entries}
    closest = difflib.get_close_matches(wanted, paths, n=3, cutoff=0.7)
    if not closest:
        names: dict[str, str] = {}
        for path in reversed(paths):
            names[path.rpartition(".")[2]] = path
        closest = [names[name] for name in difflib.get_close_matches(wanted.rpartition(".")[2], names, n=3, cutoff=0.7)]
    if closest:
        return f"did you mean {' or '.join(paths[path] for path in closest)}?"
    return "`moe-train explain` without a key lists all of them"


def _plain(path: str) -> str:
    """Return a path without list indices and brackets."""
    return ".".join(part for part in path.replace("[]", "").split(".") if not part.isdigit())


def _below(schema: FileSchema, value: JsonSchemaValue, path: str) -> Iterator[SectionEntry]:
    """Yield the kinds of the section that `value` describes, and of all sections inside it."""
    resolved = schema.follow(value)
    if resolved.get("type") == "array":
        yield from _below(schema, item_schema(resolved), f"{path}[]")
        return
    for tag, section in schema.members(resolved).items():
        entries = []
        required = section.get("required") or section.get("else", {}).get("required", ())
        for name, member in section["properties"].items():
            # A constant is the key `name`, whose value selects the kind of the section.
            if "const" not in member:
                entries.append(_entry(schema, member, _join(path, name), tag, name in required))
        yield SectionEntry(path, tag, _one_line(section.get("description", "")), tuple(entries))
        for name, member in section["properties"].items():
            yield from _below(schema, member, _join(path, name))


def _entry(schema: FileSchema, value: JsonSchemaValue, path: str, tag: str, required: bool) -> KeyEntry:
    """Return the entry of one key of a section."""
    default = None
    if not required:
        # A schema leaves out a default that JSON cannot hold, such as one that a function makes.
        default = json.dumps(value["default"], ensure_ascii=False) if "default" in value else "a built-in one"
        # A section that is left out has the defaults of its keys, which stand in entries of their own.
        if "$ref" in value and isinstance(value.get("default"), dict):
            default = "the defaults of its keys"
    # pydantic leaves out a description that equals that of the section behind it.
    description = value.get("description") or schema.follow(value).get("description", "")
    return KeyEntry(path, (tag,) if tag else (), type_text(value, schema), default, _one_line(description))


def _join(path: str, name: str) -> str:
    """Return the path of a key of the section at `path`."""
    return f"{path}.{name}" if path else name


def _one_line(text: str) -> str:
    """Return a text with its line breaks as spaces."""
    return " ".join(text.split())


def type_text(value: JsonSchemaValue, schema: FileSchema) -> str:
    """Describe in words which values a key can have."""
    choices = value.get("anyOf", ())
    if any(choice.get("type") == "null" for choice in choices):
        texts = [type_text(choice, schema) for choice in choices if choice.get("type") != "null"]
        return f"{' or '.join(texts)}, or null"
    if choices and "discriminator" not in value:
        return " or ".join(type_text(choice, schema) for choice in choices)
    if "const" in value:
        return str(value["const"])
    if "discriminator" in value:
        return f"section whose name is {_alternatives(list(value['discriminator']['mapping']))}"
    if "$ref" in value:
        tag = schema.follow(value)["properties"].get("name", {}).get("const")
        return f"section whose name is {tag}" if tag else "section"
    if "enum" in value:
        return _alternatives([str(choice) for choice in value["enum"]])
    kind = value.get("type")
    if kind == "array":
        length = f"list of {value['maxItems']}" if "prefixItems" in value else "list"
        return f"{length}, each item: {type_text(item_schema(value), schema)}"
    if kind in ("integer", "number"):
        return f"{'whole number' if kind == 'integer' else 'number'}{_limits(value)}"
    return {"boolean": "true or false", "string": "text", "object": "mapping"}[kind] if kind else "any value"


_LIMITS = {"minimum": "at least", "ge": "at least", "exclusiveMinimum": "above", "maximum": "at most", "le": "at most"}
"""Key of a JSON schema, or of pydantic's, -> the words for a limit. Very large bounds are those of 64-bit integers."""


def _limits(value: JsonSchemaValue) -> str:
    """Describe the limits of a number."""
    texts = [f"{words} {value[key]}" for key, words in _LIMITS.items() if key in value]
    exclusive = value.get("exclusiveMaximum")
    if exclusive is not None:
        texts.append("below 2^63" if exclusive == 2**63 else f"below {exclusive}")
    return f", {' and '.join(texts)}" if texts else ""


def _alternatives(words: Sequence[str]) -> str:
    """Join words with commas and a final "or"."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
