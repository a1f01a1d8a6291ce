"""Encode rendered conversations with a Hugging Face tokenizer, with the loss mask that their trained spans of characters give.

Turns that share a text share an example only if the ids up to the end of each turn are the same with and without the turns after
it. A control token at the end of a turn guarantees it; otherwise the ids are compared.
"""

from __future__ import annotations

import bisect
import itertools
import re
from typing import NamedTuple

from moe_train.data.chat.example import REWRITTEN, Example, MergedTurns
from moe_train.data.chat.loss_mask import Text
from moe_train.data.chat.pieces import check_effective
from moe_train.data.chat.renderings import PLAIN_TEXT_MARKS
from moe_train.data.tokenizers.huggingface import HuggingFace, Marked

_SPLIT = re.compile("[" + "".join(PLAIN_TEXT_MARKS) + "]")


class _Encoded(NamedTuple):
    """A text in ids, with the index after the last id of each turn."""

    ids: list[int]
    loss_mask: list[bool]
    turn_ends: list[int]


def encode_texts(texts: list[Text], tokenizer: HuggingFace) -> list[list[Example]]:
    """Encode texts; ids that touch a trained span are trained on, unless they touch a random one.

    Returns:
        For each text one example, or one for each of its turns if the ids of a turn depend on what follows it.
    """
    results: list[list[Example]] = []
    for text, encoded in zip(texts, _encode(texts, tokenizer), strict=True):
        merged = None
        if text.turns:
            separate = None if _ends_in_control(encoded, tokenizer) else _encode(_separate(text), tokenizer)
            if separate is not None and not _continue_one_another(separate, encoded):
                results.append(_unmerged(separate, text.restart))
                continue
            merged = MergedTurns(tuple(encoded.turn_ends), _separate_tokens(text, encoded, tokenizer), text.restart)
        results.append([Example(encoded.ids, encoded.loss_mask, merged)])
    return results


def _ends_in_control(encoded: _Encoded, tokenizer: HuggingFace) -> bool:
    """Return whether every turn but the last ends in a control token, so that its ids cannot depend on what follows."""
    control_ids = tokenizer.control_ids
    return tokenizer.control_apart and all(encoded.ids[end - 1] in control_ids for end in encoded.turn_ends[:-1])


def _separate(text: Text) -> list[Text]:
    """Return a text for each turn: the conversation up to the turn."""
    separate = []
    first_span = 0
    for turn in text.turns:
        spans = text.trained_on[first_span : turn.num_spans]
        end = spans[-1][1] if spans else len(text.text)
        start = spans[0][0] if spans else end
        pieces = tuple(((first, last), on) for (first, last), on in text.pieces if start <= first and last <= end)
        # The ids of calls in the turns before stay marked as random, although nothing there is trained on.
        random = [span for span in text.random if span[1] <= end]
        own = text._replace(text=text.text[:end] + turn.after, trained_on=spans, random=random, pieces=pieces, turns=(turn,))
        separate.append(own)
        first_span = turn.num_spans
    return [
        # A text of one turn has only that turn's spans, so the turn ends with the last of them.
        text._replace(turns=(turn._replace(num_spans=len(text.trained_on)),))
        for text, turn in zip(separate, text.turns, strict=True)
    ]


def _continue_one_another(separate: list[_Encoded], merged: _Encoded) -> bool:
    """Return whether the ids of each separate turn, up to its end, are those of the merged turns."""
    for turn, end in zip(separate, merged.turn_ends, strict=True):
        (turn_end,) = turn.turn_ends
        if turn.ids[:turn_end] != merged.ids[:end]:
            return False
    return True


def _unmerged(separate: list[_Encoded], restart: str | None) -> list[Example]:
    """Return an example for each turn."""
    examples = []
    for turn in separate:
        merged = MergedTurns((len(turn.ids),), len(turn.ids), restart)
        examples.append(Example(turn.ids, turn.loss_mask, merged))
        restart = REWRITTEN
    return examples


def _separate_tokens(text: Text, encoded: _Encoded, tokenizer: HuggingFace) -> int:
    """Return the number of tokens of an example for each turn."""
    after = {turn.after for turn in text.turns[:-1]}
    num_after = {rest: len(tokenizer.encode_control(rest)) if rest else 0 for rest in after}
    # The last turn has no end here: all ids of the text count for it.
    ends = zip(encoded.turn_ends[:-1], text.turns, strict=False)
    return len(encoded.ids) + sum(end + num_after[turn.after] for end, turn in ends)


# --- ids ---------------------------------------------------------------------------------------------------------


def _encode(texts: list[Text], tokenizer: HuggingFace) -> list[_Encoded]:
    """Encode texts."""
    results = []
    encoded = tokenizer.encode_marked([_marked(text, tokenizer) for text in texts])
    for text, (ids, touched) in zip(texts, encoded, strict=True):
        mask = [False] * len(ids)
        # In this order, so that an id that touches a trained span and a random one is not trained on.
        covered = [True] * len(text.trained_on) + [trained_on for _, trained_on in text.pieces] + [False] * len(text.random)
        for (first, last), trained_on in zip(touched, covered, strict=True):
            mask[first:last] = [trained_on] * (last - first)
        first_piece = len(text.trained_on)
        of_pieces = zip(touched[first_piece:], text.pieces, strict=False)  # the ids of random spans come after them
        check_effective([(ids_of, on, _SPLIT.sub("", text.text[slice(*span)])) for ids_of, (span, on) in of_pieces], mask)
        turn_ends = [touched[turn.num_spans - 1][1] if turn.num_spans else len(ids) for turn in text.turns]
        results.append(_Encoded(ids, mask, turn_ends))
    return results


def _marked(text: Text, tokenizer: HuggingFace) -> Marked:
    """Move the marks: from around user text that looks like a control token to around the control tokens themselves."""
    pieces = _SPLIT.split(text.text)
    spans = text.trained_on + [span for span, _ in text.pieces] + text.random
    if len(pieces) > 1:  # translate positions in the text with marks to positions without
        marks = [end + i for i, end in enumerate(itertools.accumulate(map(len, pieces[:-1])))]
        spans = [(start - bisect.bisect_left(marks, start), end - bisect.bisect_left(marks, end)) for start, end in spans]
    return tokenizer.marked(pieces, spans)
