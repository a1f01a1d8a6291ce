"""Tokenize and pack training data in advance (`data prepare`), and find the records behind a row (`data trace`)."""

from __future__ import annotations

import math
import sys
import time
from typing import Literal

import jax

from moe_train import config
from moe_train.checkpoint.model_dir import find_tokenizer_config
from moe_train.commands.prepare_teacher import TeacherOptions, TeacherWriter, check_files
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.sources import open_store, too_long_of
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.prepared.shard_pool import PrepareProgress, ProgressReport
from moe_train.data.prepared.store import TokenStore
from moe_train.data.prepared.upload import upload
from moe_train.data.records import unread
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.tokenizer import Tokenizer, check_vocab
from moe_train.machine import progress
from moe_train.machine.files import JsonObject
from moe_train.machine.mesh import join_processes
from moe_train.run.reference import store_reference
from moe_train.run.resolve import resolve
from moe_train.run.shared_prompt import with_layout
from moe_train.run.tower_features import store_features
from moe_train.train.objectives.choose import objective_of_run


def prepare(
    written: config.Config,
    to: str | None = None,
    teacher: TeacherOptions | None = None,
    with_reference: bool = False,
    with_features: bool = False,
) -> JsonObject:
    """Tokenize every source of a run that is not tokenized yet, and plan the rows of its first epoch.

    Args:
        written: the config as the user wrote it.
        to: a folder or bucket that receives a copy of each set.
        teacher: where the predictions of a teacher come from, which are stored with the sets; None without a teacher.
        with_reference: whether to store the log-probabilities of `init_from` with the sets, for full training on preferences.
        with_features: whether to store the features that the tower of `init_from` computes of pictures or sound.

    Returns:
        The sets with their counts, and what training will see.

    Raises:
        ValueError: a record cannot be used; the message names file and line.
    """
    if with_reference or (teacher is not None and teacher.model is not None):
        # A model computes on the devices of all processes of a job.
        join_processes()
    run = _resolve(written)
    data = run.training_data()
    tokenizer = _open_tokenizer(run)
    writer: TeacherWriter | None = None
    if teacher is not None:
        check_files(teacher, len(data.train) + len(data.eval))
        writer = TeacherWriter(run, tokenizer, teacher)
    template = conversation_to_tokens.load_template(data.chat_template, tokenizer)
    sets: list[JsonObject] = []
    with_teacher: dict[str, list[config.Source]] = {"train": [], "eval": []}
    kinds: tuple[tuple[Literal["train", "eval"], tuple[config.Source, ...]], ...] = (("train", data.train), ("eval", data.eval))
    for kind, sources in kinds:
        for i, source in enumerate(sources):
            start_time = time.perf_counter()
            store = open_store(source, data, tokenizer, template, _reporter(f"data.{kind}.{i}"))
            if writer is not None:
                store = writer.write(store, source, i if kind == "train" else len(data.train) + i)
                with_teacher[kind].append(_as_prepared(source, store))
            manifest = store.manifest
            sets.append(
                {
                    "source": f"data.{kind}.{i}",
                    **{"records": manifest.records, "examples": manifest.examples, "empty": manifest.empty},
                    **{"tokens": manifest.tokens, "loss_tokens": manifest.loss_tokens, "shards": len(manifest.shards)},
                    "seconds": round(time.perf_counter() - start_time, 2),
                    "not_read": unread.in_words(manifest.unread),
                    **_teacher_counts(store),
                    "path": store.path,
                }
            )
    # After the loop, so that it finds every set in the cache.
    if with_reference:
        # On the devices that are present, unlike the rest.
        store_reference(resolve(written), tokenizer, lambda line: print(line, file=sys.stderr))
    if with_features:
        store_features(resolve(written), tokenizer, lambda line: print(line, file=sys.stderr))
    if to is not None and jax.process_index() == 0:
        # Last, so that a copy has the log-probabilities too.
        for prepared in sets:
            prepared["path"] = upload(str(prepared["path"]), to)
    if writer is not None:
        # Counted over the new sets: the sources of the config have no predictions, which the batches of distillation need.
        data = data.model_copy(update={kind: tuple(on_sets) for kind, on_sets in with_teacher.items()})
        run = run.model_copy(update={"data": data})
    return {"sets": sets, **_first_epoch(run, tokenizer)}


