"""Compute a teacher's predictions for the examples of a prepared set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_train.data.batches.batch import Batch, BatchRows
from moe_train.data.batches.packing import TooLong
from moe_train.data.prepared.manifest import TeacherEntry
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.teacher_set import stored_pieces
from moe_train.data.prepared.teacher_values import TeacherValues
from moe_train.machine.mesh import BATCH, put_batch
from moe_train.model.transformer import Transformer
from moe_train.train.top_logprobs import TopLogprobs, TopSettings, top_logprobs


class _RowPart(NamedTuple):
    """Where a piece of an example is in a batch."""

    piece: ExampleSlice
    row: int
    start: int


class Teacher:
    """A loaded teacher. The mesh has to be in force whenever it is used.

    Args:
        model: the model.
        mesh: the mesh.
        entry: number of tokens, temperature and row length.
        vocab_size: number of ids of the student's tokenizer; a teacher's further ids belong to the tail.
        rows: rows that are computed at once, rounded up to a multiple of the devices and processes that split them.
    """

    def __init__(self, model: Transformer, mesh: Mesh, entry: TeacherEntry, vocab_size: int, rows: int) -> None:
        self._model = model
        self._mesh = mesh
        self._entry = entry
        replicas = math.prod(mesh.shape[axis] for axis in BATCH)
        multiple = math.lcm(replicas, jax.process_count())
        self._rows = -(-rows // multiple) * multiple
        settings = TopSettings(entry.top_k, entry.temperature, vocab_size)
        self._top = jax.jit(partial(_top_of_batch, settings=settings))

    def predictions(self, store: TokenStore, examples: Sequence[int], too_long: TooLong) -> Iterator[TeacherValues]:
        """Yield the predictions for each example, in order; none for an example that training drops.

        Args:
            store: the set of tokens.
            examples: indices of the examples, ascending.
            too_long: what training does with an example that is longer than a row.
        """
        lengths = store.lengths()
        if too_long == "drop":
            lengths = store.fitting_lengths(lengths, self._entry.seq_len)
        finished: dict[int, list[TeacherValues]] = {}
        next_example = 0
        for group in self._groups(store, examples, lengths, too_long):
            for example, values in self._values(store, group):
                finished.setdefault(example, []).append(values)
            # An example is complete when a later one, or nothing, follows it in the group.
            last = group[-1].piece.example if group else None
            while next_example < len(examples) and (last is None or examples[next_example] < last):
                yield _joined(finished.pop(examples[next_example], []), self._entry.top_k)
                next_example += 1
        for example in examples[next_example:]:
            yield _joined(finished.pop(example, []), self._entry.top_k)

    def _groups(
        self, store: TokenStore, examples: Sequence[int], lengths: np.ndarray, too_long: TooLong
    ) -> Iterator[list[_RowPart]]:
        """Yield the pieces of consecutive examples, as many as fit into a batch."""
        group: list[_RowPart] = []
        row = 0
        start = 0
        for example in examples:
            # Training drops such an example, so nobody asks for its predictions.
            if too_long == "drop" and lengths[example] > self._entry.seq_len:
                continue
            for piece in stored_pieces(example, int(lengths[example]), self._entry.seq_len, too_long):
                if start + piece.length > self._entry.seq_len:
                    row += 1
                    start = 0
                if row == self._rows:
                    yield group
                    group = []
                    row = 0
                group.append(_RowPart(piece, row, start))
                start += piece.length
        if group:
            yield group

    def _values(self, store: TokenStore, group: Sequence[_RowPart]) -> Iterator[tuple[int, TeacherValues]]:
        """Compute a batch, and yield (example, predictions) for each of its pieces."""
        batch = Batch.empty(self._rows, self._entry.seq_len)
        contents = store.read([part.piece for part in group])
        for row in range(self._rows):
            batch.fill_row(row, [content for content, part in zip(contents, group, strict=True) if part.row == row])
        own_rows = BatchRows(self._rows, self._entry.seq_len, jax.process_index(), jax.process_count()).own_rows
        own = Batch(*(array[own_rows] for array in batch))
        with jax.set_mesh(self._mesh):
            # On every process, so that all have the predictions of all rows.
            top = multihost_utils.process_allgather(self._top(self._model, put_batch(own, self._mesh)), tiled=True)
        for part in group:
            place = slice(part.start, part.start + part.piece.length)
            trained = batch.loss_mask[part.row, place]
            values = (x[part.row, place][trained] for x in top)
            yield part.piece.example, TeacherValues(*values)


def _top_of_batch(model: Transformer, batch: Batch, settings: TopSettings) -> TopLogprobs:
    hidden_BTD, _ = model(batch.tokens, batch.positions, batch.segment_ids)
    return top_logprobs(hidden_BTD, model.head_weight(), settings, model.head_lora_factors(hidden_BTD))


def _joined(pieces: Sequence[TeacherValues], top_k: int) -> TeacherValues:
    """Concatenate the predictions for the pieces of an example."""
    if not pieces:
        return TeacherValues(np.zeros((0, top_k), np.int32), np.zeros((0, top_k), np.float16), np.zeros(0, np.float32))
    return TeacherValues(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
