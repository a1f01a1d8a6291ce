"""The sizes of pictures that files of Hugging Face's processor state beside a tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_train.data.pictures.rules import PictureRules
from moe_train.machine.files import JsonObject, read_object

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files of PixtralProcessor, which Pixtral, Small 3.1 and later and Ministral 3 ship; transformers 5 writes the second alone."""
_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
"""Keys of the processor and their defaults."""


class ProcessorRules(NamedTuple):
    """How pictures become tokens, or why that is not known."""

    rules: PictureRules | None
    fault: str
    """What is missing, for a message; empty if `rules` are known."""


def read_processor_rules(directory: Path, token_id: Callable[[str], int | None]) -> ProcessorRules:
    """Return how pictures become tokens by the files of a processor.

    Args:
        directory: the folder of the tokenizer.
        token_id: returns the id of a token by its text; None if there is no such token.
    """
    settings: JsonObject = {}
    for name in PROCESSOR_FILES:
        file = directory / name
        fields = read_object(file) if file.is_file() else {}
        inner = fields.get("image_processor")
        settings |= (inner if isinstance(inner, dict) else {}) | fields
    if not settings:
        return ProcessorRules(None, f"there is no {' and no '.join(PROCESSOR_FILES)} beside it")
    ids = {key: token_id(str(settings.get(key, text))) for key, text in _TOKENS.items()}
    for key, number in ids.items():
        if number is None:
            return ProcessorRules(None, f"it has no token {settings.get(key, _TOKENS[key])} ({key})")
    size = settings.get("size")
    sizes = {
        "patch_size": _side(settings.get("patch_size")),
        "size.longest_edge": _side(size.get("longest_edge") if isinstance(size, dict) else None),
        # As PixtralProcessor, which merges nothing unless it is told to.
        "spatial_merge_size": _side(settings.get("spatial_merge_size", 1)),
    }
    for key, value in sizes.items():
        if value is None:
            return ProcessorRules(None, f"{' and '.join(PROCESSOR_FILES)} beside it state no {key}")
    patch, longest, merge = sizes.values()
    return ProcessorRules(PictureRules(patch, merge, longest, *ids.values()), "")  # type: ignore[arg-type]


def _side(value: Any) -> int | None:
    """Return a side in pixels or patches, stated as a number or for height and width; None if it is no whole number."""
    if isinstance(value, dict) and value.get("height") == value.get("width"):
        value = value.get("height")
    return value if type(value) is int and value > 0 else None
