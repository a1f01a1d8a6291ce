"""Preparing data: made once, shard by shard, the same whoever makes it, resumed after a kill, errors that name the record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_train.data.prepared import shard_pool, shards, tokenize_ahead, tokenize_shard
from moe_train.data.records import scan
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.prepared.stores import CHAT, COMPLETION, MESSAGES, TEXT, ids, stored


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files at about every kilobyte."""
    monkeypatch.setattr(scan.scan_file, "__defaults__", ((1000, 1000),))
    monkeypatch.setattr(shards.cut, "__defaults__", (1000,))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the key of each shard that is tokenised in this process."""
    keys: list[str] = []
    original = tokenize_shard.write_shard

    def noted(directory: Path, *arguments) -> None:
        keys.append(directory.name)
        original(directory, *arguments)

    monkeypatch.setattr(shard_pool, "write_shard", noted)
    return keys


@pytest.mark.usefixtures("small_shards")
def test_what_is_tokenised_once_is_not_tokenised_again(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], made: list[str]
) -> None:
    cache = tmp_path / "cache"
    path = write_lines("a.jsonl", [{"text": f"text {i}"} for i in range(300)])
    first = stored(path, tokenizer=tokenizer, cache=cache)
    assert len(made) == len(first.manifest.shards) > 3
    moved = path.rename(tmp_path / "b.jsonl")
    again = stored(moved, record=TEXT.model_copy(update={"too_long": "drop"}), tokenizer=tokenizer, cache=cache)
    assert len(made) == len(first.manifest.shards) and again.path == first.path
    assert again.where(0) == f"{moved}:1" and first.where(0) == f"{path}:1"
    known = ids(first)
    # Another file beside it: what is known of the first is used again, except what is damaged.
    for damaged, content in (("tokens", bytes(10)), ("facts.json", b"")):
        (Path(first.path) / made.pop(0) / damaged).write_bytes(content)
    more = write_lines("c.jsonl", [{"text": "other"}])
    both = stored(moved, more, tokenizer=tokenizer, cache=cache)
    assert len(made) == len(first.manifest.shards) + 1 and ids(both) == [*known, [1, *tokenizer.encode("other"), 2]]
    assert both.where(300) == f"{more}:1"


def test_the_same_content_twice(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, made: list[str]
) -> None:
    monkeypatch.setattr(shards.cut, "__defaults__", (1,))
    paths = [write_lines(name, [{"text": "fox"}]) for name in ("a.jsonl", "b.jsonl")]
    store = stored(*paths, tokenizer=tokenizer, cache=tmp_path / "cache")
    assert len(made) == 1 and [store.where(i) for i in range(2)] == [f"{path}:1" for path in paths]


def test_a_changed_template_is_tokenised_again(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], made: list[str]
) -> None:
    path = write_lines("a.jsonl", [{"messages": MESSAGES}])
    assert tokenizer.chat_template is not None
    stores = [
        stored(path, record=CHAT, tokenizer=tokenizer, cache=tmp_path / "cache", template=template)
        for template in (tokenizer.chat_template, tokenizer.chat_template.replace("[INST]", "[INST] "))
    ]
    assert len(made) == 2 and ids(stores[0]) != ids(stores[1])
    assert stores[0].manifest.rules_sha256 != stores[1].manifest.rules_sha256


def test_one_of_several_at_once_does_the_work(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], made: list[str]
) -> None:
    path = write_lines("a.jsonl", [{"text": f"text {i}"} for i in range(600)])
    hashes: list[str] = []
    work = lambda: hashes.append(stored(path, tokenizer=tokenizer, cache=tmp_path / "cache").manifest.hash)  # noqa: E731
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashes) == 4 and len(set(hashes)) == 1 and len(made) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from moe_train import config
from moe_train.data.prepared import shards, tokenize_ahead
from moe_train.data.prepared.tokenize_shard import Recipe
from moe_train.data.records import scan
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.huggingface import HuggingFace
def main():
    scan.scan_file.__defaults__ = ((20000, 20000),)
    shards.cut.__defaults__ = (20000,)
    tokenizer = HuggingFace(sys.argv[2])
    source = config.FileSource(name="files", files=(sys.argv[3],), record=config.TextRecord(name="text"))
    def report(progress):
        print(progress.done, flush=True)
    recipe = Recipe(source, open_source(source), tokenizer, None)
    tokenize_ahead.prepare(recipe, sys.argv[4], num_proc=int(sys.argv[5]), report=report)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("num_proc", [1, 2])
def test_what_was_done_before_a_kill_stays_done(
    tokenizer: HuggingFace,
    tmp_path: Path,
    write_lines: Callable[..., Path],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
    num_proc: int,
) -> None:
    rng = np.random.default_rng(0)
    words = "the quick brown fox jumps over the lazy dog".split()
    path = write_lines("a.jsonl", [{"text": " ".join(rng.choice(words, 40))} for _ in range(6000)])
    script, cache = tmp_path / "killed.py", tmp_path / "cache"
    script.write_text(KILLED)
    root = str(Path(__file__).parents[3])
    command = [sys.executable, str(script), root, str(tokenizer.path), str(path), str(cache), str(num_proc)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    total = None
    for line in process.stdout:  # kill the parent alone, while it is at it
        if int(line) >= 3:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL
    [unfinished] = cache.glob("tokens-*.unfinished")
    deadline = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid), "its processes end with it"
    before = {entry.name for entry in unfinished.iterdir() if not entry.name.startswith(".")}
    assert len(before) >= 3
    (unfinished / before.pop() / "facts.json").write_bytes(b"")  # a damaged shard is made again
    monkeypatch.setattr(scan.scan_file, "__defaults__", ((20000, 20000),))
    monkeypatch.setattr(shards.cut, "__defaults__", (20000,))
    store = stored(path, tokenizer=tokenizer, cache=cache, template=None)
    total = {shard.name for shard in store.manifest.shards}
    assert len(before) < len(total) and set(made) == total - before and len(made) == len(set(made))
    assert ids(store) == [[1, *tokenizer.encode(json.loads(line)["text"]), 2] for line in path.open()]
    assert sorted(entry.name for entry in Path(store.path).iterdir()) == sorted([*total, "manifest.json"])
    assert not list(cache.glob("*.unfinished"))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_text_at_all(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> None:
    for records in ([], [{"text": ""}]):
        with pytest.raises(ValueError, match=r"a\.jsonl: no record with any text"):
            stored(write_lines("a.jsonl", records), tokenizer=tokenizer, cache=tmp_path / "cache")


def test_the_version_of_the_rules_goes_up_with_what_a_record_becomes(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]
) -> None:
    """Where this fails the ids of records have changed: raise `_RULES`, so that no prepared set with the old ones is used."""
    turns = [{"role": "system", "content": "Be brief."}, *MESSAGES, {**MESSAGES[0], "weight": None}, {**MESSAGES[1], "weight": 0}]
    fields = {"text": "naïve </s> café", "messages": turns, "prompt": "a", "completion": "b"}
    path = write_lines("a.jsonl", [fields])
    made = [stored(path, record=r, tokenizer=tokenizer, cache=tmp_path / "cache").manifest for r in (TEXT, CHAT, COMPLETION)]
    assert (tokenize_ahead._RULES, [manifest.shards[0].sha256[:8] for manifest in made]) == (
        7,
        ["01e76226", "dac944c4", "59ff2519"],
    )


def test_a_file_that_changes_while_it_is_read(
    tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines("a.jsonl", [{"text": "some text"}])
    original = tokenize_shard.write_shard

    def and_append(*arguments) -> None:
        original(*arguments)
        with path.open("a") as file:
            file.write('{"text": "more"}\n')

    monkeypatch.setattr(shard_pool, "write_shard", and_append)
    with pytest.raises(ValueError, match=r"a\.jsonl: records were changed while they were read"):
        stored(path, tokenizer=tokenizer, cache=tmp_path / "cache")
