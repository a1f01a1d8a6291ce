"""The inputs of a run: the tokenizer, loaded once, and the loaders of training and held-out data."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax

from moe_train import config
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.media_batch import check_sizes
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.padding import padding_id
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.run.preflight import check_files, check_ready
from moe_train.train.objectives.objective import Objective


class RunInputs(NamedTuple):
    """The opened data of a run."""

    tokenizer: Tokenizer
    train: Loader
    held_out: Loader | None
    """None if `data.eval` names no source."""
    total_steps: int
    """Optimizer steps of the whole run."""


def open_inputs(run: config.Run, objective: Objective) -> RunInputs:
    """Load the tokenizer, check that it belongs to the model, and open this process's share of the data.

    Args:
        run: the resolved run.
        objective: decides the batch type that both loaders produce.

    Raises:
        ValueError: the data or the tokenizer cannot be used.
        FileNotFoundError: a file of the data or of the tokenizer does not exist.
    """
    data = run.training_data()
    tokenizer = load_tokenizer(data.tokenizer)
    # Checked before any data is tokenized, which may take long.
    check_files(data)
    check_ready(run, data, tokenizer)
    if run.encoder is not None:
        check_sizes(run.encoder, tokenizer.media, tokenizer.files[0])

    def open_loader(sources: Literal["train", "eval"], batch_size: int) -> Loader:
        # Each process opens only its rows, but all plan the same global order.
        rows = BatchRows(batch_size, run.train.seq_len, jax.process_index(), jax.process_count())
        loader = Loader(data, sources, tokenizer, rows, seed=run.seed, batch_type=objective.batch_type)
        _check_prepared(run.objective, loader)
        return loader

    train = open_loader("train", run.train.batch_size)
    if run.encoder is not None and all(source.store.manifest.media is None for source in train.sources):
        section = "audio" if isinstance(run.audio, config.RunAudio) else "vision"
        raise ValueError(f"{section} has no effect, since no record of data.train has {run.encoder.media}; leave it out")
    # One microbatch is the most that training computes at once, so held-out batches have its size.
    microbatch = run.train.batch_size // run.train.microbatches
    held_out = open_loader("eval", microbatch) if data.eval else None
    if run.model.scores is not None:
        # transformers reads a score at the last token that is not this one.
        padding = padding_id(tokenizer)
        for loader in (train, held_out):
            if loader is not None:
                loader.refuse_token(padding, "an export needs for padding; remove it from the record, or prepare it as text")
    return RunInputs(tokenizer, train, held_out, train.total_steps(run.train))


def _check_prepared(objective: config.Objective, loader: Loader) -> None:
    """Raise ValueError if a prepared set holds records of a kind that the objective does not read."""
    for source in loader.sources:
        kind = str(source.store.manifest.rules.record["name"])
        if kind not in objective.records:
            raise ValueError(
                f"objective {objective.name} reads records of kind {', '.join(objective.records)}, but {source.name} was prepared "
                f"from records of kind {kind}; prepare other records, or choose another objective"
            )
