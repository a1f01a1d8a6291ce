"""Pictures and sound in the comparison of records: by content, whatever their files are called."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.check.check import check_data
from moe_train.data.check.media_content import by_content, media_hash
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records.media import references_of
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.mistral import Mistral
from tests.commands.audio_wrapper import AUDIO, tone, wav
from tests.data.hugging_face import small_tekken

SPEECH = "we meet at noon in the large hall behind the old station and talk about the weather of the week"


def conversation(*references: str) -> Conversation:
    return Conversation([{"role": "user", "content": [{"type": "audio", "audio": name} for name in references]}], [])


def test_files_are_known_by_their_bytes(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c, missing = (str(tmp_path / name) for name in "abcd")
    url = f"data:audio/wav;base64,{base64.b64encode(b'one').decode()}"
    assert by_content(conversation(a, c)) == by_content(conversation(b, c)) == by_content(conversation(url, c))
    assert by_content(conversation(a, c)) != by_content(conversation(c, a))
    original = conversation(a, missing)
    assert references_of(by_content(original).messages)[1] == missing and references_of(original.messages) == [a, missing]  # type: ignore[union-attr]
    plain = Conversation([{"role": "user", "content": "hi"}], [])
    assert by_content(plain) is plain and media_hash(plain) == 0
    assert len({media_hash(by_content(conversation(*names))) for names in ((a,), (c,), (a, c), (c, a))}) == 4


@pytest.mark.parametrize("near", [False, True])
def test_equal_transcripts_of_different_clips_are_no_duplicates(near: bool, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    for number, frequency in enumerate((300, 600, 300)):
        (tmp_path / f"{number}.wav").write_bytes(wav(tone(frequency, 0.1)))
        # The last clip is the first one under another name.
        ending = f" {number}" if near else ""
        records.append({"audio": f"{number}.wav", "text": SPEECH + ending})
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = Mistral(small_tekken(tmp_path, "v7", vocab=280, audio=AUDIO))
    result = check_data([CheckedSource((str(file),))], tokenizer, CheckSettings(seq_len=256))
    duplicates = result["duplicates"]
    assert (duplicates["exact"], duplicates["near"]) == ((0, 1) if near else (1, 0))
