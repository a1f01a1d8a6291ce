"""Show training rows in a readable form: the tokens, which of them are trained on, and where one record ends.

The first records of files are encoded and packed by the functions that training uses; the rows of a run come from its own
loader.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moe_train import config
from moe_train.commands.segment_notes import segment_notes
from moe_train.data.batches.answer_batches import SharedPromptBatch, UnpairedBatch
from moe_train.data.batches.batch import Batch, BatchRows, PackedBatch, StoredPiece
from moe_train.data.batches.classification_batch import ClassificationBatch, classification_batch
from moe_train.data.batches.media_batch import media_batch
from moe_train.data.batches.packing import make_plan
from moe_train.data.batches.reward_batch import RewardBatch
from moe_train.data.batches.shared_prompts import shared_positions
from moe_train.data.chat.encode import encode
from moe_train.data.chat.example import Example, fitting_tokens, has_trained_token
from moe_train.data.records.open_source import first_record, open_source
from moe_train.data.records.problem import located
from moe_train.data.records.recognise import recognise
from moe_train.data.records.source import Origin
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import JsonObject

if TYPE_CHECKING:
    from moe_train.data.batches.loader import Loader


class Rows(NamedTuple):
    """Packed rows as training receives them."""

    batch: Batch
    places: list[list[str]]
    """For each row, the origins (file:line) of its segments, in order."""
    notes: list[list[str]] | None = None
    """For each row of an objective that trains a head, what is known of its segments: labels, or which answer it is. The loss mask
    of such rows marks the tokens at which scores are read, and all tokens are inputs. None for rows with targets.
    """
    media: list[list[Sequence[bytes]]] | None = None
    """For each row, the files of the pictures or the sound of its segments, in order; None without either."""
    shares_prompts: bool = False
    """Whether both answers of a pair attend to one prompt."""

    def media_of(self, segment: ShownSegment) -> Sequence[bytes]:
        """Return the files of the pictures or the sound of a segment."""
        return () if self.media is None else self.media[segment.row - 1][segment.number - 1]


class Token(NamedTuple):
    """One token of a segment."""

    id: int
    position: int
    trained_on: bool
    """Whether its prediction contributes to the loss."""
    control: bool
    """Whether it is a control token."""
    text: str
    """What it adds to the text before it; empty if its character continues in the next token."""


class ShownSegment(NamedTuple):
    """One segment of a row; rows and segments are counted from 1.

    Its last token is only predicted and never an input, so no position after it exists.
    """

    row: int
    number: int
    place: str
    tokens: list[Token]


def rows_of_records(source: config.FileSource, count: int, tokenizer: Tokenizer, template: str | None, seq_len: int | None) -> Rows:
    """Encode and pack the first `count` records of a source.

    Args:
        source: the files and the record section.
        count: number of records.
        tokenizer: the tokenizer.
        template: the chat template; None for the tokenizer's own.
        seq_len: length of the rows; None for a single row that holds all records.

    Raises:
        ValueError: a record cannot be used (with file and line), or there is none.
    """
    records = open_source(source)
    examples: list[Example] = []
    places: list[str] = []

    def folder_of(origin: Origin) -> Path | None:
        return records.folder(origin.place)

    numbered = itertools.islice(records, count)
    for origin, record_examples in encode(numbered, records.where, source.record, tokenizer, template, folder_of=folder_of):
        examples += record_examples
        places += [records.where(origin)] * len(record_examples)
    if not examples:
        raise ValueError(f"{', '.join(records.names)}: no record with any text; name files that have records")
    # An example takes one position less than it has ids, since its last id is only predicted.
    lengths = np.asarray([len(example.tokens) - 1 for example in examples])
    seq_len = seq_len or int(lengths.sum())
    too_long = source.record.too_long
    for i in np.flatnonzero(lengths > seq_len).tolist():
        if too_long == "error":
            raise ValueError(
                f"{places[i]}: the record has {lengths[i]} tokens, seq_len is {seq_len}; raise --seq-len, or leave it out"
            )
        # Of a conversation with tools, the turns that fit are kept.
        if too_long == "drop":
            fitting = fitting_tokens(examples[i].merged, seq_len + 1)
            if fitting > 1:
                lengths[i] = fitting - 1
        # A record that is left with nothing to train on is dropped.
        if too_long == "truncate" and not has_trained_token(examples[i].loss_mask, seq_len):
            lengths[i] = 0
    plan = make_plan(lengths, seq_len, too_long)
    if not plan.num_rows:
        raise ValueError(f"{', '.join(records.names)}: all {len(examples)} records are too long for seq_len {seq_len}; raise it")
    batch = Batch.empty(plan.num_rows, plan.seq_len)
    placed = []
    shown: list[list[Sequence[bytes]]] = []
    for row in range(plan.num_rows):
        piece_indices = range(*plan.row_pieces[row : row + 2].tolist())
        batch.fill_row(row, [_piece(examples[plan.example[i]], int(plan.start[i]), int(plan.length[i])) for i in piece_indices])
        placed.append([places[plan.example[i]] for i in piece_indices])
        shown.append([examples[plan.example[i]].media for i in piece_indices])
    return Rows(batch, placed, media=shown)


def _piece(example: Example, start: int, length: int) -> StoredPiece:
    # A piece of n positions has n + 1 ids, the last of which is only predicted.
    cut = slice(start, start + length + 1)
    tokens = np.asarray(example.tokens[cut])
    if example.loss_mask is None:
        return StoredPiece(tokens, None)
    return StoredPiece(tokens, np.asarray(example.loss_mask[cut]))


def rows_of_run(run: config.Config, count: int, tokenizer: Tokenizer, step: int = 1) -> Rows:
    """Load the first rows of a training step of a run.

    Args:
        run: the config.
        count: number of rows.
        tokenizer: the tokenizer of the run.
        step: the training step, counted from 1.

    Raises:
        ValueError: the data of the run cannot be used.
    """
    if run.data is None:
        raise ValueError("the config has no data section; state data.train")
    from moe_train.data.batches.loader import Loader  # imported here, since it takes a second that other uses do not need

    batch_type = _batch_type(run)
    is_unpaired = batch_type is UnpairedBatch
    batch_rows = BatchRows(run.train.batch_size, run.train.seq_len)
    data = config.with_targets(run.data, run.objective)
    loader = Loader(data, "train", tokenizer, batch_rows, seed=run.seed, batch_type=batch_type)
    if isinstance(run.objective, config.Preference):
        from moe_train.run.shared_prompt import shares_prompts  # imports jax, which other uses do not need

        if shares_prompts(run.objective, run.compute, [source.store for source in loader.sources]):
            loader = Loader(data, "train", tokenizer, batch_rows, seed=run.seed, batch_type=SharedPromptBatch)
    count = min(count, run.train.batch_size)
    rows = type(loader.batch(step - 1))(*(array[:count] for array in loader.batch(step - 1)))
    if isinstance(rows, UnpairedBatch):
        # Shown with the mismatched segments, which training leaves out of the loss.
        rows = rows._replace(segment_ids=rows.segment_ids + rows.mismatched_ids)
    places = [_places(loader, step - 1, row, is_unpaired) for row in range(count)]
    if isinstance(rows, ClassificationBatch | RewardBatch):
        batch = Batch(rows.tokens, np.zeros_like(rows.tokens), rows.is_last, rows.segment_ids, rows.positions)
        return Rows(batch, places, [segment_notes(rows, row, len(names)) for row, names in enumerate(places)])
    media = None if run.vision is None and run.audio is None else [_media(loader, step - 1, row) for row in range(count)]
    batch = Batch(rows.tokens, rows.targets, rows.loss_mask, rows.segment_ids, rows.positions)
    return Rows(batch, places, media=media, shares_prompts=isinstance(rows, SharedPromptBatch))


def _media(loader: Loader, step: int, row: int) -> list[Sequence[bytes]]:
    """Return the files of the pictures, or of the sound, of each segment of a row."""
    index, pieces = loader.pieces(step)[row]
    return [loader.sources[index].store.media_files(piece.example) for piece in pieces]


def _batch_type(run: config.Config) -> type[PackedBatch]:
    """Return the type of batches whose rows are shown."""
    if run.vision is not None or run.audio is not None:
        from moe_train.run.resolve import resolve  # reads the sizes of the tower, with libraries that other uses do not need

        media = resolve(run).media
        assert media is not None  # as the config states the section
        return media_batch(media.encoder, media.units_per_row)
    match run.objective:
        case config.UnpairedPreference():
            return UnpairedBatch
        case config.Classification():
            return classification_batch(run.objective.targets)
        case config.Reward():
            return RewardBatch
        case _:
            # Every other objective has the rows of `Batch`, whatever else its batches hold.
            return Batch


def _places(loader: Loader, step: int, row: int, is_unpaired: bool) -> list[str]:
    """Return the origin of each segment of a row; an example may have several."""
    index, pieces = loader.pieces(step)[row]
    places = []
    for piece, segment in zip(pieces, loader.trace(step, row), strict=True):
        place = f"{segment.file}:{segment.number}"
        store = loader.sources[index].store
        answers = [place] * int(store.segments[piece.example])
        if loader.batch_type is SharedPromptBatch and shared_positions(store)[piece.example]:
            answers = [f"{place}, prompt", *(f"{place}, answer to it" for place in answers)]
        places += answers
        if is_unpaired:
            places.append(f"{place}, with the answer of another record")
    return places


def record_of(files: Sequence[str], layout: str, ignore: Sequence[str] = ()) -> config.Record:
    """Return the record section that suits files, by the columns of their first record. Raises ValueError if none does."""
    first = first_record(files, layout)
    if first is None:
        return config.TextRecord(name="text")  # empty files are reported when they are read
    location, fields = first
    return located(location, recognise, fields, ignore)


def segments(rows: Rows, tokenizer: Tokenizer) -> Iterator[ShownSegment]:
    """Decode the segments of all rows."""
    control = tokenizer.control_ids
    for row, places in enumerate(rows.places):
        tokens, targets, loss_mask, segment_ids, positions = (array[row] for array in rows.batch)
        for number, place in enumerate(places, start=1):
            token_indices = np.flatnonzero(segment_ids == number)
            # The targets are the tokens shifted by one, so the first token and all targets are the whole segment.
            ids = [int(tokens[token_indices[0]]), *targets[token_indices].tolist()]
            # The loss mask is one of targets; the first token is the target of nothing.
            trained_on = [False, *loss_mask[token_indices].tolist()]
            # The last target has no position of its own in the batch.
            shown_positions = [*positions[token_indices].tolist(), int(positions[token_indices[-1]]) + 1]
            if rows.notes is not None:
                place = f"{place}, {rows.notes[row][number - 1]}"
                ids = tokens[token_indices].tolist()
                trained_on = trained_on[1:]
                shown_positions.pop()
            texts = token_texts(ids, tokenizer)
            segment_tokens = []
            for token_id, position, is_trained_on, text in zip(ids, shown_positions, trained_on, texts, strict=True):
                segment_tokens.append(Token(token_id, position, is_trained_on, token_id in control, text))
            yield ShownSegment(row + 1, number, place, segment_tokens)


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text that each id adds; a control token is shown by its name."""
    context = tokenizer.encode("a")  # prepended, since some decoders drop the first space of a text
    piece_texts = []
    window = list(context)
    num_returned = len(tokenizer.decode(window))  # number of characters of the window's text that were already returned
    for i, token in enumerate(ids):
        if token in tokenizer.control_ids:
            piece_texts.append(tokenizer.decode([token], keep_special=True))
            window = list(context)
            num_returned = len(tokenizer.decode(context))
            continue
        window.append(token)
        text = tokenizer.decode(window)
        ends = i + 1 == len(ids) or ids[i + 1] in tokenizer.control_ids
        if text.endswith("\ufffd") and not ends:  # a character whose other bytes follow, or an invalid one
            piece_texts.append("")
            continue
        piece_texts.append(text[num_returned:])
        num_returned = len(text)
        # A bounded window keeps decoding linear in the number of tokens.
        if len(window) > 32:
            window = window[-4:]
            num_returned = len(tokenizer.decode(window))
    return piece_texts


