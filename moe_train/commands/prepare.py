"""`moe-train data prepare`: what a run learns from, tokenised and packed ahead; `data trace`: where a row of it is from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

from moe_train import config
from moe_train.data.batches.loader import Loader, open_store
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.prepared.tokenize_ahead import Progress as Shards
from moe_train.data.prepared.upload import upload
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.tokenizer import Tokenizer, check_vocab
from moe_train.machine import progress
from moe_train.run.resolve import resolve


def prepare(written: config.Config, to: str | None = None) -> dict[str, Any]:
    """Tokenize every source of a run that is not there yet, and plan the rows of its first epoch.

    to: a folder or bucket that gets a copy of each set. Returns the sets with their figures, and what training will see.
    Raises ValueError with file and line for a record that cannot be used.
    """
    run = _resolve(written)
    data = run.training_data()
    tokenizer = _open_tokenizer(run)
    template = conversation_to_tokens.load_template(data.chat_template, tokenizer)
    sets: list[dict[str, Any]] = []
    kinds: tuple[tuple[Literal["train", "eval"], tuple[config.Source, ...]], ...] = (("train", data.train), ("eval", data.eval))
    for kind, sources in kinds:
        for i, source in enumerate(sources):
            begun = time.perf_counter()
            store = open_store(source, data, tokenizer, template, _reporter(f"data.{kind}.{i}"))
            made = store.manifest
            sets.append(
                {
                    "source": f"data.{kind}.{i}",
                    **{"records": made.records, "examples": made.examples, "empty": made.empty},
                    **{"tokens": made.tokens, "loss_tokens": made.loss_tokens, "shards": len(made.shards)},
                    "seconds": round(time.perf_counter() - begun, 2),
                    "path": store.path if to is None else upload(store.path, to),
                }
            )
    loader = Loader(data, "train", tokenizer, batch_size=run.train.batch_size, seq_len=run.train.seq_len, seed=run.seed)
    steps = loader.total_steps(run.train)
    return {
        "sets": sets,
        "rows_of_an_epoch": loader.num_rows,
        "rows_full": loader.num_tokens / (loader.num_rows * run.train.seq_len),
        "records_dropped": loader.num_dropped,
        "records_truncated": loader.num_truncated,
        "records_split": loader.num_split,
        "steps": steps,
        "epochs": loader.epochs(steps),
        "manifest": loader.manifest_hash,
    }


def trace(written: config.Config, step: int, row: int | None = None) -> list[dict[str, Any]]:
    """The file and line of every segment that training step `step` (from 1) learns from; of one row, or of all."""
    run = _resolve(written)
    data = run.training_data()
    tokenizer = _open_tokenizer(run)
    loader = Loader(data, "train", tokenizer, batch_size=run.train.batch_size, seq_len=run.train.seq_len, seed=run.seed)
    if step < 1:
        raise ValueError(f"step {step}: steps count from 1")
    if row is not None and not 0 <= row < run.train.batch_size:
        raise ValueError(f"row {row}: a step has {run.train.batch_size} rows, from 0")
    rows = range(run.train.batch_size) if row is None else [row]
    return [{"row": r, "segment": i, **s._asdict()} for r in rows for i, s in enumerate(loader.trace(step - 1, r), start=1)]


def _resolve(written: config.Config) -> config.Run:
    """The run on as many devices as its mesh states: preparing data needs none, and an axis of -1 may be 1."""
    return resolve(written, math.prod(abs(size) for size in written.mesh.model_dump().values()))


def _open_tokenizer(run: config.Run) -> Tokenizer:
    """The tokenizer of a run. Raises ValueError where it is not stated, or has more tokens than the model."""
    tokenizer = load_tokenizer(run.training_data().tokenizer)
    check_vocab(tokenizer, run.model.vocab_size)
    return tokenizer


def _reporter(source: str) -> Callable[[Shards], None]:
    """Passes on how many shards of a source are done, and how fast their tokens come."""
    begun = time.monotonic()

    def report(now: Shards) -> None:
        rate = now.tokens / max(time.monotonic() - begun, 1e-9)
        detail = f"{now.records:,} records  {now.tokens:,} tokens  {rate:,.0f} tokens/s"
        progress.report(progress.Progress(source, now.done, now.shards, "shards", detail))

    return report
