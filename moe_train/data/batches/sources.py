"""Open the sources of a config as token stores, and measure how much of a row each of their examples takes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_train import config
from moe_train.data.batches.answer_batches import SharedPromptBatch, UnpairedBatch
from moe_train.data.batches.batch import Batch, PackedBatch, StoredPiece
from moe_train.data.batches.mismatched import partners, unpaired_lengths
from moe_train.data.batches.order import Order, Shuffle
from moe_train.data.batches.packing import TooLong
from moe_train.data.batches.shared_prompts import shared_positions
from moe_train.data.chat.chat_date import dated, keep_date, reads_date
from moe_train.data.chat.example import has_trained_token
from moe_train.data.media import MediaRules
from moe_train.data.prepared.features import StoredFeatures
from moe_train.data.prepared.reference import StoredReference
from moe_train.data.prepared.shard_pool import ProgressReport
from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.tokenize_ahead import prepare
from moe_train.data.prepared.tokenize_shard import Recipe
from moe_train.data.records.local_files import LocalFiles, suffixes_in_words
from moe_train.data.records.open_source import open_source
from moe_train.data.sound.rules import SoundRules
from moe_train.data.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)
_MASKS_AT_ONCE = 1024  # loss masks read together, so that a store of any size needs little memory


class RowSource(NamedTuple):
    """A source of a config, opened for packing into rows."""

    section: config.Source
    """The config section."""
    store: TokenStore
    order: Order
    """The packed rows of the store, over all epochs."""
    num_shortened: int
    """Number of conversations with tools that were shortened to the turns that fit into a row."""
    lengths: np.ndarray
    """(N,) positions that each example takes in a row, whether it fits or not."""
    mismatched: Mismatched | None = None
    """The partners of labelled answers; None if the objective sets no answers against other prompts."""
    reference: StoredReference | None = None
    """Outputs of a reference model; None if the objective needs none that are stored."""
    stored_lengths: np.ndarray | None = None
    """(N,) positions of each example as the store counts them, where it takes another number in a row; such examples are read
    whole. None where both are equal."""
    own_lengths: np.ndarray | None = None
    """(N,) positions that each example fills, where it takes more so that a row has room for the patches of its pictures, or the
    chunks of its sound; None without either."""

    features: StoredFeatures | None = None
    """Stored features of the pictures or the sound; None if the tower computes them, or there are none."""

    @property
    def name(self) -> str:
        """The name in messages."""
        return source_name(self.section)

    def read(self, pieces: Sequence[ExampleSlice]) -> list[StoredPiece]:
        """Return the content of pieces of this source's rows."""
        pieces = [self.filled(piece) for piece in pieces]
        if self.stored_lengths is not None:
            stored_lengths = self.stored_lengths
            pieces = [piece._replace(length=int(stored_lengths[piece.example])) for piece in pieces]
        if self.mismatched is not None:
            contents = self._with_mismatched(self.mismatched, pieces)
        else:
            contents = self.store.read(pieces, with_media=self.features is None)
        if self.features is not None:
            features = self.features
            own = [features.of_example(self.store, piece.example) for piece in pieces]
            contents = [x._replace(features=rows) for x, rows in zip(contents, own, strict=True)]
        if self.reference is None:
            return contents
        reference = self.reference
        return [x._replace(reference=reference.read(piece.example)) for x, piece in zip(contents, pieces, strict=True)]

    def filled(self, piece: ExampleSlice) -> ExampleSlice:
        """Return a piece with the positions that it fills, where the plan of a row reserves more."""
        if self.own_lengths is None:
            return piece
        return piece._replace(length=int(self.own_lengths[piece.example]))

    def _with_mismatched(self, mismatched: Mismatched, pieces: Sequence[ExampleSlice]) -> list[StoredPiece]:
        """Return the content of labelled answers, with their mismatched ones."""
        # One read for all of them, so that a bucket answers many requests at once.
        slices = [mismatched.whole(piece.example) for piece in pieces]
        slices += [mismatched.whole(int(mismatched.partners[piece.example])) for piece in pieces]
        contents = self.store.read(slices)
        own = contents[: len(pieces)]
        others = contents[len(pieces) :]
        return [piece._replace(mismatched=other) for piece, other in zip(own, others, strict=True)]


