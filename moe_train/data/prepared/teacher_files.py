"""A teacher's predictions from files that a served model wrote.

A file has one JSON line for each example, in their order, with `prompt_logprobs` as vLLM writes it: a list with an entry for each
token, the first of them null, the others {token id: {logprob: …}}. Each entry holds the token itself, too, by which the files are
checked. A column of the records has a list as axolotl reads it: an entry for each of the last tokens of the example, which is a
list of {token: "token_id:7", logprob: …} or of [id, logprob].
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_train.data.prepared.store import ExampleSlice, TokenStore
from moe_train.data.prepared.teacher_values import TeacherValues
from moe_train.data.records.problem import brief
from moe_train.data.records.source import OpenSource

_SMALLEST_TAIL = 1e-6
"""Smallest probability of all other tokens: served log-probabilities are rounded to about as much."""
_TOKEN_ID = "token_id:"

Candidates = Sequence[tuple[int, float]]
"""(id, log-probability) of a few tokens."""


class FilePredictions(NamedTuple):
    """How predictions are taken from files."""

    store: TokenStore
    lengths: np.ndarray
    """(N,) positions of each example, as `TokenStore.lengths` returns them."""
    top_k: int
    """Number of tokens to keep of each prediction."""
    vocab_size: int
    """Number of ids of the student's tokenizer."""
    seq_len: int
    """Positions in a row; predictions behind it are left out."""

    def values(self, place: str, example: int, entries: Sequence[Any], *, is_checked: bool) -> TeacherValues:
        """Return the predictions for one example.

        Args:
            place: where the entries are, for messages.
            example: index of the example.
            entries: an entry for each of the example's last tokens.
            is_checked: whether each entry has to hold the token itself.

        Raises:
            ValueError: the entries belong to other tokens, or are too few.
        """
        length = int(self.lengths[example])
        [piece] = self.store.read([ExampleSlice(example, 0, min(length, self.seq_len))])
        ids = piece.tokens.tolist()
        mask = np.ones(len(ids), bool) if piece.loss_mask is None else piece.loss_mask
        # The last entry belongs to the last token of the whole example, of which a row may hold a part.
        first = length + 1 - len(entries)
        if first < 0 or (is_checked and first > 0):
            raise ValueError(
                f"{place}: there are {len(entries)} entries for the {length + 1} tokens of {self.store.where(example)}, so the "
                "teacher read other tokens; serve it the tokens of the prepared set (--json lists where it is)"
            )
        rows = []
        for index in np.flatnonzero(mask[1:]) + 1:
            entry = entries[index - first] if index >= first else None
            if entry is None:
                raise ValueError(
                    f"{place}: there is no entry for token {index} of {self.store.where(example)}, which is trained on; write one "
                    "for each token of the answer"
                )
            candidates = _candidates(place, entry)
            if is_checked and all(token != ids[index] for token, _ in candidates):
                raise ValueError(
                    f"{place}: the entry of token {index} does not hold {ids[index]}, the token of {self.store.where(example)} "
                    "there, so the teacher read other tokens; serve it the tokens of the prepared set"
                )
            rows.append(self._top(place, candidates))
        ids_nk = np.array([row[0] for row in rows], np.int64).reshape(-1, self.top_k)
        logprobs_nk = np.array([row[1] for row in rows], np.float32).reshape(-1, self.top_k)
        mass_n = np.exp(logprobs_nk.astype(np.float64)).sum(axis=1)
        tail_n = np.log(np.maximum(1 - mass_n, _SMALLEST_TAIL)).astype(np.float32)
        return TeacherValues(ids_nk, logprobs_nk.astype(np.float16), tail_n)

    def _top(self, place: str, candidates: Candidates) -> tuple[list[int], list[float]]:
        """Return the most likely candidates. Raises ValueError if there are too few, or one twice."""
        known = sorted((pair for pair in candidates if pair[0] < self.vocab_size), key=lambda pair: -pair[1])
        if len({token for token, _ in known}) < len(known):
            raise ValueError(f"{place}: an entry has a token twice; write each candidate once")
        if len(known) < self.top_k:
            raise ValueError(
                f"{place}: an entry has {len(known)} candidates, fewer than the {self.top_k} that are kept; lower --top-k and "
                "objective.top_k"
            )
        ids, logprobs = zip(*known[: self.top_k], strict=True)
        return list(ids), list(logprobs)


