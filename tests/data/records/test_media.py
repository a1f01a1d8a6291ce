"""Pictures and sound of records, together."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.data.records.conversation import normalise
from moe_train.data.records.media import has_media, locate_media, shows_media, sound_of, with_columns
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem

ANSWER = {"role": "assistant", "content": "yes"}
CLIP = {"type": "audio", "audio": "a.wav"}


def test_files_of_sound_are_beside_their_records(tmp_path: Path) -> None:
    record = Conversation([{"role": "user", "content": [dict(CLIP)]}, ANSWER], [])
    assert has_media(record.messages[0]) and not has_media(ANSWER) and shows_media(record)
    locate_media(record, tmp_path)
    assert sound_of(record) == [str(tmp_path / "a.wav")]
    outside = Conversation([{"role": "user", "content": [CLIP | {"audio": "../a.wav"}]}], [])
    with pytest.raises(Problem, match=r"the sound '../a.wav' is outside of"):
        locate_media(outside, tmp_path)
    fetched = Conversation([{"role": "user", "content": [CLIP | {"audio": "https://example.com/a.wav"}]}], [])
    with pytest.raises(Problem, match=r"the sound .* is a URL, and nothing is fetched"):
        locate_media(fetched, tmp_path)


def test_columns_of_both_kinds() -> None:
    remaining: dict[str, object] = {"images": ["a.png"], "audios": ["a.wav"], "id": 3}
    question = {"role": "user", "content": "<image>What?<audio>"}
    (message,) = with_columns(Conversation([question], []), remaining).messages
    assert [part["type"] for part in message["content"]] == ["image", "text", "audio"] and remaining == {"id": 3}


def test_kinds_of_records_without_sound_refuse_it() -> None:
    pair = config.PreferenceRecord(name="preference", prompt="prompt", chosen="chosen", rejected="rejected")
    fields = {"prompt": [{"role": "user", "content": [CLIP]}], "chosen": [ANSWER], "rejected": [ANSWER]}
    with pytest.raises(Problem, match="message 0 has sound, and only records of messages"):
        normalise(fields, pair)