class Mismatched(NamedTuple):
    """The partners of the labelled answers of a source; see `mismatched`."""

    partners: np.ndarray
    """(N,) the example whose answer is set against the prompt of each example."""
    lengths: np.ndarray
    """(N,) positions of each example alone."""

    def whole(self, example: int) -> ExampleSlice:
        """Return the slice that is all of an example."""
        return ExampleSlice(example, 0, int(self.lengths[example]))


def open_rows(
    source: config.Source,
    store: TokenStore,
    seq_len: int,
    shuffle: Shuffle | None,
    cache_dir: str,
    batch_type: type[PackedBatch] = Batch,
) -> RowSource:
    """Prepare the packing of an opened source.

    Args:
        source: The config section of the source.
        store: Its tokens (see `open_store`).
        seq_len: Positions in a row.
        shuffle: How to shuffle; None for one epoch in the order of the store.
        cache_dir: The folder in which plans of many examples are cached.
        batch_type: The batch type, which decides what a row takes besides the positions that the store counts: a labelled answer
            shares its row with its prompt and the answer of another record, a head reads the last token of each segment, both
            answers of a pair may continue one prompt, and a row has room for so many patches of pictures or chunks of sound.

    Raises:
        ValueError: If an example is too long and the source refuses such examples.
    """
    too_long = too_long_of(source, store)
    lengths = store.lengths()
    own_lengths = None
    rules = store.manifest.media
    units_per_row = getattr(batch_type, "units_per_row", None)
    if units_per_row is not None and rules is not None:
        own_lengths = lengths
        lengths = np.maximum(lengths, _positions_for_media(store, rules, seq_len, units_per_row))
    stored_lengths = None
    if getattr(batch_type, "reads_last_token", False):
        stored_lengths = lengths
        # The store counts positions without the last token of each segment.
        lengths = lengths + store.segments
    if issubclass(batch_type, SharedPromptBatch):
        stored_lengths = lengths
        lengths = lengths - (store.segments - 1) * shared_positions(store)
    mismatched = None
    if issubclass(batch_type, UnpairedBatch):
        mismatched = Mismatched(partners(store), lengths)
        lengths = unpaired_lengths(store, lengths, mismatched.partners)
    full_lengths = lengths
    lengths = _lengths(store, lengths.copy(), seq_len, too_long)
    num_shortened = 0
    if too_long == "drop":
        # A conversation with tools keeps the turns that fit, so it is dropped only if not even its first turn does.
        fitting = store.fitting_lengths(lengths, seq_len)
        num_shortened = int((fitting < lengths).sum())
        lengths = fitting
    order = Order(store, lengths, seq_len, too_long, shuffle, cache_dir)
    return RowSource(
        *(source, store, order, num_shortened, full_lengths, mismatched),
        stored_lengths=stored_lengths,
        own_lengths=own_lengths,
    )


