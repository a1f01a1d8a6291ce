"""Pictures in records: their spellings, their places in texts, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.pictures import located_path, references_of
from moe_train.data.records.problem import Problem

CHAT = config.ChatRecord(name="chat")
ANSWER = {"role": "assistant", "content": "yes"}
TEXT = {"type": "text", "text": "What?"}


def read(content: Any, section: config.Record = CHAT, **columns: Any) -> Conversation:
    record = normalise({"messages": [{"role": "user", "content": content}, ANSWER], **columns}, section)
    assert isinstance(record, Conversation)
    return record


SPELLINGS: dict[str, Any] = {
    "image": {"type": "image", "image": "a.png"},
    "path": {"type": "image", "path": "a.png"},
    "url": {"type": "image", "url": "a.png"},
    "OpenAI": {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
    "Mistral": {"type": "image_url", "image_url": "a.png"},
    "responses": {"type": "input_image", "image_url": "a.png"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_parts_of_every_spelling(spelling: str) -> None:
    expected = [TEXT, {"type": "image", "image": "a.png"}]
    assert read([TEXT, SPELLINGS[spelling]]).messages[0]["content"] == expected


def test_pictures_as_base64() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    assert references_of(read([TEXT, {"type": "image", "source": source}])) == ["data:image/png;base64,aGk="]
    assert references_of(read([{"type": "image", "base64": "aGk="}])) == ["data:image;base64,aGk="]


COLUMNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LLaMA-Factory": ("<image>What?\n<image> And?", {"images": ["a.png", "b.png"]}),
    "ms-swift": ("<image>\nWhat?<image>And?", {"images": [{"path": "a.png", "bytes": None}, {"path": "b.png"}]}),
    "JSON text": ("<image>What?<image>And?", {"images": '["a.png", "b.png"]'}),
    "TRL": ([{"type": "image"}, TEXT, {"type": "image"}, {"type": "text", "text": "And?"}], {"images": ["a.png", "b.png"]}),
}


@pytest.mark.parametrize("trainer", COLUMNS)
def test_placeholders_get_the_pictures_of_a_column(trainer: str) -> None:
    content, columns = COLUMNS[trainer]
    first, second = ({"type": "image", "image": name} for name in ("a.png", "b.png"))
    assert read(content, **columns).messages[0]["content"] == [first, TEXT, second, {"type": "text", "text": "And?"}]


def test_pictures_of_prompts() -> None:
    section = config.CompletionRecord(name="completion", prompt="prompt", completion="completion")
    record = normalise({"prompt": "<image>What?", "completion": "yes", "image": "a.png"}, section)
    assert isinstance(record, Conversation) and references_of(record) == ["a.png"]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too few": ("<image><image>What?", {"images": ["a.png"]}, "1 pictures in its column, and 2 places"),
    "too many": ("<image>What?", {"images": ["a.png", "b.png"]}, "2 pictures in its column, and 1 places"),
    "no placeholder": ("What?", {"images": ["a.png"]}, "and 0 places"),
    "no picture": ("<image>\nWhat?", {}, "placeholder <image>, and the record has no pictures"),
    "a part without a picture": ([TEXT, {"type": "image"}], {}, "0 pictures in its column, and 1 places"),
    "both columns": ("<image>", {"images": ["a.png"], "image": "a.png"}, "both images and image"),
    "a number": ([{"type": "image", "image": 3}], {}, "should be a picture, not 3"),
    "two pictures in a part": ([{"type": "image", "image": "a", "url": "b"}], {}, "has both image and url"),
    "an unknown key": ([{"type": "image", "image": "a", "image_mask": "b"}], {}, "image_mask"),
    "video": ([{"type": "video", "video": "a.mp4"}], {}, "video and documents are not read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_add_up_is_refused(kind: str) -> None:
    content, columns, reason = REFUSED[kind]
    with pytest.raises(Problem, match=reason):
        read(content, **columns)


def test_markup_in_the_middle_of_a_text_is_no_placeholder() -> None:
    assert read("Use <image> in SVG, please.").messages[0]["content"] == "Use <image> in SVG, please."


def test_only_the_user_shows_pictures() -> None:
    answer = {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}
    with pytest.raises(Problem, match="message 1 is assistant, and has a picture"):
        normalise({"messages": [{"role": "user", "content": "Draw."}, answer]}, CHAT)
    pair = config.PreferenceRecord(name="preference", prompt="prompt", chosen="chosen", rejected="rejected")
    question = [{"role": "user", "content": [TEXT, {"type": "image", "image": "a.png"}]}]
    with pytest.raises(Problem, match="only records of messages or of a prompt"):
        normalise({"prompt": question, "chosen": [ANSWER], "rejected": [ANSWER]}, pair)


def test_files_are_beside_their_records_or_below(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    inside = folder / "pictures" / "a b.png"
    inside.write_bytes(b"")
    assert located_path("pictures/a b.png", folder) == str(inside)
    assert located_path(str(inside), folder) == str(inside)
    assert located_path(f"file://{folder}/pictures/a%20b.png", folder) == str(inside)
    assert located_path("data:image/png;base64,aGk=", None) == "data:image/png;base64,aGk="
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    for path in ("../a.png", "/etc/passwd", "pictures/../../a.png", "link.png", f"{tmp_path}/database/a.png"):
        with pytest.raises(Problem, match=r"outside of .*data, the folder"):
            located_path(path, folder)
    for url in ("https://example.com/a.png", "s3://bucket/a.png"):
        with pytest.raises(Problem, match="nothing is fetched"):
            located_path(url, folder)
    with pytest.raises(Problem, match="from no folder"):
        located_path("a.png", None)
    with pytest.raises(Problem, match="is no path"):
        located_path("a\0.png", folder)
