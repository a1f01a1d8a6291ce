"""Pictures and sound in records: their columns, their places in texts, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import normalise
from moe_train.data.records.media import has_media, locate_media, located_path, references_of, shows_media, with_columns
from moe_train.data.records.media_parts import KINDS, PICTURES, SOUND, MediaKind
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem

CHAT = config.ChatRecord(name="chat")
ANSWER = {"role": "assistant", "content": "yes"}
TEXT = {"type": "text", "text": "What?"}
CLIP = {"type": "audio", "audio": "a.wav"}

either = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.part)


def read(content: Any, section: config.Record = CHAT, **columns: Any) -> Conversation:
    record = normalise({"messages": [{"role": "user", "content": content}, ANSWER], **columns}, section)
    assert isinstance(record, Conversation)
    return record


COLUMNS: dict[str, tuple[Any, Any]] = {
    "LLaMA-Factory": ("<X>What?\n<X> And?", ["a", "b"]),
    "ms-swift": ("<X>\nWhat?<X>And?", [{"path": "a", "bytes": None}, {"path": "b"}]),
    "JSON text": ("<X>What?<X>And?", '["a", "b"]'),
    "TRL": ([{"type": "X"}, TEXT, {"type": "X"}, {"type": "text", "text": "And?"}], ["a", "b"]),
}


@either
@pytest.mark.parametrize("trainer", COLUMNS)
def test_placeholders_get_the_files_of_a_column(trainer: str, kind: MediaKind) -> None:
    content, column = COLUMNS[trainer]
    if isinstance(content, str):
        content = content.replace("<X>", kind.placeholder)
    else:
        content = [part | {"type": kind.part} if part["type"] == "X" else part for part in content]
    first, second = ({"type": kind.part, kind.part: name} for name in ("a", "b"))
    expected = [first, TEXT, second, {"type": "text", "text": "And?"}]
    assert read(content, **{kind.columns[0]: column}).messages[0]["content"] == expected


@either
def test_files_of_prompts(kind: MediaKind) -> None:
    section = config.CompletionRecord(name="completion", prompt="prompt", completion="completion")
    record = normalise({"prompt": f"{kind.placeholder}What?", "completion": "yes", kind.columns[1]: "a"}, section)
    assert isinstance(record, Conversation) and references_of(record.messages, kind) == ["a"]


def refused(kind: MediaKind) -> dict[str, tuple[Any, dict[str, Any], str]]:
    mark, (several, one), items = kind.placeholder, kind.columns, kind.items
    return {
        "too few": (f"{mark}{mark}What?", {several: ["a"]}, f"1 {items} in its column, and 2 places"),
        "too many": (f"{mark}What?", {several: ["a", "b"]}, f"2 {items} in its column, and 1 places"),
        "no placeholder": ("What?", {several: ["a"]}, "and 0 places"),
        "no file": (f"{mark}\nWhat?", {}, f"placeholder {mark}, and the record has no {items}"),
        "a part without a file": ([TEXT, {"type": kind.part}], {}, f"0 {items} in its column, and 1 places"),
        "both columns": (mark, {several: ["a"], one: "a"}, f"both {several} and {one}"),
        "an unknown key": ([{"type": kind.part, kind.part: "a", "image_mask": "b"}], {}, "image_mask"),
        "video": ([{"type": "video", "video": "a.mp4"}], {}, "video and documents are not read"),
    }


@either
@pytest.mark.parametrize("fault", refused(PICTURES))
def test_what_does_not_add_up_is_refused(fault: str, kind: MediaKind) -> None:
    content, columns, reason = refused(kind)[fault]
    with pytest.raises(Problem, match=reason):
        read(content, **columns)


def test_markup_in_the_middle_of_a_text_is_no_placeholder() -> None:
    assert read("Use <image> in SVG, please.").messages[0]["content"] == "Use <image> in SVG, please."


@either
def test_only_the_user_has_files(kind: MediaKind) -> None:
    part = {"type": kind.part, kind.part: "a"}
    with pytest.raises(Problem, match=f"message 1 is assistant, and has {kind.substance}"):
        normalise({"messages": [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [part]}]}, CHAT)
    pair = config.PreferenceRecord(name="preference", prompt="prompt", chosen="chosen", rejected="rejected")
    question = [{"role": "user", "content": [TEXT, part]}]
    with pytest.raises(Problem, match=f"message 0 has {kind.substance}, and only records of messages, of a prompt or of"):
        normalise({"prompt": question, "chosen": [ANSWER], "rejected": [ANSWER]}, pair)


def test_columns_of_both_kinds() -> None:
    remaining: dict[str, object] = {"images": ["a.png"], "audios": ["a.wav"], "id": 3}
    question = {"role": "user", "content": "<image>What?<audio>"}
    (message,) = with_columns(Conversation([question], []), remaining).messages
    assert [part["type"] for part in message["content"]] == ["image", "text", "audio"] and remaining == {"id": 3}
    assert references_of([message]) == ["a.png", "a.wav"] and references_of([message], SOUND) == ["a.wav"]


def test_files_are_beside_their_records_or_below(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    inside = folder / "pictures" / "a b.png"
    inside.write_bytes(b"")
    for path in ("pictures/a b.png", str(inside), f"file://{folder}/pictures/a%20b.png"):
        assert located_path(path, folder, PICTURES) == str(inside)
    assert located_path("data:image/png;base64,aGk=", None, PICTURES) == "data:image/png;base64,aGk="
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    for path in ("../a.png", "/etc/passwd", "pictures/../../a.png", "link.png", f"{tmp_path}/database/a.png"):
        with pytest.raises(Problem, match=r"the picture .* is outside of .*data, the folder"):
            located_path(path, folder, PICTURES)
    for url in ("https://example.com/a.png", "s3://bucket/a.png"):
        with pytest.raises(Problem, match="nothing is fetched"):
            located_path(url, folder, PICTURES)
    with pytest.raises(Problem, match=r"the sound 'a.wav' is a path, and these records are from no folder"):
        located_path("a.wav", None, SOUND)
    with pytest.raises(Problem, match="is no path"):
        located_path("a\0.png", folder, PICTURES)


def test_paths_of_a_record_become_files(tmp_path: Path) -> None:
    record = Conversation([{"role": "user", "content": [dict(CLIP), {"type": "image", "image": "b.png"}]}, ANSWER], [])
    assert has_media(record.messages[0]) and not has_media(ANSWER) and shows_media(record)
    locate_media(record, tmp_path)
    assert references_of(record.messages) == [str(tmp_path / "a.wav"), str(tmp_path / "b.png")]
    outside = Conversation([{"role": "user", "content": [CLIP | {"audio": "../a.wav"}]}], [])
    with pytest.raises(Problem, match=r"the sound '../a.wav' is outside of"):
        locate_media(outside, tmp_path)
