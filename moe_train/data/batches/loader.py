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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from moe_train import config
from moe_train.data.batches.batch import Batch, PackedBatch
from moe_train.data.batches.concatenation import Concatenation
from moe_train.data.batches.order import Order, Shuffle
from moe_train.data.batches.packing import TooLong
from moe_train.data.chat import conversation_to_tokens
from moe_train.data.chat.chat_date import dated, keep_date, reads_date
from moe_train.data.chat.example import has_trained_token
from moe_train.data.prepared import manifest
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.tokenize_ahead import PrepareProgress, prepare
from moe_train.data.records.open_source import open_source
from moe_train.data.records.unread import add_counts
from moe_train.data.tokenizers.tokenizer import Tokenizer

_TOGETHER = 1024  # loss masks read at once
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
        batch_size: Rows in the global batch, over all processes.
        seq_len: Positions in a row.
        seed: The seed of the order.
        process_index: Index of this process.
        process_count: Number of processes.
        batch_type: The batch type of the objective.

    Attributes:
        num_records: Number of records in the files. All counts are those of one epoch, the first.
        num_examples: Number of examples that are used; a record with tools may have several.
        num_rows: Number of rows.
        num_tokens: Number of positions that are not padding.
        num_dropped: Number of examples that were too long, or truncated to nothing that is trained on.
        num_truncated: Number of examples that were truncated, or shortened to the turns that fit (conversations with tools).
        num_split: Number of examples that were split.
        num_empty: Number of records without text, which are left out.
        unread: Number of records in which a key was not read, by its name.
        identity: A hash of everything that decides the batches, except batch_size.
        manifest: JSON that describes the data, with every file.
        manifest_hash: The hash over all manifests.
        batches: Number of batches in evaluation; None in training.
    """

    def __init__(
        self,
        data: config.Data,
        sources: Literal["train", "eval"],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        batch_type: type[PackedBatch] = Batch,
    ) -> None:
        if batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {process_count} processes")
        chosen = data.train if sources == "train" else data.eval
        if not chosen:
            raise ValueError(f"data.{sources} names no source")
        template = conversation_to_tokens.load_template(data.chat_template, tokenizer)
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._prefetch = data.prefetch
        self._batch_type = batch_type
        per_process = batch_size // process_count
        self._slice = slice(process_index * per_process, (process_index + 1) * per_process)

        self._names = [_name(source) for source in chosen]
        self._stores: list[TokenStore] = []
        self._orders: list[Order] = []
        self._num_shortened = 0
        for i, source in enumerate(chosen):
            store = open_store(source, data, tokenizer, template)
            if not isinstance(source, config.PreparedSource):
                too_long = source.record.too_long
            elif source.too_long is not None:
                too_long = source.too_long
            else:
                too_long = store.manifest.too_long
            shuffle: Shuffle | None = None
            if sources == "train":
                store.warn_of_cache(data.shuffle_tokens)
                shuffle = Shuffle((seed, i), data.shuffle_tokens)
            lengths = _lengths(store, seq_len, too_long)
            if too_long == "drop":
                fitting = store.fitting_lengths(lengths, seq_len)
                self._num_shortened += int((fitting < lengths).sum())
                lengths = fitting
            self._stores.append(store)
            self._orders.append(Order(store, lengths, seq_len, too_long, shuffle, data.cache_dir))
        plans = [order.plan() for order in self._orders]
        for name, store, plan in zip(self._names, self._stores, plans, strict=True):
            if not plan.num_rows:
                raise ValueError(f"{name}: all {len(store)} examples are too long for train.seq_len {seq_len}")
        self.num_records = sum(store.manifest.records for store in self._stores)
        self.num_examples = sum(len(store) - plan.num_dropped for store, plan in zip(self._stores, plans, strict=True))
        self.num_rows = sum(plan.num_rows for plan in plans)
        self.num_tokens = sum(plan.num_tokens for plan in plans)
        self.num_dropped = sum(plan.num_dropped for plan in plans)
        self.num_truncated = sum(plan.num_truncated for plan in plans) + self._num_shortened
        self.num_split = sum(plan.num_split for plan in plans)
        self.num_empty = sum(store.manifest.empty for store in self._stores)
        self.unread: Counter[str] = Counter()
        for store in self._stores:
            add_counts(self.unread, store.manifest.unread)
        manifests = [store.manifest for store in self._stores]
        self.manifest_hash = manifest.hash_of_all(manifests)
        self.manifest = manifest.text_of_all(manifests)

        # A single source is seen in full in any case, so a weight changes nothing.
        weights = [1.0] if len(chosen) == 1 else [source.weight for source in chosen]
        contents = [[shard.sha256 for shard in store.manifest.shards] for store in self._stores]
        decides = [sources, weights, contents, [plan.digest for plan in plans]]
        self.identity = hashlib.sha256(json.dumps(decides).encode()).hexdigest()

        self.batches: int | None = None
        self._shares: list[int] = []
        self._concatenation = Concatenation(self._orders)
        if sources == "eval":
            streams = [grain.MapDataset.range(i * _ROWS, i * _ROWS + plan.num_rows) for i, plan in enumerate(plans)]
            rows = grain.MapDataset.concatenate(streams)
            self.batches = -(-self.num_rows // batch_size)
        elif len(chosen) == 1:
            rows = grain.MapDataset.range(_ROWS)
        elif None in weights:
            rows = grain.MapDataset.range(_ROWS).map(self._locate)
        else:
            streams = [grain.MapDataset.range(i * _ROWS, (i + 1) * _ROWS) for i in range(len(plans))]
            # Grain gets the weights as integers, with a resolution of a hundredth of the smallest one.
            stated = [weight for weight in weights if weight is not None]
            self._shares = [round(100 * weight / min(stated)) for weight in stated]
            rows = grain.MapDataset.mix(streams, self._shares)
        self._rows = rows.batch(batch_size, drop_remainder=False)
        self._batches = self._rows.map(self._fill)

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
            return -(-self._concatenation.end(epochs - 1) // self._batch_size)
        total = sum(self._shares)
        rows = [-(-order.end(epochs - 1) * total // share) for order, share in zip(self._orders, self._shares, strict=True)]
        return -(-max(rows) // self._batch_size)

    def total_steps(self, length: config.Train) -> int:
        """Return the number of steps of a run whose length `train.steps`, `train.epochs` or `train.tokens` states."""
        if length.steps is not None:
            return length.steps
        if length.epochs is not None:
            return self.steps(length.epochs)
        assert length.tokens is not None
        return math.ceil(length.tokens / (length.batch_size * length.seq_len))

    def epochs(self, step: int) -> dict[str, float]:
        """Return how often each training source was seen, on average, after `step` steps."""
        rows = step * self._batch_size
        if not self._shares:
            return dict.fromkeys(self._names, round(rows / self.num_rows, 3))
        shares = zip(self._names, self._orders, self._shares, strict=True)
        return {name: round(rows * share / sum(self._shares) / order.plan().num_rows, 3) for name, order, share in shares}

    def trace(self, step: int, row: int) -> list[Segment]:
        """Return the origin of each segment in a row of a batch.

        Args:
            step: The step of the batch.
            row: Index of the row in the global batch, over all processes.

        Raises:
            IndexError: If there is no such batch or row.
        """
        self._check(step)
        numbers = self._rows[step]
        assert numbers is not None
        if not 0 <= row < len(numbers):
            raise IndexError(f"no row {row} in batch {step}; it has {len(numbers)}, from 0")
        source, number = divmod(int(numbers[row]), _ROWS)
        store = self._stores[source]
        segments = []
        for piece in self._orders[source].pieces(number):
            origin = store.origin(piece.example)
            segments.append(Segment(source, store.place(origin), origin.number, *piece))
        return segments

    def _locate(self, number: int) -> int:
        """Return the number that stands for a row of a source (see `_ROWS`), of the rows of all sources together."""
        source, row = self._concatenation.locate(int(number))
        return source * _ROWS + row

    def _check(self, step: int) -> None:
        """Raise IndexError if there is no batch of this step."""
        if step < 0 or (self.batches is not None and step >= self.batches):
            raise IndexError(f"no batch {step}; there are {self.batches or 'endless'} batches from 0")

    def _fill(self, numbers: np.ndarray) -> PackedBatch:
        """Make this process's part of the batch with these row numbers."""
        batch = self._batch_type.empty(self._slice.stop - self._slice.start, self._seq_len)
        sources, rows = np.divmod(numbers[self._slice], _ROWS)
        for i, (store, order) in enumerate(zip(self._stores, self._orders, strict=True)):
            batch_rows = np.flatnonzero(sources == i).tolist()
            row_pieces = [order.pieces(row) for row in rows[batch_rows].tolist()]
            contents = iter(store.read(list(itertools.chain.from_iterable(row_pieces))))
            for row, pieces in zip(batch_rows, row_pieces, strict=True):
                batch.fill_row(row, [next(contents) for _ in pieces])
        return batch


