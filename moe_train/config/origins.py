"""The line of a config that an error is about, where the error came after the config was read: a file that does not exist, say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moe_train.config.strict_yaml import KeyPath, YamlSection, YamlValue, dotted

_LOCATION = re.compile(r"(?:\S+:\d+|override \S+): ")
_KEY = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)*")
_PATH_CHARACTER = r"[\w./@*~-]"


class ConfigFile(NamedTuple):
    """A config as it was written."""

    tree: YamlSection
    """The plain values, with overrides."""
    origins: Mapping[KeyPath, str]
    """Where each key is stated, such as `run.yaml:3`."""

    def origin(self, path: KeyPath) -> str:
        """Return where the nearest key at or above `path` is stated."""
        # Ends at the path () of the whole file, which always has an origin.
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def located(self, message: str) -> str:
        """Return a message with the place and the key in front that it is about; the message itself if that cannot be told.

        It is about the first key that it names by a path or by a name of several words, otherwise about the path of a file that
        it names. What follows a semicolon is the remedy, and is not searched. Messages that begin with a place have one.
        """
        if "\n" in message or _LOCATION.match(message):
            return message
        fault = message.partition(";")[0]
        path = self._named_key(fault) or self._named_file(fault)
        if path is None:
            return message
        # The message may begin with the key, or with the name of its section.
        message = message.removeprefix(f"{path[0]}: ")
        key = "" if message.startswith(dotted(path).removesuffix(": ")) else dotted(path)
        return f"{self.origin(path)}: {key}{message}"

    def _named_key(self, fault: str) -> KeyPath | None:
        """Return the path of the first key that a message names and the config states; None without one."""
        for match in _KEY.finditer(fault):
            if "." not in match[0] and "_" not in match[0]:
                continue  # many keys are English words, too
            path = _stated(self.tree, match[0].split("."))
            if path is not None:
                return path
        return None

    def _named_file(self, fault: str) -> KeyPath | None:
        """Return the path of the key whose value is the longest path of a file that a message names; None without one."""
        longest = ""
        found = None
        for path, text in _texts(self.tree):
            # Of RUN@30, a message may name the run alone.
            for name in (text, text.partition("@")[0]):
                if len(name) > len(longest) and _names_file(fault, name):
                    longest, found = name, path
        return found


def _stated(tree: YamlSection, parts: list[str]) -> KeyPath | None:
    """Return the path of a dotted key; None if the config does not state it."""
    value: YamlValue = tree
    path: KeyPath = ()
    for part in parts:
        if isinstance(value, dict):
            value, step = value.get(part), part
            path = (*path, step)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
            path = (*path, int(part))
        else:
            return None
    return None if value is None else path


def _texts(value: YamlValue, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the texts of a config with their paths, in the order of the file."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*path, index))


def _names_file(fault: str, name: str) -> bool:
    """Return whether a message names a file or folder: a text with a slash or a dot, or one that a slash follows."""
    if not name or any(character.isspace() for character in name):
        return False
    follows = r"(?=/)" if re.fullmatch(r"[\w-]+", name) else rf"(?=/|@|:?(?!{_PATH_CHARACTER})|\.(?!\w))"
    return re.search(rf"(?<!{_PATH_CHARACTER}){re.escape(name)}{follows}", fault) is not None
