"""A prepared set with a teacher's predictions: the files of a set of tokens, and beside them what a teacher says.

SHARD/teacher_offsets    int64, one more than examples: example i has the predictions from teacher_offsets[i] on
      teacher_ids        the most likely tokens of each prediction, in the dtype of `tokens`
      teacher_logprobs   float16: their log-probabilities
      teacher_tail       float32: log of the probability of all other tokens

There is a prediction for each trained token of the first `seq_len` positions of an example; of a text that is split, for all
positions. Sets grow example by example, so that a process that is stopped loses at most the examples of one batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train.data.batches.packing import TooLong
from moe_train.data.prepared.manifest import ShardEntry, TeacherEntry
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.teacher_values import TeacherValues
from moe_train.data.prepared.tokenize_ahead import only_one

TEACHER_FILES = ("teacher_ids", "teacher_logprobs", "teacher_offsets", "teacher_tail")
_FLOOR = -87.0
"""Smallest log of the tail's mass, about that of the smallest float32."""
_EXAMPLES_AT_ONCE = 4096  # examples whose predictions are read together to describe a finished shard

Predictions = Callable[[range], Iterator[TeacherValues]]
"""A function (examples of the set) -> the predictions of each of them, one after the other."""


class TeacherSummary(NamedTuple):
    """How well stored predictions represent the teacher."""

    kept_mass: float
    """Mean probability of the tokens that are stored one by one."""
    agreement: float
    """Share of the trained tokens that are the teacher's most likely token."""
    predictions: int
    """Number of trained tokens that have a prediction."""


def stored_pieces(example: int, length: int, seq_len: int, too_long: TooLong) -> list[ExampleSlice]:
    """Return the parts of an example that a teacher reads, each as a text of its own, as in training.

    Args:
        example: index of the example.
        length: its positions.
        seq_len: positions in a row.
        too_long: what training does with an example that is longer than a row.
    """
    if length <= seq_len or too_long != "split":
        return [ExampleSlice(example, 0, min(length, seq_len))]
    return [ExampleSlice(example, start, min(seq_len, length - start)) for start in range(0, length, seq_len)]


def write_teacher_set(store: TokenStore, cache_dir: str | Path, entry: TeacherEntry, predictions: Predictions) -> Path:
    """Write a set with predictions next to the set of tokens, unless it exists, and return its folder.

    Args:
        store: the set of tokens, in a local folder.
        cache_dir: the folder for prepared sets.
        entry: what the manifest states of the teacher; its summary is filled in here.
        predictions: computes the predictions of the examples from which on nothing is stored yet.

    Raises:
        ValueError: from `predictions`.
    """
    key = json.dumps(
        [store.manifest.hash, entry.model_dump(mode="json", exclude={"model", "kept_mass", "agreement"})], sort_keys=True
    )
    directory = Path(cache_dir) / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if directory.exists():
        return directory
    with only_one(directory.with_suffix(".lock")):
        # Another process may have made the set while this one waited for the lock.
        if directory.exists():
            return directory
        unfinished = directory.with_suffix(".unfinished")
        unfinished.mkdir(exist_ok=True)
        first = 0
        entries: list[ShardEntry] = []
        for shard in store.manifest.shards:
            folder = unfinished / shard.name
            _fill(folder, range(first, first + shard.examples), store.manifest.dtype, entry.top_k, predictions)
            entries.append(_with_tokens(folder, Path(store.path) / shard.name, shard, store.manifest.dtype))
            first += shard.examples
        summary = summarize(unfinished, store, entry.top_k)
        stated = entry.model_copy(update={"kept_mass": summary.kept_mass, "agreement": summary.agreement})
        manifest = store.manifest.model_copy(update={"shards": tuple(entries), "teacher": stated}).sealed()
        manifest.write(unfinished)
        os.rename(unfinished, directory)
    return directory


class _Files(NamedTuple):
    """The growing files of a shard, in the order in which they are written."""

    ids: Path
    logprobs: Path
    tail: Path
    offsets: Path

    @classmethod
    def of(cls, folder: Path) -> _Files:
        """Return the files of a shard's folder."""
        names = ("teacher_ids", "teacher_logprobs", "teacher_tail", "teacher_offsets")
        return cls(*(folder / name for name in names))


