"""Pictures and sound of records: whether there are any, and where their files are."""

from __future__ import annotations

from pathlib import Path

from moe_train.data.records.normal_form import Conversation, Message, NormalRecord, messages_of
from moe_train.data.records.pictures import has_pictures, located_path, refuse_pictures, take_column, with_pictures
from moe_train.data.records.pictures import locate_pictures as _locate_pictures
from moe_train.data.records.problem import Problem
from moe_train.data.records.sound import sound_parts, take_sound_column, with_sound
from moe_train.data.sound.read import RULE


def has_media(message: Message) -> bool:
    """Return whether a message has a picture or sound."""
    return has_pictures(message) or any(True for _ in sound_parts(message))


def shows_media(record: NormalRecord) -> bool:
    """Return whether a record has a picture or sound."""
    return any(map(has_media, messages_of(record)))


def sound_of(conversation: Conversation) -> list[str]:
    """Return the references of all clips of a conversation, in order."""
    references: list[str] = []
    for message in conversation.messages:
        references += [part["audio"] for part in sound_parts(message)]
    return references


def locate_media(record: NormalRecord, folder: Path | None) -> None:
    """Replace the paths of pictures and sound in a record in the normal form by those of files in `folder`.

    Raises:
        Problem: a path leaves the folder, or a reference is to be fetched from a network.
    """
    _locate_pictures(record, folder)
    for message in messages_of(record):
        for part in sound_parts(message):
            part["audio"] = located_path(part["audio"], folder, "sound", RULE)


def with_columns(conversation: Conversation, remaining: dict[str, object]) -> Conversation:
    """Take the columns of pictures and of sound out of `remaining`, and put what they hold into the user's messages."""
    return with_sound(with_pictures(conversation, take_column(remaining)), take_sound_column(remaining))


def refuse_media(record: NormalRecord) -> None:
    """Raise Problem if a record of a kind that takes neither pictures nor sound has one."""
    refuse_pictures(record)
    for i, message in enumerate(messages_of(record)):
        if any(True for _ in sound_parts(message)):
            error_text = f"message {i} has sound, and only records of messages, of a prompt or of a transcription take sound"
            raise Problem(RULE, error_text, "drop the record")
