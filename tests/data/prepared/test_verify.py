"""The bytes of prepared sets: compared with their hashes once, on a disk and in a bucket, and ids bounded by the vocabulary."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.sources import open_store
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.upload import upload
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.prepared.stores import prepared

SHAPE: dict[str, Any] = {"rows": BatchRows(4, 48), "seed": 0}


def change(file: Path) -> None:
    """Other bytes of the same size."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def age(directory: Path) -> None:
    """As if all files were written a minute ago, so that their hashes are remembered."""
    for file in directory.rglob("*"):
        os.utime(file, (time.time() - 60, time.time() - 60))


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "offsets", "origins"])
@pytest.mark.parametrize("kind", ["cache", "prepared", "file"])
def test_other_bytes_of_the_same_size_are_refused(
    data: config.Data, tokenizer: HuggingFace, tmp_path: Path, kind: str, name: str
) -> None:
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    directory = Path(store.path)
    if kind == "prepared":
        data = prepared(data, str(directory))
    if kind == "file":
        data = prepared(data, upload(store.path, f"file://{tmp_path}/there"))
        directory = tmp_path / "there" / directory.name
    age(directory)
    Loader(data, "train", tokenizer, **SHAPE)
    [file] = directory.glob(f"*/{name}")
    change(file)
    with pytest.raises(ValueError, match=r"is damaged: its files do not have the hash that manifest\.json states; (remove|copy)"):
        Loader(data, "train", tokenizer, **SHAPE)


def test_an_object_that_replaced_another_is_seen_in_a_set_larger_than_its_cache(
    data: config.Data, tokenizer: HuggingFace, bucket: Any
) -> None:
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    url = upload(store.path, "memory://bucket")
    remote = TokenStore(url)
    remote._folder.cache_bytes = 10
    remote.verify(Path(data.cache_dir) / "scans")
    [shard] = remote.manifest.shards
    path = f"/bucket/{Path(url).name}/{shard.name}/tokens"
    content = bytes(reversed(bucket.cat_file(path)))
    time.sleep(0.01)
    bucket.pipe_file(path, content)
    with pytest.raises(ValueError, match="is damaged: its files do not have the hash"):
        remote.verify(Path(data.cache_dir) / "scans")


def test_files_are_hashed_once(data: config.Data, tokenizer: HuggingFace) -> None:
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    age(Path(store.path))
    memory = Path(data.cache_dir) / "scans"
    memory.mkdir(exist_ok=True)
    before = set(memory.iterdir())
    store.verify(memory)
    hashed = set(memory.iterdir()) - before
    assert len(hashed) == sum(len(shard.sizes) for shard in store.manifest.shards)
    store.verify(memory)
    assert set(memory.iterdir()) - before == hashed


def test_ids_beyond_the_vocabulary_are_refused(data: config.Data, tokenizer: HuggingFace) -> None:
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    [file] = Path(store.path).glob("*/tokens")
    np.full(file.stat().st_size // 2, tokenizer.vocab_size, np.uint16).tofile(file)
    with pytest.raises(ValueError, match=rf"a\.jsonl:1\) has the token id {tokenizer.vocab_size}, but the tokenizer has only"):
        store.read([ExampleSlice(0, 0, 2)])
