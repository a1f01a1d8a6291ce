"""The global order: a batch is a function of (seed, step) alone, whoever asks, whenever, and in how many processes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import Batch, BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.tokenizers.huggingface import HuggingFace

GSM8K = Path(__file__).resolve().parents[4] / "shared" / "data" / "gsm8k" / "train.jsonl"
TEXT = config.TextRecord(name="text")


def digest(*batches: Batch) -> str:
    total = hashlib.sha256()
    for name in Batch._fields:
        total.update(np.concatenate([getattr(batch, name) for batch in batches]).tobytes())
    return total.hexdigest()


@pytest.fixture
def make(tokenizer: HuggingFace, tmp_path: Path) -> Callable[..., Loader]:
    """A loader over files of JSON lines, each (path, weight) a source."""

    def make(
        *files: tuple[Path, float | None], sources: Any = "train", record: config.Record = TEXT, seed: int = 0, **settings: Any
    ) -> Loader:
        chosen = tuple(config.FileSource(name="files", files=(str(file),), record=record, weight=weight) for file, weight in files)
        cache = str(tmp_path / "cache")
        held_out = tuple(source.model_copy(update={"weight": None}) for source in chosen) if sources == "eval" else ()
        data = config.Data(train=chosen, eval=held_out, cache_dir=cache)
        rows = BatchRows(**{"batch_size": 4, "seq_len": 32} | settings)
        return Loader(data, sources, tokenizer, rows, seed=seed)

    return make


@pytest.fixture
def two_files(write_lines: Callable[..., Path]) -> list[tuple[Path, float]]:
    random = np.random.default_rng(0)
    words = "the quick brown fox jumps over lazy dog json 東京 3.14".split()
    records = [{"text": " ".join(random.choice(words, random.integers(1, 60)))} for _ in range(60)]
    return [(write_lines("a.jsonl", records[:40]), 3.0), (write_lines("b.jsonl", records[40:]), 1.0)]


def test_a_resume_within_an_epoch_on_other_processes(make: Any, two_files: Any) -> None:
    alone = make(*two_files)
    start = alone.steps() // 2
    expected = [digest(batch) for batch in itertools.islice(alone.iterate(start), 4)]
    for count in (2, 4):
        parts = [make(*two_files, process_index=i, process_count=count).iterate(start) for i in range(count)]
        assert [digest(*(next(part) for part in parts)) for _ in range(4)] == expected


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("sources", ["train", "eval"])
def test_the_number_of_processes_changes_nothing(make: Any, two_files: Any, process_count: int, sources: str) -> None:
    alone = make(*two_files, sources=sources)
    parts = [make(*two_files, sources=sources, process_index=i, process_count=process_count) for i in range(process_count)]
    assert {part.identity for part in parts} == {alone.identity}
    for step in (0, 1, 2, alone.steps() - 1):
        batches = [part.batch(step) for part in parts]
        assert [batch.tokens.shape for batch in batches] == [(4 // process_count, 32)] * process_count
        assert digest(*batches) == digest(alone.batch(step))


def test_a_restart_at_any_step_continues_with_the_same_batches(make: Any, two_files: Any) -> None:
    first = make(*two_files)
    count = first.steps() + 3
    expected = [digest(batch) for batch in itertools.islice(first.iterate(), count)]
    assert len(set(expected)) == count
    for start in (0, 1, 5, count - 1):
        again = make(*two_files)
        assert [digest(batch) for batch in itertools.islice(again.iterate(start), count - start)] == expected[start:]
        assert digest(again.batch(start)) == expected[start]


def test_the_seed_changes_the_order_and_nothing_else(make: Any, two_files: Any) -> None:
    zero, one = make(*two_files[:1]), make(*two_files[:1], seed=1)
    assert zero.manifest_hash == one.manifest_hash and zero.identity != one.identity
    orders = [[epoch_of(loader, epoch) for epoch in range(2)] for loader in (zero, one)]
    assert len({str(epoch) for epochs in orders for epoch in epochs}) == 4, "seed 0's second epoch is not seed 1's first"
    assert len({str(sorted(piece for row in epoch for piece in row)) for epochs in orders for epoch in epochs}) == 1


def epoch_of(loader: Loader, epoch: int) -> list[list[tuple[int, int, int]]]:
    """(number of the record, start, length) of each segment of each row of an epoch; of a loader with one source."""
    order = loader._sources[0].order
    rows = range(order.end(epoch - 1) if epoch else 0, order.end(epoch))
    return [[segment[2:3] + segment[4:] for segment in loader.trace(*divmod(row, 4))] for row in rows]


def test_each_epoch_has_every_record_once_in_new_rows(make: Any, two_files: Any) -> None:
    loader = make(*two_files[:1])
    epochs = [epoch_of(loader, epoch) for epoch in range(3)]
    pieces = [Counter(piece for row in epoch for piece in row) for epoch in epochs]
    assert pieces[0] == pieces[1] == pieces[2] and set(pieces[0].values()) == {1}
    assert {number for number, *_ in pieces[0]} == set(range(1, 41))
    assert len({str(sorted(map(sorted, epoch))) for epoch in epochs}) == 3, "rows are made anew, not only shuffled"


def test_sources_are_mixed_by_weight_and_an_epoch_sees_every_record(make: Any, two_files: Any) -> None:
    mixed = make(*two_files, batch_size=1)
    rows = [mixed.trace(step, 0) for step in range(mixed.steps())]
    seen = {(segment.file, segment.number) for row in rows for segment in row}
    assert seen == {(str(path), number) for (path, _), n in zip(two_files, (40, 20), strict=True) for number in range(1, n + 1)}
    assert rows[-1][0] not in {segment for row in rows[:-1] for segment in row}, "not a step more than is needed"
    share = sum(row[0].source == 0 for row in rows) / len(rows)
    assert abs(share - 0.75) < 0.02
    assert Counter(row[0].source for row in rows[:8]) == {0: 6, 1: 2}
    [first, second] = mixed.epochs(mixed.steps()).values()
    assert min(first, second) == pytest.approx(1, abs=0.05)
    assert second / first == pytest.approx(mixed._sources[0].order.end(0) / mixed._sources[1].order.end(0) / 3, rel=0.01)


def test_without_weights_every_epoch_has_each_row_of_each_source_once(make: Any, two_files: Any) -> None:
    loader = make(*((path, None) for path, _ in two_files), batch_size=1)
    assert loader.num_records == 60
    for epoch in range(3):
        steps = range(loader.steps(epoch) if epoch else 0, loader.steps(epoch + 1))
        rows = [loader.trace(step, 0) for step in steps]
        seen = Counter((segment.file, segment.number, segment.start) for row in rows for segment in row)
        assert set(seen.values()) == {1} and len({(file, number) for file, number, _ in seen}) == 60
        # Both sources are spread over the epoch.
        halves = [Counter(row[0].source for row in half) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
        assert all(abs(halves[0][source] - halves[1][source]) <= 1 for source in (0, 1))
    assert set(loader.epochs(loader.steps()).values()) == {1.0}


def test_two_epochs_are_every_record_twice(make: Any, two_files: Any) -> None:
    loader = make(*two_files[:1], batch_size=1)
    assert loader.steps(2) == loader._sources[0].order.end(1)
    seen = Counter(segment for step in range(loader.steps(2)) for segment in loader.trace(step, 0))
    assert set(seen.values()) == {2}


def test_a_row_is_traced_to_the_words_of_its_lines(make: Any, two_files: Any, tokenizer: HuggingFace) -> None:
    loader = make(*two_files)
    for step in (0, 7):
        batch = loader.batch(step)
        for row in range(4):
            segments = loader.trace(step, row)
            assert batch.segment_ids[row].max() == len(segments)
            for i, segment in enumerate(segments, start=1):
                text = json.loads(Path(segment.file).read_text().splitlines()[segment.number - 1])["text"]
                ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id][segment.start :]
                assert batch.tokens[row][batch.segment_ids[row] == i].tolist() == ids[: segment.length]
    with pytest.raises(IndexError, match="no row 4 in batch 0; it has 4, from 0"):
        loader.trace(0, 4)


def test_evaluation_is_each_row_once_in_order_filled_up_with_padding(make: Any, two_files: Any, tokenizer: HuggingFace) -> None:
    loader = make(*two_files, sources="eval", batch_size=7)
    batches = list(loader.iterate())
    assert len(batches) == loader.batches == -(-loader.num_rows // 7) and loader.num_rows % 7
    assert all(batch.tokens.shape == (7, 32) for batch in batches)
    joined = Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))
    assert (joined.segment_ids.max(axis=1) > 0).tolist() == [i < loader.num_rows for i in range(7 * len(batches))]
    assert not any(array[loader.num_rows :].any() for array in joined)
    assert int(joined.loss_mask.sum()) == loader.num_tokens
    texts = [json.loads(line)["text"] for path, _ in two_files for line in path.open()]
    expected = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert sorted(joined.targets[joined.loss_mask].tolist()) == sorted(expected)
    with pytest.raises(IndexError):
        loader.batch(loader.batches)


def test_the_last_target_of_a_record_is_its_end(make: Any, write_lines: Any, tokenizer: HuggingFace) -> None:
    batch = make((write_lines("a.jsonl", [{"text": "fox"}]), 1.0), batch_size=1).batch(5)
    n = len(tokenizer.encode("fox")) + 1
    assert batch.targets[0, : n + 1].tolist() == [*tokenizer.encode("fox"), 2, 0]
    assert batch.tokens[0, : n + 1].tolist() == [1, *tokenizer.encode("fox"), 0]
    assert batch.loss_mask[0].tolist() == [True] * n + [False] * (32 - n)


def test_data_tokenizer_and_rules_are_in_the_identity(make: Any, two_files: Any, write_lines: Any) -> None:
    loaders = [
        make(*two_files),
        make(*two_files, seq_len=33),
        make(*two_files[:1]),
        make(two_files[0], (two_files[1][0], 2.0)),
        make(*two_files, record=config.TextRecord(name="text", too_long="drop")),
        make((write_lines("c.jsonl", [{"text": "other"}]), 3.0), two_files[1]),
    ]
    assert len({loader.identity for loader in loaders}) == len(loaders)


@pytest.fixture
def conversations(write_lines: Callable[..., Path]) -> tuple[Path, float]:
    def messages(question: str, answer: str) -> dict:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    records = [messages("fox?", "dog"), messages("fox?", "dog " * 40), messages("fox? " * 40, "dog")]
    return write_lines("chat.jsonl", records), 1.0


def test_too_long_conversations_follow_the_rule(make: Any, conversations: Any) -> None:
    def chat(rule: Any) -> config.ChatRecord:
        return config.ChatRecord(name="chat", too_long=rule)

    dropped = make(conversations, record=chat("drop"))
    assert (dropped.num_examples, dropped.num_dropped, dropped.num_truncated) == (1, 2, 0)
    cut = make(conversations, record=chat("truncate"))
    assert (cut.num_examples, cut.num_dropped) == (2, 1), "a prompt without its answer teaches nothing"
    assert all(cut.batch(step).loss_mask.any(axis=1).all() for step in range(4))
    with pytest.raises(
        ValueError, match=r"chat\.jsonl:3: the record has \d+ tokens, train\.seq_len is 32 \(2 of 3 records"
    ) as caught:
        make(conversations, record=chat("error"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"all 3 examples are too long for train\.seq_len 4"):
        make(conversations, record=chat("drop"), seq_len=4)
    assert make(conversations, record=chat("error"), seq_len=512).num_dropped == 0


def test_long_texts_are_split_and_counted(make: Any, two_files: Any) -> None:
    split = make(*two_files)
    kept = make(*two_files, record=config.TextRecord(name="text", too_long="drop"))
    assert split.num_split == kept.num_dropped > 0
    assert split.num_examples == 60 and kept.num_examples == 60 - kept.num_dropped
    assert kept.num_tokens < split.num_tokens <= split.num_rows * 32


def test_what_cannot_be_loaded(make: Any, two_files: Any) -> None:
    loader = make(*two_files)
    with pytest.raises(IndexError):
        loader.batch(-1)
    data = config.Data(train=(config.FileSource(name="files", files=("x.jsonl",), record=TEXT),))
    with pytest.raises(ValueError, match=r"data\.eval names no source"):
        Loader(data, "eval", None, BatchRows(1, 8), seed=0)  # type: ignore[arg-type]


def test_gsm8k(make: Any, tokenizer: HuggingFace) -> None:
    if not GSM8K.is_file():
        pytest.skip(f"the gsm8k records are not at {GSM8K}")
    record = config.CompletionRecord(name="completion", prompt="question", completion="answer", too_long="drop")
    loader = make((GSM8K, 1.0), sources="eval", record=record, seq_len=1024, batch_size=8)
    assert loader.num_examples + loader.num_dropped == 7473
    assert loader.num_tokens / (loader.num_rows * 1024) > 0.97
    rows = [json.loads(line) for line in GSM8K.open()]
    answers = Counter(row["answer"] for row in rows)
    for batch in itertools.islice(loader.iterate(), 3):
        for row in range(8):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                here = batch.segment_ids[row] == segment
                learned = tokenizer.decode(batch.targets[row][here & batch.loss_mask[row]], keep_special=True)
                assert learned.endswith("</s>") and answers[learned.removesuffix("</s>")]