def predictions_of_file(file: Path, settings: FilePredictions, examples: Sequence[int]) -> Iterator[TeacherValues]:
    """Yield the predictions for examples from a file of `prompt_logprobs`.

    Raises:
        ValueError: with file and line, for a line that cannot be used, or if the file has fewer lines than there are examples.
    """
    with file.open(encoding="utf-8") as lines:
        stated = itertools.islice(lines, examples[0] if examples else 0, None)
        for example in examples:
            place = f"{file}:{example + 1}"
            line = next(stated, None)
            if line is None:
                raise ValueError(
                    f"{file} ends before line {example + 1}; write one line for each of the {len(settings.store)} examples"
                )
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON ({error}); write one response of the server per line") from error
            yield settings.values(place, example, _prompt_logprobs(place, fields), is_checked=True)


def predictions_of_column(
    column: str, records: OpenSource, settings: FilePredictions, examples: Sequence[int]
) -> Iterator[TeacherValues]:
    """Yield the predictions for examples from a column of their records.

    Raises:
        ValueError: with file and line, for a record that has no such column, or entries that cannot be used.
    """
    numbered = iter(records)
    for example in examples:
        origin = settings.store.origin(example)
        place = settings.store.where(example)
        fields = next((fields for where, fields in numbered if where == origin), None)
        if fields is None:
            raise ValueError(f"{place}: the record is not there any more; prepare the data again")
        entries = fields.get(column)
        if isinstance(entries, str):
            try:
                entries = json.loads(entries)
            except ValueError as error:
                raise ValueError(f"{place}: column {column} is text that is not JSON ({error}); write a list of entries") from error
        if not isinstance(entries, list):
            raise ValueError(f"{place}: column {column} should be a list with an entry for each token, not {brief(entries)}")
        yield settings.values(place, example, entries, is_checked=False)


def _prompt_logprobs(place: str, fields: Any) -> list[Any]:
    """Return the list of a response of vLLM, or of its first choice. Raises ValueError if there is none."""
    if isinstance(fields, dict):
        if isinstance(fields.get("prompt_logprobs"), list):
            return list(fields["prompt_logprobs"])
        choices = fields.get("choices")
        if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict):
            return _prompt_logprobs(place, {"prompt_logprobs": choices[0].get("prompt_logprobs")})
    raise ValueError(f"{place}: there is no list prompt_logprobs; ask the server for it with prompt_logprobs: N")


def _candidates(place: str, entry: Any) -> Candidates:
    """Return the candidates of an entry in any of the forms. Raises ValueError for another form."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(entry, Mapping):
        for token, value in entry.items():
            pairs.append((token, value.get("logprob") if isinstance(value, Mapping) else value))
    elif isinstance(entry, list | tuple):
        for item in entry:
            if isinstance(item, Mapping):
                pairs.append((item.get("token_id", item.get("token")), item.get("logprob")))
            elif isinstance(item, list | tuple) and len(item) == 2:
                pairs.append((item[0], item[1]))
            else:
                pairs.append((item, None))
    candidates = []
    for token, logprob in pairs:
        text = str(token).removeprefix(_TOKEN_ID)
        is_number = isinstance(logprob, int | float) and not isinstance(logprob, bool) and not math.isnan(logprob)
        if not text.isdecimal() or not is_number or logprob > 1e-3:
            raise ValueError(
                f"{place}: {brief({token: logprob})} is no token id with a log-probability; write ids, as vLLM does with "
                "return_tokens_as_token_ids"
            )
        candidates.append((int(text), min(float(logprob), 0.0)))
    if not candidates:
        raise ValueError(f"{place}: an entry has no candidates; write the most likely tokens of each position")
    return candidates