# U+2400 onwards are the pictures of the control characters. The others are C1 controls and marks of text direction.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_VISIBLE |= {code: 0xFFFD for code in (*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def escape_control_characters(text: str) -> str:
    """Make text safe for a terminal: control characters become their symbols, and changes of text direction are replaced."""
    return text.translate(_VISIBLE)


_STYLES = {(True, False): "bold green", (True, True): "bold black on green", (False, True): "cyan", (False, False): ""}
_LEGEND = "control tokens stand out; a rule begins a segment; segments do not attend to one another"


def print_rows(rows: Rows, tokenizer: Tokenizer, console: Console, positions: bool) -> None:
    """Print each segment under a rule that states its origin.

    Args:
        rows: the rows.
        tokenizer: the tokenizer.
        console: where to print.
        positions: whether to print a table with one line per token instead of running text.
    """
    for segment in segments(rows, tokenizer):
        console.print(Rule(Text(title_of(segment, rows)), align="left"))
        console.print(_token_table(segment) if positions else _running_text(segment))
    legend = f"{_LEGEND}, but for answers, which attend to their prompt" if rows.shares_prompts else _LEGEND
    console.print(Group(Rule(), Text(f"{summary(rows)}; {meaning_of_green(rows)}; {legend}", style="dim")))


def title_of(segment: ShownSegment, rows: Rows) -> str:
    trained_on = sum(token.trained_on for token in segment.tokens)
    count = len(rows.places[segment.row - 1])
    place = f"row {segment.row}, segment {segment.number} of {count}: {segment.place}, {len(segment.tokens)} tokens"
    return escape_control_characters(place if rows.notes is not None else f"{place}, {trained_on} trained on")


