"""Error messages for an invalid config: the key at fault, what it should be, and what the user probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.json_schema import JsonSchemaValue

from moe_train.config.other_trainers import remark
from moe_train.config.schema import FileSchema, schema_of
from moe_train.config.section import Section
from moe_train.config.strict_yaml import KeyPath, YamlValue, shown


def explain_errors(error: ValidationError, tree: dict[str, YamlValue], file_kind: type[Section]) -> Iterator[tuple[KeyPath, str]]:
    """Translate pydantic's validation errors into messages about a config file.

    Args:
        error: the error that validating the config raised.
        tree: the config as plain values, to find the key that a check of a whole section blames.
        file_kind: the kind of file, such as `Config`.

    Yields:
        The path of the key at fault, and a message in one line.
    """
    schema = schema_of(file_kind)
    for fault in error.errors(include_url=False):
        path, section = schema.key_path(fault["loc"])
        kind = fault["type"]
        invalid = fault["input"]
        context = fault.get("ctx", {})
        value = f" (value {shown(invalid)})"
        # A check of this package: its text is used as it is, without pydantic's "Value error, ".
        if kind == "value_error":
            message = " ".join(str(context["error"]).split())
            yield _blamed_path(path, message, tree), message
        elif kind == "extra_forbidden":
            yield path, f"unknown key; {_suggestion(path, section, schema)}{value}"
        elif kind == "missing":
            names = ""
            if "discriminator" in section:
                names = f"; a section whose name is one of {', '.join(schema.members(section))}"
            yield path, f"required, and missing{names}"
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            # pydantic reports the expected tags only as one text.
            tags = re.findall(r"'([^']*)'", context.get("expected_tags", "")) or list(section["discriminator"]["mapping"])
            tag = context["discriminator"].strip("'")
            # The input is the whole section; only the tag is at fault.
            invalid = invalid.get(tag) if isinstance(invalid, dict) else invalid
            if kind == "union_tag_not_found":
                message = f"required, and missing; one of {', '.join(tags)}"
            else:
                message = f"one of {', '.join(_nearest_first(str(invalid), tags))} (value {shown(invalid)})"
            yield (*path, tag), message
        elif kind == "literal_error":
            yield path, f"has to be {context['expected']}{value}"
        elif kind == "too_short" and len(invalid) >= context["min_length"]:
            continue  # pydantic counts only the valid items; the invalid ones have their own messages
        elif kind == "too_short":
            yield path, f"has {len(invalid)} entries and needs {context['min_length']} or more{value}"
        else:
            yield path, f"{_rephrase(kind, fault['msg'])}{_quoting_hint(kind, invalid)}{value}"


def _rephrase(kind: str, message: str) -> str:
    """Rephrase one of pydantic's messages in the words of a config file."""
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "has to be a section of keys"
    if kind == "tuple_type":
        return "has to be a list"
    if kind == "int_type":
        return "has to be a whole number"
    if kind == "bool_type":
        return "has to be true or false"
    for original, replacement in (
        ("Input should be a valid", "has to be a"),
        ("Input should be", "has to be"),
        ("String should", "has to"),
    ):
        message = message.replace(original, replacement)
    return message


def _quoting_hint(kind: str, value: YamlValue) -> str:
    """Add a hint where YAML read a value as a boolean or a number and the config needs a string."""
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; quote it"
    return ""


def _blamed_path(section: KeyPath, message: str, tree: dict[str, YamlValue]) -> KeyPath:
    """Return the path of the first key that the message names and the config states; otherwise the path of the section."""
    section_tree: Any = tree  # pydantic found the section, so each part of its path exists
    for part in section:
        section_tree = section_tree[part]
    if not isinstance(section_tree, dict):
        return section  # the check is one of this value alone, whatever else its message mentions
    for match in re.finditer(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*", message):
        # A message names keys relative to its own section or by their full path.
        for base, prefix in ((section_tree, section), (tree, ())):
            parts = match[0].split(".")
            value: YamlValue = base
            for part in parts:
                # None ends the walk: the rest of a path below a missing key is missing too.
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None and _is_key(match, value):
                return (*prefix, *parts)
    return section


def _is_key(word: re.Match[str], value: YamlValue) -> bool:
    """Return whether a word of a message means the key of that name, with this value: many keys are English words too.

    It does as a path or a name of several words, as the first word of the message, or with the key's value after it.
    """
    if "." in word[0] or "_" in word[0] or word.start() == 0:
        return True
    after = word.string[word.end() :].removeprefix(":").removeprefix(" is").lstrip()
    return not isinstance(value, dict) and after.startswith((str(value), shown(value)))


def _suggestion(path: KeyPath, section: JsonSchemaValue, schema: FileSchema) -> str:
    """Suggest what an unknown key was meant to be.

    The candidates, in this order: a key of another kind of the same union, another trainer's name for a setting, a similar key of
    this section, the same key elsewhere, a similar key elsewhere; failing all, the keys of this section.
    """
    *parents, key = path
    section_keys = list(section.get("properties", {}))
    elsewhere = [p for p in schema.all_keys() if p.rpartition(".")[2] == key]
    # `all_keys` enters lists at item 0, whatever the index in the file.
    section_path = ".".join("0" if isinstance(part, int) else part for part in parents)
    siblings = [p for p in elsewhere if p.rpartition(".")[0] == section_path]
    if siblings:
        kinds = " and ".join(schema.owners(key, section_path))
        return f"{section['properties']['name']['const']} does not have it; it belongs to {kinds}"
    trainer_remark = remark(str(key))
    if trainer_remark:
        return trainer_remark
    # A key of the same section is likelier to be meant than one elsewhere, so it may differ more (a lower cutoff).
    if closest := difflib.get_close_matches(str(key), section_keys, n=1, cutoff=0.7):
        return f"did you mean {closest[0]}?"
    if elsewhere:
        return f"did you mean {' or '.join(dict.fromkeys(elsewhere))}?"
    # Reversed, so that of several keys of one name the first in the schema remains.
    names = {p.rpartition(".")[2]: p for p in reversed(schema.all_keys())}
    if closest := difflib.get_close_matches(str(key), names, n=1, cutoff=0.75):
        return f"did you mean {names[closest[0]]}?"
    return f"{'.'.join(map(str, parents)) or 'a config'} has {', '.join(_nearest_first(str(key), section_keys))}"


def _nearest_first(word: str, choices: Sequence[str]) -> list[str]:
    """Sort the choices by their similarity to `word`, the most similar first."""
    return sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, word.lower(), choice.lower()).ratio())
