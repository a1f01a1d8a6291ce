"""Batches in a global order: the batch of a step depends on the data, the seed and the step alone.

Each source is tokenised and packed into rows by itself; Grain shuffles the rows of a source (anew in every epoch), mixes
the sources by weight, groups rows into batches and reads ahead. A process fills only its slice of a global batch, so the
number of processes changes nothing, and the only position to save is the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Literal

import grain
import numpy as np

from moe_train import config
from moe_train.data import chat, packing
from moe_train.data.batch import Batch
from moe_train.data.packing import Plan
from moe_train.data.sources import Origin, Records, open_source
from moe_train.data.store import TokenStore, open_store
from moe_train.data.tokenizer import Tokenizer


class Loader:
    """The train or eval sources of a config, as batches of packed rows.

    batch_size: rows of the global batch, over all processes. Training is endless: rows are shuffled and sources mixed
    by weight (a weight is a share of the rows). Evaluation is each row once, in order, the last batch filled up with
    empty rows.

    Figures of one epoch: num_records that are used, num_rows, num_tokens (positions that are no padding); of the
    records, num_dropped (too long, or truncated to nothing that bears loss), num_truncated, num_split, num_empty (no
    text, left out).
    steps_per_epoch: steps after which every row was seen at least once (by weight, so smaller sources repeat).
    identity: a hash of everything that decides the batches but seed and batch_size. batches: eval's number of batches,
    None in training.
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
    ) -> None:
        if batch_size % process_count:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {process_count} processes")
        chosen = data.train if sources == "train" else data.eval
        if not chosen:
            raise ValueError(f"data.{sources} names no source")
        template = chat.load_template(data.chat_template, tokenizer)
        self._batch_size, self._seq_len, self._prefetch = batch_size, seq_len, data.prefetch
        per_process = batch_size // process_count
        self._slice = slice(process_index * per_process, (process_index + 1) * per_process)

        self._stores: list[TokenStore] = []
        self._plans: list[Plan] = []
        self.num_empty = 0
        for source in chosen:
            records = open_source(source)
            store = open_store(records, source.record, tokenizer, template, data.cache_dir, data.num_proc)
            plan = _plan(records, store, seq_len, source.record.too_long)
            self._stores.append(store)
            self._plans.append(plan)
            self.num_empty += store.num_empty
        self.num_records = sum(len(np.unique(plan.record)) for plan in self._plans)
        self.num_rows = sum(plan.num_rows for plan in self._plans)
        self.num_tokens = sum(plan.num_tokens for plan in self._plans)
        self.num_dropped = sum(plan.num_dropped for plan in self._plans)
        self.num_truncated = sum(plan.num_truncated for plan in self._plans)
        self.num_split = sum(plan.num_split for plan in self._plans)

        weights = [source.weight for source in chosen]
        decides = [seq_len, sources, weights, [store.digest for store in self._stores], [plan.digest for plan in self._plans]]
        self.identity = hashlib.sha256(json.dumps(decides).encode()).hexdigest()

        ends = np.cumsum([plan.num_rows for plan in self._plans]).tolist()
        self._first_row = np.asarray([0, *ends])  # row ids run on from source to source
        streams = [grain.MapDataset.range(end - plan.num_rows, end) for end, plan in zip(ends, self._plans, strict=True)]
        if sources == "train":
            seeds = [int(np.random.SeedSequence((seed, i)).generate_state(1)[0]) for i in range(len(streams))]
            streams = [stream.shuffle(seed=s).repeat() for stream, s in zip(streams, seeds, strict=True)]
            shares = [round(100 * weight / min(weights)) for weight in weights]  # Grain's resolution
            rows = grain.MapDataset.mix(streams, shares) if len(streams) > 1 else streams[0]
            epoch = max(-(-plan.num_rows * sum(shares) // share) for plan, share in zip(self._plans, shares, strict=True))
            self.steps_per_epoch, self.batches = -(-epoch // batch_size), None
        else:
            rows = grain.MapDataset.concatenate(streams)
            self.steps_per_epoch = self.batches = -(-self.num_rows // batch_size)
        self._batches = rows.batch(batch_size, drop_remainder=False).map(self._fill)

    def batch(self, step: int) -> Batch:
        """This process's rows of the global batch of `step`, counted from 0 over all epochs."""
        if step < 0 or (self.batches is not None and step >= self.batches):
            raise IndexError(f"no batch {step}; there are {self.batches or 'endless'} batches from 0")
        batch = self._batches[step]
        assert batch is not None  # Grain's word for a filtered element
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from `start_step` on, read ahead in a thread; close the iterator to stop the thread."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
        batches = iter(self._batches.to_iter_dataset(options))
        batches.set_state({"next_index": start_step})
        try:
            yield from batches
        finally:
            batches.close()

    def _fill(self, row_ids: np.ndarray) -> Batch:
        mine = row_ids[self._slice]
        batch = packing.empty_batch(self._slice.stop - self._slice.start, self._seq_len)
        source = np.searchsorted(self._first_row, mine, side="right") - 1
        for i, (store, plan) in enumerate(zip(self._stores, self._plans, strict=True)):
            at = np.flatnonzero(source == i)
            if len(at):
                rows = mine[at] - self._first_row[i]
                packing.fill_rows(batch, at, plan, rows, store.tokens, store.loss_mask, store.offsets)
        return batch


def _plan(records: Records, store: TokenStore, seq_len: int, too_long: packing.TooLong) -> Plan:
    lengths = store.lengths
    over = np.flatnonzero(lengths > seq_len)
    if too_long == "error" and len(over):
        longest = int(over[np.argmax(lengths[over])])
        where = records.where(Origin(*store.origins[longest].tolist()))
        raise ValueError(
            f"{where}: the record has {lengths[longest]} tokens, train.seq_len is {seq_len} ({len(over)} of {len(lengths)} records "
            "are too long); raise train.seq_len or set record.too_long"
        )
    if too_long == "truncate" and store.loss_mask is not None:
        # What is left of a record may bear no loss at all: then there is nothing to learn from it.
        starts = store.offsets[over] + 1
        useless = [not store.loss_mask[start : start + seq_len].any() for start in starts.tolist()]
        lengths[over[useless]] = 0
    plan = packing.make_plan(lengths, seq_len, too_long)
    if not plan.num_rows:
        raise ValueError(f"{', '.join(records.places)}: all {len(lengths)} records are too long for train.seq_len {seq_len}")
    return plan
