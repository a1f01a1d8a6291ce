"""The shape of a config: which keys each section has, by the JSON schema of `Config`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_train.config import Config
from moe_train.config.strict_yaml import KeyPath


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


def members(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tag -> section of a tagged union; one section, without a tag, for a plain one; nothing for other values."""
    if "discriminator" in schema:
        return {tag: _follow({"$ref": ref}) for tag, ref in schema["discriminator"]["mapping"].items()}
    return {"": schema} if "properties" in schema else {}


def key_path(loc: tuple[str | int, ...]) -> tuple[KeyPath, dict[str, Any]]:
    """pydantic's location, which names the tags it passed, as (key path of the file, schema of the innermost section)."""
    path: KeyPath = ()
    schema = section = _SCHEMA
    for part in loc:
        if "discriminator" in schema:
            schema = section = members(schema)[str(part)]
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
    for tag, section in members(schema).items():
        for key, below in section["properties"].items():
            yield f"{prefix}{key}", tag
            yield from _keys(below, f"{prefix}{key}.")


def all_keys() -> list[str]:
    """Every key path that a config can have."""
    return list(dict.fromkeys(path for path, _ in _keys(_SCHEMA, "")))


def owners(key: str | int, section: str) -> list[str]:
    return [tag for path, tag in _keys(_SCHEMA, "") if path == f"{section}.{key}" and tag]