def _name(source: config.Source) -> str:
    """Return what to call a source in messages."""
    match source:
        case config.FileSource(files=files):
            return files[0] + (", …" if len(files) > 1 else "")
        case config.HubSource(dataset=dataset):
            return dataset
        case config.PythonSource(title=title):
            return title
        case config.PreparedSource(path=path):
            return path


def open_store(
    source: config.Source,
    data: config.Data,
    tokenizer: Tokenizer,
    template: str | None,
    shown: Callable[[PrepareProgress], None] | None = None,
) -> TokenStore:
    """Open the tokens of a source; tokenize them first if that has not been done.

    Args:
        source: The source.
        data: The `data` section, for the cache and the number of processes.
        tokenizer: The tokenizer.
        template: The chat template; None if there is none.
        shown: A function that is called with the progress of tokenizing.

    Raises:
        ValueError: If a prepared set was made with another tokenizer or template, or if a record cannot be used.
    """
    memory = Path(data.cache_dir) / "scans"
    if not isinstance(source, config.PreparedSource):
        if template is not None and reads_date(template) and not isinstance(source.record, config.TextRecord):
            template = dated(template, data.chat_date or keep_date(data.cache_dir))
        records = open_source(source)
        directory = prepare(source, records, tokenizer, template, data.cache_dir, data.num_proc, shown)
        prepared = TokenStore(directory, records, vocab_size=tokenizer.vocab_size)
        prepared.verify(memory)
        return prepared
    store = TokenStore(source.path, cache_mib=source.cache_mib, vocab_size=tokenizer.vocab_size)
    prepared_date = store.manifest.rules.chat_date
    if data.chat_date is not None and prepared_date not in (None, data.chat_date):
        raise ValueError(
            f"{source.path} was prepared with chat_date {prepared_date}, not {data.chat_date}; leave data.chat_date out"
        )
    template_sha256 = None
    if template is not None:
        if prepared_date is not None:
            template = dated(template, prepared_date)
        template_sha256 = hashlib.sha256(template.encode()).hexdigest()
    if store.manifest.tokenizer_sha256 != tokenizer.identity:
        raise ValueError(f"{source.path} was prepared with another tokenizer than {tokenizer.files[0]}; prepare it with this one")
    if store.manifest.rules.template_sha256 not in (None, template_sha256):
        raise ValueError(f"{source.path} was prepared with another chat template; prepare it with this one (data.chat_template)")
    store.verify(memory)
    return store


def _lengths(store: TokenStore, seq_len: int, too_long: TooLong) -> np.ndarray:
    """Return (N,) the positions that each example takes; 0 for one of which nothing that is trained on remains.

    Raises:
        ValueError: If an example is too long and `too_long` is "error".
    """
    lengths = store.lengths()
    overlong = np.flatnonzero(lengths > seq_len)
    if too_long == "error" and len(overlong):
        longest = int(overlong[np.argmax(lengths[overlong])])
        raise ValueError(
            f"{store.where(longest)}: the record has {lengths[longest]} tokens, train.seq_len is {seq_len} ({len(overlong)} of "
            f"{len(lengths)} records are too long); raise train.seq_len, or set record.too_long: drop"
        )
    if too_long == "truncate":
        for group in np.split(overlong, range(_TOGETHER, len(overlong), _TOGETHER)):
            masks = store.masks([ExampleSlice(example, 0, seq_len) for example in group.tolist()])
            for example, mask in zip(group, masks, strict=True):
                if not has_trained_token(mask, seq_len):
                    lengths[example] = 0
    return lengths
