"""The JSON schema of a kind of file, such as `Config`, and what it says about the keys of each section."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from pydantic.json_schema import JsonSchemaValue

from moe_train.config.section import Section
from moe_train.config.strict_yaml import KeyPath


def json_schema(kind: type[Section]) -> JsonSchemaValue:
    """Return the JSON schema (2020-12) of a kind of file, with which editors complete and check keys."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


@functools.cache
def schema_of(kind: type[Section]) -> FileSchema:
    """Return the schema of a kind of file; it is built once, since every unknown key looks into it."""
    return FileSchema(json_schema(kind))


def item_schema(array: JsonSchemaValue) -> JsonSchemaValue:
    """Return the schema of the items of a list, or of the first of a list of fixed length, whose items are alike here."""
    return array["items"] if "items" in array else array["prefixItems"][0]


class FileSchema:
    """The keys that a kind of file can have.

    Args:
        root: the JSON schema of the file.
    """

    def __init__(self, root: JsonSchemaValue):
        self.root = root

    def members(self, schema: JsonSchemaValue) -> dict[str, JsonSchemaValue]:
        """Return tag -> section schema for a tagged union; one section under the tag "" for a plain one; {} for other values."""
        if "discriminator" in schema:
            return {tag: self.follow({"$ref": ref}) for tag, ref in schema["discriminator"]["mapping"].items()}
        return {"": schema} if "properties" in schema else {}

    def key_path(self, loc: tuple[str | int, ...]) -> tuple[KeyPath, JsonSchemaValue]:
        """Translate pydantic's error location, which includes union tags, to the key path of the file.

        Args:
            loc: the `loc` of a pydantic error.

        Returns:
            The key path without tags, and the schema of the innermost section (of the union, if the tag itself is at fault).
        """
        path: KeyPath = ()
        schema = section = self.root
        for part in loc:
            if "discriminator" in schema:
                # pydantic puts the tag of a union into `loc`, where the file has no key.
                schema = section = self.members(schema)[str(part)]
                continue
            section = schema if "properties" in schema else section
            path = (*path, part)
            subschema = schema.get("items", {})
            if not isinstance(part, int):
                subschema = schema.get("properties", {}).get(part, {})
            schema = self.follow(subschema)
        return path, schema if "discriminator" in schema else section

    def all_keys(self) -> list[str]:
        """Return every key path that a file can have."""
        return list(dict.fromkeys(path for path, _ in self._keys(self.root, "")))

    def owners(self, key: str | int, section: str) -> list[str]:
        """Return the tags of the union members at `section` that have a key of this name."""
        return [tag for path, tag in self._keys(self.root, "") if path == f"{section}.{key}" and tag]

    def follow(self, schema: JsonSchemaValue) -> JsonSchemaValue:
        """Resolve a reference, or the `X` of `X or null`, to the schema behind it."""
        if "$ref" in schema:
            return self.follow(self.root["$defs"][schema["$ref"].rpartition("/")[2]])
        for choice in schema.get("anyOf", ()):
            if choice.get("type") != "null":
                return self.follow(choice)
        return schema

    def _keys(self, schema: JsonSchemaValue, prefix: str) -> Iterator[tuple[str, str]]:
        """Yield every key path below `schema`, with the tag of the section that it is in; lists are entered at item 0."""
        schema = self.follow(schema)
        if schema.get("type") == "array":
            yield from self._keys(item_schema(schema), f"{prefix}0.")
        for tag, section in self.members(schema).items():
            for key, below in section["properties"].items():
                yield f"{prefix}{key}", tag
                yield from self._keys(below, f"{prefix}{key}.")
