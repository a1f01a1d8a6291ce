"""Where a stop text ends a continuation, in tokens and in text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moe_train.evaluate.generation.completion import StopTexts


class Letters:
    """A tokenizer of letters, for what `StopTexts` asks of one; token 0 is a long one."""

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return "".join("</end> more" if i == 0 else chr(i) for i in ids)


def stops(*texts: str) -> StopTexts:
    return StopTexts(Letters(), texts)  # type: ignore[arg-type]


def test_a_stop_text_is_found_where_it_ends_also_inside_a_token() -> None:
    prompt = [ord(c) for c in "ab</"]
    tokens = [ord(c) for c in "xyENDz"]
    assert stops("END", "zz").tokens_until_stop(prompt, tokens, 0) == 5
    assert stops("END").tokens_until_stop(prompt, tokens, 4) == 5
    assert stops("end").tokens_until_stop(prompt, tokens, 0) is None
    assert stops("</end>").tokens_until_stop(prompt, [*tokens, 0, 65], 0) == 7
    # A stop text that began in the prompt is not one.
    assert stops("</x").tokens_until_stop(prompt, tokens, 0) is None
    assert stops("END", "y").before_stop("xyENDz") == "x"
    assert stops().before_stop("xyENDz") == "xyENDz"
    with pytest.raises(ValueError, match="a stop text is empty"):
        stops("")
