"""Folders of a prepared set: the same batches from a bucket, read by range, within a bound."""

from __future__ import annotations

import errno
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.sources import open_store
from moe_train.data.prepared import folder as folders
from moe_train.data.prepared.folder import ArrayPart, File, RemoteFolder
from moe_train.data.prepared.upload import upload
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.prepared.stores import prepared


@pytest.fixture
def reads(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """The reads from the bucket: (path, start, end)."""
    found: list[tuple[str, int | None, int | None]] = []
    original = type(bucket).cat_file

    def noted(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        found.append((path, start, end))
        return original(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(bucket), "cat_file", noted)
    return found


@pytest.mark.parametrize("kind", ["memory", "file", "path"])
def test_batches_are_the_same_from_anywhere(
    data: config.Data, tokenizer: HuggingFace, tmp_path: Path, bucket: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_BLOCK", 100)
    shape: Any = {"rows": BatchRows(4, 48), "seed": 3}
    here = Loader(data, "train", tokenizer, **shape)
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    goal = {"memory": "memory://bucket/sets", "file": f"file://{tmp_path}/there", "path": str(tmp_path / "there")}[kind]
    steps = (0, 5, 2 * here.steps())
    expected = [(tuple(array.tobytes() for array in here.batch(step)), here.trace(step, 1)) for step in steps]
    there = upload(store.path, goal)
    assert there == f"{goal}/{Path(store.path).name}" == upload(store.path, goal)
    for path in (tmp_path / "a.jsonl", Path(store.path)):  # neither records nor tokens are here any more
        path.unlink() if path.is_file() else shutil.rmtree(path)
    loader = Loader(prepared(data, there), "train", tokenizer, **shape)
    assert (loader.identity, loader.manifest_hash) == (here.identity, here.manifest_hash) and loader.num_truncated > 0
    assert [(tuple(array.tobytes() for array in loader.batch(step)), loader.trace(step, 1)) for step in steps] == expected


def test_a_bucket_is_read_by_range_within_a_bound(
    data: config.Data, tokenizer: HuggingFace, bucket: Any, reads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    upload(store.path, "memory://bucket")
    [shard] = store.manifest.shards
    folder = RemoteFolder(f"memory://bucket/{Path(store.path).name}/{shard.name}", cache_mib=1, block=1 << 18)
    assert folder.block.cache_parameters()["maxsize"] == 4
    small = RemoteFolder(f"memory://bucket/{Path(store.path).name}/{shard.name}", cache_mib=1, block=64)
    size = shard.sizes["tokens"]
    tokens = small.array(File("tokens", store.manifest.dtype, size))
    expected = np.fromfile(Path(store.path) / shard.name / "tokens", store.manifest.dtype)
    reads.clear()
    found = small.read([ArrayPart(tokens, a, b) for a, b in ((300, 301), (10, 20), (12, 50))])
    assert [array.tolist() for array in found] == [expected[a:b].tolist() for a, b in ((300, 301), (10, 20), (12, 50))]
    assert sorted(read[1:] for read in reads) == [(0, 64), (64, 128), (576, 640)]
    assert tokens[10:50].tolist() == expected[10:50].tolist() and len(reads) == 3, "from memory"
    assert tokens[len(expected) - 5 : len(expected)].tolist() == expected[-5:].tolist() and reads[-1][2] == size
    assert tokens[7:7].tolist() == []
    small.block.cache_clear()
    monkeypatch.setattr(small, "block", functools.lru_cache(2)(small._block))
    monkeypatch.setattr(small, "_max_blocks", 2)
    reads.clear()
    found = small.read([ArrayPart(tokens, a, a + 40) for a in (256, 0, 128, 64, 192)])
    assert [array.tolist() for array in found] == [expected[a : a + 40].tolist() for a in (256, 0, 128, 64, 192)]
    assert len(reads) == 10, "more blocks than are kept, each once"
    small.block.cache_clear()
    reads.clear()
    for start in range(0, 200, 32):
        assert tokens[start : start + 1][0] == expected[start]
    assert small.block.cache_info().currsize == 2 and len(reads) == 7
    tokens[0:1]
    assert len(reads) == 8, "what was let go is read again"


def test_a_read_that_fails_is_tried_again(bucket: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    bucket.pipe_file("/bucket/tokens", bytes(range(100)))
    original = type(bucket).cat_file
    failures: list[Exception] = []

    def failing(self: Any, path: str, **more: Any) -> bytes:
        if failures:
            raise failures.pop()
        return original(self, path, **more)

    monkeypatch.setattr(type(bucket), "cat_file", failing)
    monkeypatch.setattr(folders, "_WAITS", (0.01, 0.01))
    folder = RemoteFolder("memory://bucket", cache_mib=1, block=16)
    tokens = folder.array(File("tokens", "uint8", 100))
    monkeypatch.setattr(folders, "_LATER_WAITS", ())
    failures[:] = [TimeoutError(), RuntimeError("503\nSlow down")]
    assert tokens[3:40].tolist() == list(range(3, 40)) and not failures
    assert [record.getMessage() for record in caplog.records] == [
        "memory://bucket/tokens: 503 Slow down; once more in 0.01 s",
        "memory://bucket/tokens: no answer within 60 s; once more in 0.01 s",
    ]
    failures[:] = [ConnectionResetError("reset by peer" + "." * 1000)] * 3
    with pytest.raises(ConnectionError, match=r"^memory://bucket/tokens cannot be reached: reset by peer\.{147}…; start again"):
        tokens[50:60]


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (PermissionError("Forbidden"), PermissionError, "is refused: Forbidden; state credentials with the right to it"),
        (FileNotFoundError("x"), FileNotFoundError, "is missing; is the bucket's name right"),
        (OSError(errno.EINVAL, "None"), ValueError, r"is damaged \(not 100 bytes\)"),
    ],
)
def test_what_will_not_change_is_not_tried_again(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], said: str
) -> None:
    asked: list[str] = []

    def refuse(self: Any, path: str, **part: Any) -> bytes:
        asked.append(path)
        raise raised

    monkeypatch.setattr(type(bucket), "cat_file", refuse)
    with pytest.raises(kind, match=f"^memory://bucket/tokens {said}"):
        RemoteFolder("memory://bucket", cache_mib=1).array(File("tokens", "uint8", 100))[0:1]
    assert asked == ["/bucket/tokens"]


def test_the_end_of_the_program_ends_a_wait(tmp_path: Path) -> None:
    """It would be joined before the interpreter ends."""
    program = """if True:
        import fsspec, threading, time
        from moe_train.data.prepared.folder import ArrayPart, File, RemoteFolder
        asked = threading.Event()
        def refuse(self, path, **part):
            asked.set()
            raise OSError("down")
        type(fsspec.filesystem("memory")).cat_file = refuse
        tokens = RemoteFolder("memory://bucket", 1).array(File("tokens", "uint8", 50 << 20))
        threading.Thread(target=lambda: tokens[0:50 << 20], daemon=True).start()
        asked.wait()"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "down; once more in 1 s" in done.stderr and "in 5 s" not in done.stderr


def test_windows_fetch_every_block_about_once(
    data: config.Data, tokenizer: HuggingFace, bucket: Any, reads: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    there = prepared(data, upload(store.path, "memory://bucket"), cache_mib=1)
    [shard] = store.manifest.shards
    original = RemoteFolder.__init__
    monkeypatch.setattr(RemoteFolder, "__init__", lambda self, url, cache_mib: original(self, url, cache_mib, block=64))
    fetched = []
    for window in (None, 300):
        loader = Loader(there.model_copy(update={"shuffle_tokens": window}), "train", tokenizer, BatchRows(4, 48), seed=0)
        folder = loader._sources[0].store._folder
        monkeypatch.setattr(folder, "block", functools.lru_cache(32)(folder._block))
        reads.clear()
        for step in range(loader.steps()):
            loader.batch(step)
        fetched.append(len(reads))
    blocks = sum(-(-shard.sizes[name] // 64) for name in ("tokens", "loss_mask", "offsets"))
    assert fetched[1] < 1.2 * blocks < 1.8 * blocks < fetched[0]


def test_what_does_not_go_together_is_refused(data: config.Data, tokenizer: HuggingFace, tmp_path: Path, bucket: Any) -> None:
    shape: Any = {"rows": BatchRows(4, 48), "seed": 3}
    store = open_store(data.train[0], data, tokenizer, tokenizer.chat_template)
    there = prepared(data, upload(store.path, "memory://bucket"))
    template = (tokenizer.chat_template or "").replace("[INST]", "[INST] ")
    with pytest.raises(ValueError, match="was prepared with another chat template"):
        Loader(there.model_copy(update={"chat_template": template}), "train", tokenizer, **shape)
    shutil.copytree(tokenizer.path, tmp_path / "other")
    with (tmp_path / "other" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="was prepared with another tokenizer than"):
        Loader(there, "train", HuggingFace(tmp_path / "other"), **shape)
    for path in ("memory://nowhere", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json; name a folder that"):
            Loader(prepared(data, path), "train", tokenizer, **shape)
    with pytest.raises(ValueError, match=r"^nosuch://bucket cannot be opened: .*nosuch"):
        Loader(prepared(data, "nosuch://bucket"), "train", tokenizer, **shape)
    with pytest.raises(ValueError, match=r"tokens, train\.seq_len is 48"):
        Loader(prepared(data, there.train[0].path, too_long="error"), "train", tokenizer, **shape)  # type: ignore[union-attr]
    [name] = [path for path in bucket.find("bucket") if path.endswith("/tokens")]
    bucket.pipe_file(name, bucket.cat_file(name)[:-2])
    with pytest.raises(ValueError, match=r"tokens is damaged \(not \d+ bytes\)"):
        loader = Loader(there, "train", tokenizer, **shape)
        [loader.batch(step) for step in range(loader.steps())]