def _positions_for_media(store: TokenStore, rules: MediaRules, seq_len: int, units_per_row: int) -> np.ndarray:
    """Return (N,) the share of a row's room for patches or chunks that each example takes, in positions.

    Rows are packed by positions alone. An example that takes as many of them as its share of the room never shares a row with
    more pictures or sound than there is room for.

    Raises:
        ValueError: If the pictures or the sound of an example need more room than a row has.
    """
    units = store.media_units.astype(np.int64)
    largest = int(np.argmax(units)) if len(units) else 0
    if len(units) and units[largest] > units_per_row:
        parts, setting = "pictures of the record have {} patches", "vision.patches_per_row"
        if isinstance(rules, SoundRules):
            parts, setting = "sound of the record has {} chunks", "audio.chunks_per_row"
        raise ValueError(
            f"{store.where(largest)}: the {parts.format(units[largest])}, and a row has room for {units_per_row}; raise "
            f"{setting}, or drop the record"
        )
    return -(-units * seq_len // units_per_row)


def too_long_of(source: config.Source, store: TokenStore) -> TooLong:
    """Return what to do with the examples of a source that are longer than a row."""
    if not isinstance(source, config.PreparedSource):
        return source.record.too_long
    if source.too_long is None:
        return store.manifest.too_long
    # Their record sections have no other choice either; a set may be cut differently than its section says.
    kind = store.manifest.rules.record["name"]
    if source.too_long in ("split", "truncate") and kind in ("preference", "labelled", "classification"):
        raise ValueError(f"{source.path}: too_long is {source.too_long}, but {kind} records are never cut; set it to drop or error")
    return source.too_long


def source_name(source: config.Source) -> str:
    """Return the name of a source in messages."""
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
    report: ProgressReport | None = None,
) -> TokenStore:
    """Open the tokens of a source; tokenize them first if that has not been done.

    Args:
        source: The source.
        data: The `data` section, for the cache and the number of processes.
        tokenizer: The tokenizer.
        template: The chat template; None if there is none.
        report: A function that is called with the progress of tokenizing; None to log it.

    Raises:
        ValueError: If a prepared set was made with another tokenizer or template, or if a record cannot be used.
    """
    memory = Path(data.cache_dir) / "scans"
    if not isinstance(source, config.PreparedSource):
        if template is not None and reads_date(template) and not isinstance(source.record, config.TextRecord):
            # The date is written into the template, so that it belongs to the identity of the set and does not change overnight.
            template = dated(template, data.chat_date or keep_date(data.cache_dir))
        records = open_source(source)
        if isinstance(records, LocalFiles) and records.left_out:
            log.warning("%s: files not read: %s", source_name(source), suffixes_in_words(records.left_out))
        directory = prepare(Recipe(source, records, tokenizer, template), data.cache_dir, data.num_proc, report)
        prepared = TokenStore(directory, records, vocab_size=tokenizer.vocab_size)
        # A set from an earlier run may have been damaged since; hashes of unchanged files are remembered.
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
            # Compared with the date that the set was made with, since today's would make every older set differ.
            template = dated(template, prepared_date)
        template_sha256 = hashlib.sha256(template.encode()).hexdigest()
    if store.manifest.tokenizer_sha256 != tokenizer.identity:
        raise ValueError(f"{source.path} was prepared with another tokenizer than {tokenizer.files[0]}; prepare it with this one")
    # None: the set holds texts, which no template has rendered.
    if store.manifest.rules.template_sha256 not in (None, template_sha256):
        raise ValueError(f"{source.path} was prepared with another chat template; prepare it with this one (data.chat_template)")
    store.verify(memory)
    return store


def _lengths(store: TokenStore, lengths: np.ndarray, seq_len: int, too_long: TooLong) -> np.ndarray:
    """Return (N,) the positions that each example takes; 0 for one of which nothing that is trained on remains.

    Raises:
        ValueError: If an example is too long and `too_long` is "error".
    """
    overlong = np.flatnonzero(lengths > seq_len)
    if too_long == "error" and len(overlong):
        longest = int(overlong[np.argmax(lengths[overlong])])
        raise ValueError(
            f"{store.where(longest)}: the record has {lengths[longest]} tokens, train.seq_len is {seq_len} ({len(overlong)} of "
            f"{len(lengths)} records are too long); raise train.seq_len, or set record.too_long: drop"
        )
    if too_long == "truncate":
        # What is cut off may be all that an example trains on, so the masks of the overlong examples have to be read.
        for group in np.split(overlong, range(_MASKS_AT_ONCE, len(overlong), _MASKS_AT_ONCE)):
            masks = store.masks([ExampleSlice(example, 0, seq_len) for example in group.tolist()])
            for example, mask in zip(group, masks, strict=True):
                if not has_trained_token(mask, seq_len):
                    lengths[example] = 0
    return lengths