def _fill(folder: Path, examples: range, dtype: str, top_k: int, predictions: Predictions) -> None:
    """Append the predictions of those examples of a shard that it does not have yet."""
    folder.mkdir(exist_ok=True)
    files = _Files.of(folder)
    total, num_stored = _consistent(files, np.dtype(dtype).itemsize, top_k)
    missing = examples[num_stored:]
    if not missing:
        return
    with contextlib.ExitStack() as stack:
        ids, logprobs, tail, offsets = (stack.enter_context(file.open("ab")) for file in files)
        for values in predictions(missing):
            assert values.ids.shape[1] == top_k
            total += len(values.tail)
            ids.write(values.ids.astype(dtype).tobytes())
            logprobs.write(values.logprobs.astype(np.float16).tobytes())
            tail.write(np.maximum(values.tail, _FLOOR).astype(np.float32).tobytes())
            # Written last: what `teacher_offsets` does not name is cut off when the work continues.
            for file in (ids, logprobs, tail):
                file.flush()
            offsets.write(np.int64(total).tobytes())
            offsets.flush()


def _consistent(files: _Files, id_bytes: int, top_k: int) -> tuple[int, int]:
    """Cut the files of a shard to the examples that are complete; returns (number of predictions, number of examples)."""
    if not files.offsets.exists() or files.offsets.stat().st_size < 8:
        files.offsets.write_bytes(np.int64(0).tobytes())
    offsets = np.fromfile(files.offsets, np.int64, files.offsets.stat().st_size // 8)
    total = int(offsets[-1])
    sizes = (total * top_k * id_bytes, total * top_k * 2, total * 4, len(offsets) * 8)
    for file, size in zip(files, sizes, strict=True):
        with file.open("ab") as stream:
            stream.truncate(size)
    return total, len(offsets) - 1


def _with_tokens(folder: Path, source: Path, shard: ShardEntry, dtype: str) -> ShardEntry:
    """Put the files of the tokens beside the predictions, and return the entry of the shard."""
    for name in shard.sizes:
        if not (folder / name).exists():
            try:
                os.link(source / name, folder / name)
            except OSError:  # the file system has no hard links
                shutil.copy2(source / name, folder / name)
    names = sorted((*shard.sizes, *TEACHER_FILES))
    # As `tokenize_shard` computes it.
    digest = hashlib.sha256(dtype.encode())
    for name in names:
        with (folder / name).open("rb") as stream:
            digest.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
    sizes = {name: (folder / name).stat().st_size for name in names}
    return shard.model_copy(update={"sizes": sizes, "sha256": digest.hexdigest()})


def summarize(directory: Path, store: TokenStore, top_k: int) -> TeacherSummary:
    """Measure the kept mass and the agreement of a finished set, before its manifest is written."""
    mass = 0.0
    agreeing = 0
    predictions = 0
    first = 0
    for shard in store.manifest.shards:
        folder = directory / shard.name
        offsets = np.fromfile(folder / "teacher_offsets", np.int64)
        ids = np.memmap(folder / "teacher_ids", store.manifest.dtype, "r").reshape(-1, top_k) if offsets[-1] else None
        logprobs = np.memmap(folder / "teacher_logprobs", np.float16, "r").reshape(-1, top_k) if offsets[-1] else None
        for start in range(0, shard.examples, _EXAMPLES_AT_ONCE):
            stop = min(start + _EXAMPLES_AT_ONCE, shard.examples)
            part = slice(int(offsets[start]), int(offsets[stop]))
            if ids is None or logprobs is None or part.start == part.stop:
                continue
            targets = _targets(store, range(first + start, first + stop), np.diff(offsets[start : stop + 1]))
            agreeing += int(np.sum(ids[part, 0] == targets))
            mass += float(np.sum(np.exp(logprobs[part].astype(np.float64))))
            predictions += len(targets)
        first += shard.examples
    count = max(predictions, 1)
    return TeacherSummary(mass / count, agreeing / count, predictions)


def _targets(store: TokenStore, examples: range, counts: np.ndarray) -> np.ndarray:
    """Return the first trained tokens of each example, as many as it has predictions."""
    lengths = store.lengths()
    slices = [ExampleSlice(example, 0, int(lengths[example])) for example in examples]
    targets = []
    for piece, count in zip(store.read(slices), counts.tolist(), strict=True):
        trained = piece.tokens[1:] if piece.loss_mask is None else piece.tokens[1:][piece.loss_mask[1:]]
        targets.append(trained[:count])
    return np.concatenate(targets)
