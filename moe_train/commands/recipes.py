"""`moe-train recipes`: the configs that come with the package, to list, to read and to copy."""

from __future__ import annotations

import difflib
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import moe_train
from moe_train.config.strict_yaml import YamlValue, parse_yaml
from moe_train.machine.files import refuse_existing, write_text
from moe_train.machine.program import runnable

_PACKAGE = Path(moe_train.__file__).parent
FOLDER = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "configs"
"""Folder of the recipes: inside an installed wheel, or `configs` of a checkout."""
_FACT = re.compile(r"^# (Hardware|Time|Plan|Command|You provide|Look first): (.*)$")


class Recipe(NamedTuple):
    """One recipe."""

    name: str
    purpose: str
    """The first lines of its header, as one."""
    facts: dict[str, str]
    """What else the header states: Hardware, Time, Plan, Command, You provide."""
    text: str


def recipes() -> list[Recipe]:
    """Return all recipes in the order of their names."""
    return [_read(file) for file in sorted(FOLDER.glob("*.yaml"))]


def is_recipe(name: str) -> bool:
    """Return whether a recipe has this name."""
    return any(file.stem == name for file in FOLDER.glob("*.yaml"))


def recipe(name: str) -> Recipe:
    """Return the recipe of a name. Raises ValueError, which suggests the nearest names, if there is none."""
    file = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    # A name is no path: `recipes ../x` would otherwise read any file.
    if file.parent != FOLDER or not file.is_file():
        names = [entry.stem for entry in sorted(FOLDER.glob("*.yaml"))]
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
        raise ValueError(f"there is no recipe {name}; there are {', '.join(nearest)}")
    return _read(file)


def copy_recipe(name: str, out: Path) -> list[Path]:
    """Write a recipe to a new file, with the data that come with it beside the file, and paths that lead there.

    Returns:
        The files that were written.

    Raises:
        FileExistsError: a file is there already.
    """
    text = runnable(recipe(name).text.replace(f"configs/{name.removesuffix('.yaml')}.yaml", str(out)))
    copies: dict[Path, Path] = {}
    for data in sorted((FOLDER / "data").iterdir()):
        if f"configs/data/{data.name}" in text:
            copies[data] = out.parent / data.name
            text = text.replace(f"configs/data/{data.name}", str(copies[data]))
    for file in (out, *copies.values()):
        refuse_existing(file)
    out.parent.mkdir(parents=True, exist_ok=True)
    for data, target in copies.items():
        shutil.copyfile(data, target)
    write_text(out, text)
    return [out, *copies.values()]


def values_of(key: str) -> dict[str, list[YamlValue]]:
    """Return recipe name -> the values that it states for a key, as `moe-train explain` writes its path."""
    stated = {}
    for entry in recipes():
        tree, _ = parse_yaml(entry.text, entry.name)
        values = _values(tree, key.replace("[]", ".[]").split("."))
        if values:
            stated[entry.name] = values
    return stated


def _values(tree: YamlValue, parts: list[str]) -> list[YamlValue]:
    """Return the values at a key path, in which `[]` stands for every item of a list."""
    if not parts:
        return [tree]
    if parts[0] == "[]" and isinstance(tree, list):
        values = []
        for item in tree:
            values += _values(item, parts[1:])
        return values
    if isinstance(tree, dict) and parts[0] in tree:
        return _values(tree[parts[0]], parts[1:])
    return []


def _read(file: Path) -> Recipe:
    text = file.read_text(encoding="utf-8")
    purpose: list[str] = []
    facts: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        fact = _FACT.match(line)
        if fact:
            facts[fact[1]] = fact[2]
        elif not facts:
            purpose.append(line.removeprefix("#").strip())
        elif not line.startswith("#  "):
            # A line that goes on with the last fact; indented ones are commands.
            name = list(facts)[-1]
            facts[name] += line.removeprefix("#").rstrip()
    return Recipe(file.stem, " ".join(purpose), facts, text)