def meaning_of_green(rows: Rows) -> str:
    """Return what is said of the tokens that stand out in green."""
    return "green tokens are trained on" if rows.notes is None else "scores are read at green tokens"


def summary(rows: Rows) -> str:
    """Describe the rows in a line: their number and length, positions used, and positions trained on."""
    used = int((rows.batch.segment_ids > 0).sum())
    trained_on = int(rows.batch.loss_mask.sum())
    count, seq_len = rows.batch.tokens.shape
    what = "trained on" if rows.notes is None else "with scores"
    return f"{count} {'row' if count == 1 else 'rows'} of {seq_len} positions, {used} used, {trained_on} of them {what}"


def _running_text(segment: ShownSegment) -> RenderableType:
    text = Text(overflow="fold")
    for token in segment.tokens:
        text.append(escape_control_characters(token.text), _STYLES[token.trained_on, token.control])
    return text


def _token_table(segment: ShownSegment) -> RenderableType:
    table = Table("position", "id", "trained on", "token", box=None)
    for token in segment.tokens:
        visible = repr(escape_control_characters(token.text))[1:-1] or "(part of a character)"
        cell = Text(visible, _STYLES[token.trained_on, token.control])
        table.add_row(str(token.position), str(token.id), "yes" if token.trained_on else "", cell)
    return table


def segments_to_json(rows: Rows, tokenizer: Tokenizer) -> list[JsonObject]:
    """Return the segments of all rows as values that `json.dumps` accepts."""
    objects = []
    for segment in segments(rows, tokenizer):
        objects.append({**segment._asdict(), "tokens": [token._asdict() for token in segment.tokens]})
    return objects
