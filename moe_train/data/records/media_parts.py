"""Parts of contents that are pictures or sound, in the spellings of several APIs, and what tells the two kinds apart.

In the normal form a picture is a part {type: image, image: REFERENCE} and a clip of sound {type: audio, audio: REFERENCE}, where
the reference is a data URL or the path of a file in the folder of the records. Nothing is fetched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from moe_train.data.records.problem import Problem, brief


class MediaKind(NamedTuple):
    """Pictures, or sound: how records write them, and how messages name them."""

    part: str
    """Type of a part in the normal form, and its key that holds the reference."""
    spellings: tuple[str, ...]
    """Types of parts in records."""
    columns: tuple[str, ...]
    """Columns of a record that hold its files, as LLaMA-Factory, ms-swift and TRL write them."""
    placeholder: str
    """What stands in a text for a file of the column."""
    roles: tuple[str, ...]
    """Roles of the messages that may have such parts."""
    rule: str
    """Rule that a record with an unusable file breaks."""
    item: str
    """One file, for messages."""
    items: str
    """Several files, for messages."""
    substance: str
    """What a file holds, for messages."""
    default_type: str
    """Media type of base64 whose record states none."""

    @property
    def remedy(self) -> str:
        """How a part is written."""
        part = f'{{"type": "{self.part}", "{self.part}": "FILE"}}'
        return f"write {part}, with a file in the folder of the records, or a data URL"

    @property
    def column_remedy(self) -> str:
        """How a column is written."""
        return f"write one {self.item} for each {self.placeholder} of the user's texts"


PICTURES = MediaKind(
    part="image",
    spellings=("image", "image_url", "input_image"),
    columns=("images", "image"),
    placeholder="<image>",
    roles=("user", "tool"),
    rule="picture",
    item="picture",
    items="pictures",
    substance="a picture",
    default_type="image",
)
SOUND = MediaKind(
    part="audio",
    spellings=("audio", "audio_url", "input_audio"),
    columns=("audios", "audio"),
    placeholder="<audio>",
    roles=("user",),
    rule="sound",
    item="clip",
    items="clips",
    substance="sound",
    default_type="audio/wav",
)
KINDS = (PICTURES, SOUND)
"""All kinds of media that records may have."""
COLUMNS = (*PICTURES.columns, *SOUND.columns)
"""Columns that hold files of any kind."""


def kind_of(part_type: object) -> MediaKind | None:
    """Return the kind of a part by its type in a record; None for a part that is neither a picture nor sound."""
    for kind in KINDS:
        if part_type in kind.spellings:
            return kind
    return None


def read_media_part(remaining: dict[str, Any], kind: MediaKind, location: str) -> dict[str, Any]:
    """Take a picture or a clip out of a part; the reference is None if the part only says where a file of the column belongs.

    Raises:
        Problem: the part has no single file, or one that is written in an unknown way.
    """
    keys = [key for key in (*kind.spellings, "url", "path", "source", "base64") if key in remaining]
    if not keys:
        return {"type": kind.part, kind.part: None}
    if len(keys) > 1:
        raise Problem(kind.rule, f"{location} has both {keys[0]} and {keys[1]}", "keep the one that is meant")
    value = remaining.pop(keys[0])
    # Mistral's API takes base64 and data URLs of sound as a text in the place of OpenAI's object.
    if isinstance(value, str) and keys[0] in ("base64", "input_audio"):
        value = {"data": value}
    if kind is PICTURES:
        remaining.pop("detail", None)  # a hint to OpenAI's servers about the resolution
    return {"type": kind.part, kind.part: reference_of(value, kind, location)}


_DATA_KEYS = {"type", "data", "format", "media_type"}
"""Keys of base64 in OpenAI's spelling {data, format}, and in Anthropic's {type: base64, media_type, data}."""


def reference_of(value: Any, kind: MediaKind, location: str) -> str:
    """Return the reference to a picture or a clip in one of its spellings.

    Raises:
        Problem: the value is none of them.
    """
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
        data = value.get("data")
        if isinstance(data, str) and value.keys() <= _DATA_KEYS:
            return data if data.startswith("data:") or "://" in data else f"data:{_media_type(value, kind)};base64,{data}"
        if "array" in value:
            message = f"{location} has decoded samples, which are not read"
            raise Problem(kind.rule, message, "store files instead: Dataset.cast_column(NAME, Audio(decode=False))")
        stated = [value[key] for key in ("bytes", "url", "path") if isinstance(value.get(key), str)]
        value = stated[0] if stated else value
    if not isinstance(value, str) or not value:
        raise Problem(kind.rule, f"{location} should be {kind.substance}, not {brief(value)}", kind.remedy)
    return value


def _media_type(value: dict[str, Any], kind: MediaKind) -> object:
    """Return the media type that base64 states in one of its spellings."""
    if "format" in value:
        return f"{kind.part}/{value['format']}"
    return value.get("media_type", kind.default_type)
