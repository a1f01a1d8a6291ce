"""A prepared set: ids by the number of their example, where it stands, and damage that is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.sources import open_store
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.prepared.folder import RemoteFolder
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.upload import upload
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat import trajectories
from tests.data.hugging_face import small_tekken
from tests.data.prepared.stores import CHAT, MESSAGES, ids, prepared, stored


def test_damage_is_seen(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    path = write_lines("a.jsonl", [{"text": "some text"}])
    store = stored(path, tokenizer=tokenizer, cache=tmp_path / "cache")
    [shard] = store.manifest.shards
    (Path(store.path) / shard.name / "tokens").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens is damaged .*remove"):
        ids(stored(path, tokenizer=tokenizer, cache=tmp_path / "cache"))


def test_a_cache_too_small_for_the_shuffling_is_told(
    data: config.Data, tokenizer: HuggingFace, bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "moe_train")  # whatever tests before this one have asked for
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    there = prepared(data, upload(store.path, "memory://bucket"), cache_mib=1)
    shape: Any = {"rows": BatchRows(4, 48), "seed": 0}
    Loader(there, "train", tokenizer, **shape)
    assert not caplog.records
    original = RemoteFolder.__init__

    def small(self: RemoteFolder, url: str, cache_mib: int) -> None:
        original(self, url, cache_mib, block=64)
        self.cache_bytes = 3000  # 1000 ids of two bytes, and their loss mask

    monkeypatch.setattr(RemoteFolder, "__init__", small)
    for window, told in ((None, 1), (600, 1), (500, 0)):
        caplog.clear()
        Loader(there.model_copy(update={"shuffle_tokens": window}), "train", tokenizer, **shape)
        assert [record.getMessage().split("; ")[1] for record in caplog.records] == told * [
            "set data.shuffle_tokens to 500 at most, or cache_mib to 1"
        ]


def test_pieces_of_examples_are_read_by_number(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    paths = [write_lines("a.jsonl", [{"text": "brown fox"}, {"text": "dog"}]), write_lines("b.jsonl", [{"text": "lazy dogs"}])]
    store = stored(*paths, tokenizer=tokenizer, cache=tmp_path / "cache")
    expected = ids(store)
    assert len(store) == 3 and store.lengths().tolist() == [len(example) - 1 for example in expected]
    pieces = [ExampleSlice(2, 1, 2), ExampleSlice(0, 0, 1)]
    assert [tokens.tolist() for tokens, *_ in store.read(pieces)] == [expected[2][1:4], expected[0][:2]]
    assert store.masks(pieces) == [None, None]
    assert [(store.place(store.origin(i)), store.where(i)) for i in (1, 2)] == [
        (str(paths[0]), f"{paths[0]}:2"),
        (str(paths[1]), f"{paths[1]}:1"),
    ]
    assert TokenStore(store.path).where(2) == f"{paths[1]}:1", "as the manifest says"


def test_examples_of_several_turns_with_tools_are_shortened_to_the_turns_that_fit(
    tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    tokenizer = Mistral(small_tekken(tmp_path, "v13"))
    made = [trajectories.agent(num_calls) for num_calls in (1, 3, 8)]
    ends = []
    for conversation in made:
        (example,) = examples(conversation, None, tokenizer)
        assert example.merged is not None
        ends.append(example.merged.ends)
    records = [{"messages": MESSAGES}, *({"messages": each.messages, "tools": each.tools} for each in made)]
    path = write_lines("a.jsonl", records)
    store = stored(path, record=CHAT, tokenizer=tokenizer, template=None, cache=tmp_path / "cache")
    lengths = store.lengths()
    for seq_len in (5, ends[0][0] - 2, ends[0][0] - 1, ends[1][2], ends[2][7] - 1, ends[2][-1]):
        fitting = [max((end - 1 for end in each if end - 1 <= seq_len), default=each[-1] - 1) for each in ends]
        assert store.fitting_lengths(lengths, seq_len).tolist() == [lengths[0], *fitting]
    plain = stored(write_lines("b.jsonl", records[:1]), record=CHAT, tokenizer=tokenizer, template=None, cache=tmp_path / "cache")
    assert "turn_ends" not in plain.manifest.shards[0].sizes and plain.fitting_lengths(plain.lengths(), 1) == plain.lengths()


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json; name a folder that `moe-train data prepare` made"):
        TokenStore(tmp_path)
