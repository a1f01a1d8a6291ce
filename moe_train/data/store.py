"""Records tokenised once: ids on disk, keyed by what they were made from, memory-mapped ever after."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.data import chat
from moe_train.data.fields import field, located, text_field
from moe_train.data.sources import Origin, Records
from moe_train.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_LAYOUT = 1
_CHUNK = 256  # records tokenised at once
Encoded = tuple[list[int], list[bool] | None]  # ids and their loss mask; None: every id bears loss


@dataclass(frozen=True)
class TokenStore:
    """The ids of N records end to end, P in all: record i is `tokens[offsets[i]:offsets[i + 1]]`.

    tokens (P,) uint16 or uint32; loss_mask (P,) bool, or None where every id bears loss; offsets (N + 1,) int64;
    origins (N, 2) int64 as in `sources.Origin`; num_empty: records without text, left out; digest: hash of it all.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None
    offsets: np.ndarray
    origins: np.ndarray
    num_empty: int
    digest: str

    @property
    def lengths(self) -> np.ndarray:
        """(N,) positions that a record takes in a sequence: one less than its ids, as the last is only a target."""
        return np.diff(self.offsets) - 1


def open_store(
    records: Records,
    record: config.Record,
    tokenizer: Tokenizer,
    template: str | None,
    cache_dir: str | Path,
    num_proc: int = 1,
) -> TokenStore:
    """The tokens of `records`, from `cache_dir` where they are there, else made there first.

    Several processes may ask at the same time: one makes them, the others wait. Raises ValueError with file and line
    for a record that cannot be used, and where no record has any text.
    """
    kind = record.model_dump(exclude={"too_long"})  # too_long is a matter of packing
    libraries = [importlib.metadata.version(name) for name in ("tokenizers", "mistral-common", "jinja2")]
    made_from = [_LAYOUT, records.identity, tokenizer.identity, kind, None if record.name == "text" else template, libraries]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    directory = Path(cache_dir) / f"tokens-{key}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                for abandoned in directory.parent.glob(f".{directory.name}.unfinished-*"):  # by a process that was killed
                    shutil.rmtree(abandoned)
                with new_directory(directory) as unfinished:
                    _write(unfinished, records, record, tokenizer, template, num_proc)
    return _read(directory)


def _read(directory: Path) -> TokenStore:
    facts = json.loads((directory / "facts.json").read_text())
    for name, size in facts["sizes"].items():
        if (directory / name).stat().st_size != size:
            raise ValueError(f"{directory / name} is damaged (not {size} bytes); remove {directory}, and it is made again")

    def mapped(name: str, dtype: str) -> np.ndarray:
        return np.memmap(directory / name, dtype=dtype, mode="r").view(np.ndarray)

    return TokenStore(
        tokens=mapped("tokens", facts["dtype"]),
        loss_mask=mapped("loss_mask", "bool") if "loss_mask" in facts["sizes"] else None,
        offsets=mapped("offsets", "int64"),
        origins=mapped("origins", "int64").reshape(-1, 2),
        num_empty=facts["num_empty"],
        digest=facts["digest"],
    )