def _first_epoch(run: config.Run, tokenizer: Tokenizer) -> JsonObject:
    """Plan the rows of the first epoch of training, and return their counts."""
    loader = _train_loader(run, tokenizer)
    steps = loader.total_steps(run.train)
    return {
        "rows_of_an_epoch": loader.num_rows,
        "rows_full": loader.num_tokens / (loader.num_rows * run.train.seq_len),
        "records_dropped": loader.num_dropped,
        "records_truncated": loader.num_truncated,
        "records_split": loader.num_split,
        "steps": steps,
        "epochs": loader.epochs(steps),
        "manifest": loader.manifest_hash,
    }


def _as_prepared(source: config.Source, store: TokenStore) -> config.PreparedSource:
    """Return the section with which training reads the prepared set of a source in its place."""
    return config.PreparedSource(name="prepared", path=store.path, too_long=too_long_of(source, store), weight=source.weight)


def _teacher_counts(store: TokenStore) -> JsonObject:
    """Return how well stored predictions represent the teacher; nothing without a teacher."""
    teacher = store.manifest.teacher
    if teacher is None:
        return {}
    return {"top_k": teacher.top_k, "kept_mass": round(teacher.kept_mass, 6), "agreement": round(teacher.agreement, 6)}


def trace(written: config.Config, step: int, row: int | None = None) -> list[JsonObject]:
    """Return the file and line of every segment that a training step learns from.

    Args:
        written: the config as the user wrote it.
        step: the training step, counted from 1.
        row: a row of the step, counted from 0; None for all rows.
    """
    run = _resolve(written)
    loader = _train_loader(run, _open_tokenizer(run))
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    if row is not None and not 0 <= row < run.train.batch_size:
        raise ValueError(f"row {row}: a step has {run.train.batch_size} rows, counted from 0")
    rows = range(run.train.batch_size) if row is None else [row]
    traced = []
    for r in rows:
        # The loader counts steps from 0.
        for number, segment in enumerate(loader.trace(step - 1, r), start=1):
            traced.append({"row": r, "segment": number, **segment._asdict()})
    return traced


def find_model_tokenizer(init_from: str) -> config.Tokenizer:
    """Return the section of the tokenizer that belongs to a model or a run. Raises FileNotFoundError if there is none."""
    return find_tokenizer_config(init_from)


def _resolve(written: config.Config) -> config.Run:
    """Resolve the config for as many devices as its mesh states.

    Preparing data needs no devices, so an axis of -1 may be taken as 1.
    """
    return resolve(written, math.prod(abs(size) for size in written.mesh.model_dump().values()))


def _train_loader(run: config.Run, tokenizer: Tokenizer) -> Loader:
    """Return the loader of a run's training data, with the batches of its objective."""
    run = with_layout(run)
    rows = BatchRows(run.train.batch_size, run.train.seq_len)
    batch_type = objective_of_run(run).batch_type
    return Loader(run.training_data(), "train", tokenizer, rows, seed=run.seed, batch_type=batch_type)


def _open_tokenizer(run: config.Run) -> Tokenizer:
    """Load the tokenizer of a run. Raises ValueError if it is not stated, or has more tokens than the model."""
    tokenizer = load_tokenizer(run.training_data().tokenizer)
    check_vocab(tokenizer, run.model.vocab_size)
    return tokenizer


def _reporter(source: str) -> ProgressReport:
    """Return a callback that reports how many shards of a source are done, and how many tokens per second."""
    start_time = time.monotonic()

    def report(state: PrepareProgress) -> None:
        rate = state.tokens / max(time.monotonic() - start_time, 1e-9)
        detail = f"{state.records:,} records  {state.tokens:,} tokens  {rate:,.0f} tokens/s"
        progress.report(progress.Progress(source, state.done, state.shards, "shards", detail))

    return report
