"""Batches in a global order: the batch of a step depends only on the data, the seed and the step.

In every epoch the examples of a source are shuffled and packed into rows, and the rows are shuffled (`order`). Grain mixes
the rows of the sources by weight, groups them into batches and reads ahead. A process fills only its slice of a global batch,
so the number of processes does not change the data, and the step is the only position to save.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from moe_train import config
from moe_train.data.batches.answer_batches import UnpairedBatch
from moe_train.data.batches.batch import Batch, BatchRows, PackedBatch
from moe_train.data.batches.check_set import check_set, check_varied_labels
from moe_train.data.batches.concatenation import Concatenation
from moe_train.data.batches.feature_batch import FeatureBatch
from moe_train.data.batches.media_batch import MediaBatch
from moe_train.data.batches.mismatched import check_labels
from moe_train.data.batches.order import Shuffle
from moe_train.data.batches.packing import Plan
from moe_train.data.batches.sources import RowSource, open_rows, open_store, source_name, too_long_of
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.prepared import manifest
from moe_train.data.prepared.features import StoredFeatures
from moe_train.data.prepared.reference import StoredReference
from moe_train.data.prepared.store import ExampleSlice
from moe_train.data.records.source import Origin
from moe_train.data.records.unread import add_counts
from moe_train.data.tokenizers.tokenizer import Tokenizer

_ROWS = 1 << 40  # more rows than a source has in any run: row r of source i has the number i * _ROWS + r


class Segment(NamedTuple):
    """The origin of a segment of a row: positions start to start + length of a record."""

    source: int
    """Index of the source."""
    file: str
    """The file, or the name of another kind of source."""
    number: int
    """Line or row in the file, counted from 1."""
    example: int
    """Index of the example in the prepared set."""
    start: int
    length: int


class Loader:
    """The train or eval sources of a config, as batches of packed rows.

    Training is endless. Without weights an epoch has each row of each source once; with weights, which are shares of the rows, and
    so of the tokens, small sources repeat more often. Evaluation has each example once, in order, and fills the last batch with
    empty rows.

    Args:
        data: The `data` section.
        sources: Which of its sources to read.
        tokenizer: The tokenizer.
        rows: The rows of a batch, and this process's share of them.
        seed: The seed of the order.
        batch_type: The batch type of the objective.

    Attributes:
        batch_type: The batch type.
        num_records: Number of records in the files. All counts are those of one epoch, the first.
        num_examples: Number of examples that are used; a record with tools may have several.
        num_rows: Number of rows.
        num_tokens: Number of positions that are not padding.
        num_dropped: Number of examples that were too long, or truncated to nothing that is trained on.
        num_truncated: Number of examples that were truncated, or shortened to the turns that fit (conversations with tools).
        num_split: Number of examples that were split.
        num_empty: Number of records without text, which are left out.
        unread: Number of records in which a key was not read, by its name.
        identity: A hash of everything that decides the batches, except the batch size.
        manifest: JSON that describes the data, with every file.
        manifest_hash: The hash over all manifests.
        batches: Number of batches in evaluation; None in training.
    """

    def __init__(
        self,
        data: config.Data,
        sources: Literal["train", "eval"],
        tokenizer: Tokenizer,
        rows: BatchRows,
        *,
        seed: int,
        batch_type: type[PackedBatch] = Batch,
    ) -> None:
        chosen = data.train if sources == "train" else data.eval
        if not chosen:
            raise ValueError(f"data.{sources} names no source")
        template = conversation_to_tokens.load_template(data.chat_template, tokenizer)
        self._batch_rows = rows
        self._prefetch = data.prefetch
        self.batch_type = batch_type
        self._sources: list[RowSource] = []
        for i, source in enumerate(chosen):
            store = open_store(source, data, tokenizer, template)
            shuffle: Shuffle | None = None
            if sources == "train":
                store.warn_of_cache(data.shuffle_tokens)
                shuffle = Shuffle((seed, i), data.shuffle_tokens)
            check_set(batch_type, source_name(source), store, rows.seq_len, too_long_of(source, store))
            self._sources.append(open_rows(source, store, rows.seq_len, shuffle, data.cache_dir, batch_type))
        if batch_type is UnpairedBatch:
            check_labels([opened.store for opened in self._sources])
        if sources == "train":
            check_varied_labels(batch_type, [opened.store for opened in self._sources])
        plans = [opened.order.plan() for opened in self._sources]
        for opened, plan in zip(self._sources, plans, strict=True):
            if not plan.num_rows:
                raise ValueError(f"{opened.name}: all {len(opened.store)} examples are too long for train.seq_len {rows.seq_len}")
        self._count(plans)
        manifests = [opened.store.manifest for opened in self._sources]
        self.manifest_hash = manifest.hash_of_all(manifests)
        self.manifest = manifest.text_of_all(manifests)

        # A single source is seen in full in any case, so a weight changes nothing.
        weights = [1.0] if len(chosen) == 1 else [source.weight for source in chosen]
        self.identity = _identity(sources, weights, manifests, plans)
        self.batches: int | None = None
        self._shares: list[int] = []
        if sources == "eval":
            self.batches = -(-self.num_rows // rows.batch_size)
        else:
            self._shares = _integer_shares(weights)
        self._concatenation = Concatenation([opened.order for opened in self._sources])
        # The numbers of the rows alone are mixed and batched, so that `trace` can name their origin without reading any tokens.
        self._row_numbers = self._global_order(plans).batch(rows.batch_size, drop_remainder=False)
        self._batches = self._row_numbers.map(self._fill)

    def _count(self, plans: Sequence[Plan]) -> None:
        """Set the attributes that count the records, examples, rows and tokens of the first epoch, given its plans."""
        stores = [source.store for source in self._sources]
        num_shortened = sum(source.num_shortened for source in self._sources)
        self.num_records = sum(store.manifest.records for store in stores)
        self.num_examples = sum(len(store) - plan.num_dropped for store, plan in zip(stores, plans, strict=True))
        self.num_rows = sum(plan.num_rows for plan in plans)
        self.num_tokens = sum(plan.num_tokens for plan in plans)
        self.num_dropped = sum(plan.num_dropped for plan in plans)
        self.num_truncated = sum(plan.num_truncated for plan in plans) + num_shortened
        self.num_split = sum(plan.num_split for plan in plans)
        self.num_empty = sum(store.manifest.empty for store in stores)
        self.unread: Counter[str] = Counter()
        for store in stores:
            add_counts(self.unread, store.manifest.unread)

    def _global_order(self, plans: Sequence[Plan]) -> grain.MapDataset[int]:
        """Return the numbers of the rows (see `_ROWS`) in the order in which batches take them."""
        if self.batches is not None:  # evaluation: each row once
            first_epochs = [grain.MapDataset.range(i * _ROWS, i * _ROWS + plan.num_rows) for i, plan in enumerate(plans)]
            return grain.MapDataset.concatenate(first_epochs)
        # The numbers of the rows of source 0 are the rows themselves.
        if len(plans) == 1:
            return grain.MapDataset.range(_ROWS)
        if not self._shares:
            return grain.MapDataset.range(_ROWS).map(self._locate)
        streams = [grain.MapDataset.range(i * _ROWS, (i + 1) * _ROWS) for i in range(len(plans))]
        # Deterministic: which source row r comes from depends only on the shares and r.
        return grain.MapDataset.mix(streams, self._shares)

    def refuse_token(self, token: int, purpose: str) -> None:
        """Raise ValueError, with the record, if a token occurs in the data, all of which are read.

        Args:
            token: the token.
            purpose: what the token is needed for, for the message.
        """
        for source in self._sources:
            example = source.store.first_with(token)
            if example is not None:
                raise ValueError(f"{source.store.where(example)}: the record contains token {token}, which {purpose}")

    def batch(self, step: int) -> Any:
        """Return this process's rows of the global batch of `step`, counted from 0 over all epochs."""
        self._check(step)
        batch = self._batches[step]
        assert batch is not None  # Grain returns None only for filtered elements
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[Any]:
        """Yield the batches from `start_step` on, read ahead in a thread; close the iterator to stop the thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        batches = iter(self._batches.to_iter_dataset(options))
        # Nothing before the step is read or skipped through: every batch can be computed from its number.
        batches.set_state({"next_index": start_step})
        try:
            yield from batches
        finally:
            batches.close()

    def steps(self, epochs: int = 1) -> int:
        """Return the number of steps after which every row was seen at least `epochs` times.

        If sources are mixed by weight, some of them repeat more often.
        """
        if self.batches is not None:
            return epochs * self.batches
        if not self._shares:
            return -(-self._concatenation.end(epochs - 1) // self._batch_rows.batch_size)
        total = sum(self._shares)
        # A source is complete when the mix has so many rows that its share of them covers all of its epochs.
        rows = []
        for source, share in zip(self._sources, self._shares, strict=True):
            rows.append(-(-source.order.end(epochs - 1) * total // share))
        return -(-max(rows) // self._batch_rows.batch_size)

    def total_steps(self, length: config.Train) -> int:
        """Return the number of steps of a run whose length `train.steps`, `train.epochs` or `train.tokens` states."""
        if length.steps is not None:
            return length.steps
        if length.epochs is not None:
            return self.steps(length.epochs)
        assert length.tokens is not None
        # Counted in positions, padding included, so that the number of steps does not depend on the packing.
        return math.ceil(length.tokens / (length.batch_size * length.seq_len))

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each training source was seen, on average, after `step` steps."""
        rows = step * self._batch_rows.batch_size
        if not self._shares:
            return dict.fromkeys((source.name for source in self._sources), round(rows / self.num_rows, 3))
        epochs = {}
        for source, share in zip(self._sources, self._shares, strict=True):
            source_rows = rows * share / sum(self._shares)
            epochs[source.name] = round(source_rows / source.order.plan().num_rows, 3)
        return epochs

    def trace(self, step: int, row: int) -> list[Segment]:
        """Return the origin of each segment in a row of a batch.

        Args:
            step: The step of the batch.
            row: Index of the row in the global batch, over all processes.

        Raises:
            IndexError: If there is no such batch or row.
        """
        self._check(step)
        numbers = self._row_numbers[step]
        assert numbers is not None
        if not 0 <= row < len(numbers):
            raise IndexError(f"no row {row} in batch {step}; it has {len(numbers)}, from 0")
        index, number = divmod(int(numbers[row]), _ROWS)
        source = self._sources[index]
        segments = []
        for piece in source.order.pieces(number):
            origin = source.store.origin(piece.example)
            segments.append(Segment(index, source.store.place(origin), origin.number, *source.filled(piece)))
        return segments

    def steps_with(self, source: int, records: Collection[Origin], num_steps: int) -> list[int]:
        """Return which of the first `num_steps` steps, counted from 0, read a row with a piece of one of these records.

        Args:
            source: Index of the source.
            records: Places of the source's records (see `TokenStore.examples_of`).
            num_steps: Number of steps to look at.
        """
        opened = self._sources[source]
        batch_size = self._batch_rows.batch_size
        # No source has more rows in these steps than all of them together.
        rows = opened.order.rows_with(opened.store.examples_of(records), num_steps * batch_size)
        if len(self._sources) == 1:
            return sorted({row // batch_size for row in rows if row < num_steps * batch_size})
        numbers = {source * _ROWS + row for row in rows}
        steps = []
        for step in range(num_steps):
            in_step = self._row_numbers[step]
            assert in_step is not None
            if not numbers.isdisjoint(in_step.tolist()):
                steps.append(step)
        return steps

    @property
    def sources(self) -> tuple[RowSource, ...]:
        """The opened sources, in the order of the config."""
        return tuple(self._sources)

    def add_references(self, references: Sequence[StoredReference]) -> None:
        """Add the stored outputs of a reference model to the batches that are made from now on, one store for each source."""
        self._sources = [source._replace(reference=reference) for source, reference in zip(self._sources, references, strict=True)]

    def add_features(self, features: Sequence[StoredFeatures | None]) -> None:
        """Add stored features of pictures or sound to the batches that are made from now on, one store for each source."""
        self._sources = [source._replace(features=stored) for source, stored in zip(self._sources, features, strict=True)]

    def pieces(self, step: int) -> list[tuple[int, list[ExampleSlice]]]:
        """Return, for each row of the global batch of `step`, the index of its source, and what it takes from its examples."""
        self._check(step)
        numbers = self._row_numbers[step]
        assert numbers is not None
        located = [divmod(int(number), _ROWS) for number in numbers]
        rows = []
        for index, row in located:
            source = self._sources[index]
            rows.append((index, [source.filled(piece) for piece in source.order.pieces(row)]))
        return rows

    def _locate(self, number: int) -> int:
        """Return the number that stands for a row of a source (see `_ROWS`), of the rows of all sources together."""
        source, row = self._concatenation.locate(int(number))
        return source * _ROWS + row

    def _check(self, step: int) -> None:
        """Raise IndexError if there is no batch of this step."""
        if step < 0 or (self.batches is not None and step >= self.batches):
            raise IndexError(f"no batch {step}; there are {self.batches or 'endless'} batches from 0")

    def _type_of(self, numbers: np.ndarray) -> type[PackedBatch]:
        """Return the batch type with room for the pictures or sound of the rows with these numbers, those of all processes."""
        batch_type = self.batch_type
        if not issubclass(batch_type, MediaBatch | FeatureBatch) or len(batch_type.rooms) == 1:
            return batch_type
        most = 0
        for number in numbers.tolist():
            index, row = divmod(number, _ROWS)
            source = self._sources[index]
            most = max(most, sum(int(source.store.media_units[piece.example]) for piece in source.order.pieces(row)))
        return batch_type.with_room(most)

    def _fill(self, numbers: np.ndarray) -> PackedBatch:
        """Make this process's part of the batch with these row numbers."""
        own_rows = self._batch_rows.own_rows
        batch: Any = self._type_of(numbers).empty(own_rows.stop - own_rows.start, self._batch_rows.seq_len)
        reference = self._sources[0].reference
        # All sources are compared with one model.
        if reference is not None and reference.experts is not None:
            experts = reference.experts
            batch = batch._replace(reference_experts=np.zeros((*batch.tokens.shape, experts.ids_per_position), experts.dtype))
        # Grain shortens the last batch of an evaluation; the rows that it lacks stay empty.
        source_of_row, rows = np.divmod(numbers[own_rows], _ROWS)
        for i, source in enumerate(self._sources):
            batch_rows = np.flatnonzero(source_of_row == i).tolist()
            row_pieces = [source.order.pieces(row) for row in rows[batch_rows].tolist()]
            # One read for all rows of the source, so that a bucket answers many requests at once.
            contents = iter(source.read(list(itertools.chain.from_iterable(row_pieces))))
            for row, pieces in zip(batch_rows, row_pieces, strict=True):
                batch.fill_row(row, [next(contents) for _ in pieces])
        return batch


def _identity(sources: str, weights: Sequence[float | None], manifests: Sequence[manifest.Manifest], plans: Sequence[Plan]) -> str:
    """Return a hash of everything that decides the batches, except the batch size."""
    # The hashes of the shards alone, since where the files are and what they are called do not change a batch.
    contents = []
    for prepared in manifests:
        contents.append([shard.sha256 for shard in prepared.shards])
    # The plans of the first epoch stand for those of all: seed, window and sequence length decide every one alike.
    decides = [sources, weights, contents, [plan.digest for plan in plans]]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _integer_shares(weights: Sequence[float | None]) -> list[int]:
    """Return the weights of several sources as integers, which Grain mixes by; [] if a single source or no weights leave no choice.

    Their resolution is a hundredth of the smallest weight.
    """
    stated = [weight for weight in weights if weight is not None]
    if len(weights) == 1 or len(stated) < len(weights):
        return []
    return [round(100 * weight / min(stated)) for weight in stated]