def _write(
    directory: Path, records: Records, record: config.Record, tokenizer: Tokenizer, template: str | None, num_proc: int
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    num_records = num_tokens = num_empty = 0
    start = shown = time.monotonic()
    log.info("tokenising %s", ", ".join(records.places[:3]) + (", …" if len(records.places) > 3 else ""))
    with contextlib.ExitStack() as stack:
        names = ("tokens", "loss_mask", "offsets", "origins")
        tokens, loss_mask, offsets, origins = (stack.enter_context((directory / name).open("wb")) for name in names)
        offsets.write(np.int64(0).tobytes())
        for chunk, encoded in _encoded_chunks(records, record, tokenizer, template, num_proc):
            for origin, item in zip(chunk, encoded, strict=True):
                if item is None:
                    num_empty += 1
                    continue
                ids, mask = item
                num_records += 1
                num_tokens += len(ids)
                tokens.write(np.asarray(ids, dtype).tobytes())
                loss_mask.write(b"" if mask is None else np.asarray(mask, bool).tobytes())
                offsets.write(np.int64(num_tokens).tobytes())
                origins.write(np.asarray(origin, np.int64).tobytes())
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                log.info("tokenised %d records, %.1fM tokens, %.0f s", num_records, num_tokens / 1e6, shown - start)
    if not num_records:
        raise ValueError(f"{', '.join(records.places)}: no record with any text")
    if record.name == "text":
        (directory / "loss_mask").unlink()
    files = sorted(directory.iterdir())
    digest = hashlib.sha256(dtype.encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    facts = {
        "dtype": dtype,
        "num_empty": num_empty,
        "sizes": {file.name: file.stat().st_size for file in files},
        "digest": digest.hexdigest(),
    }
    (directory / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")


# --- tokenising ------------------------------------------------------------------------------------------------


def _encoded_chunks(
    records: Records, record: config.Record, tokenizer: Tokenizer, template: str | None, num_proc: int
) -> Iterator[tuple[list[Origin], list[Encoded | None]]]:
    numbered = iter(records)
    chunks = iter(lambda: list(itertools.islice(numbered, _CHUNK)), [])
    encode = _Encoder(record, tokenizer, template)

    def work(chunk: list[tuple[Origin, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
        return [(records.where(origin), fields) for origin, fields in chunk]

    if num_proc == 1:
        for chunk in chunks:
            yield [origin for origin, _ in chunk], encode(work(chunk))
        return
    # spawn: this process may have started threads that a fork would not survive
    with ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _set_encoder, (encode,)) as pool:
        for chunk, future in _ahead(((c, pool.submit(_encode, work(c))) for c in chunks), 2 * num_proc):
            yield [origin for origin, _ in chunk], future.result()


def _ahead(started: Iterable[tuple[Any, Future]], limit: int) -> Iterator[tuple[Any, Future]]:
    """In order, with at most `limit` started ones waiting."""
    waiting: collections.deque[tuple[Any, Future]] = collections.deque()
    for item in started:
        waiting.append(item)
        if len(waiting) == limit:
            yield waiting.popleft()
    yield from waiting


class _Encoder:
    """One chunk of (where, record) to ids and masks; what a worker process holds."""

    def __init__(self, record: config.Record, tokenizer: Tokenizer, template: str | None) -> None:
        self.record, self.tokenizer, self.template = record, tokenizer, template

    def __call__(self, chunk: list[tuple[str, dict[str, Any]]]) -> list[Encoded | None]:
        match self.record:
            case config.TextRecord(column=column):
                texts = [located(where, text_field, fields, column) for where, fields in chunk]
                begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
                end = [self.tokenizer.eos_id]
                encoded = self.tokenizer.encode_batch(texts)
                return [([*begin, *ids, *end], None) if ids else None for ids in encoded]
            case config.ChatRecord() | config.CompletionRecord():
                return [located(where, self._chat, fields, self.record) for where, fields in chunk]

    def _chat(self, fields: dict[str, Any], record: config.ChatRecord | config.CompletionRecord) -> Encoded:
        rendered = chat.render(_messages(fields, record), self.template, self.tokenizer)
        return rendered.tokens, rendered.loss_mask


_encoder: _Encoder | None = None


def _set_encoder(encoder: _Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = encoder


def _encode(chunk: list[tuple[str, dict[str, Any]]]) -> list[Encoded | None]:
    assert _encoder is not None
    return _encoder(chunk)


def _messages(fields: dict[str, Any], record: config.ChatRecord | config.CompletionRecord) -> Any:
    match record:
        case config.CompletionRecord(prompt=prompt, completion=completion):
            return [
                {"role": "user", "content": text_field(fields, prompt)},
                {"role": "assistant", "content": text_field(fields, completion)},
            ]
        case config.ChatRecord(column=column):
            if fields.get("tools") or fields.get("available_tools"):
                raise ValueError("the record has tools, which are not trained on yet: tool turns have no loss mask; drop it")
            return field(fields, column)
