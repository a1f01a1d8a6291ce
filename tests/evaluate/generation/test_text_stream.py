"""Text is shown when later tokens can no longer change it."""

from __future__ import annotations

from collections.abc import Sequence

from moe_train.evaluate.generation.completion import StopTexts
from moe_train.evaluate.generation.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


def pieces(text: str, *stops: str) -> list[str]:
    tokenizer: Bytes = Bytes()
    stream = TextStream(tokenizer, b"prompt ", StopTexts(tokenizer, stops) if stops else None)  # type: ignore[arg-type]
    tokens = text.encode()
    return [stream.add([token], is_last=i == len(tokens) - 1) for i, token in enumerate(tokens)]


def test_incomplete_characters_and_begun_stop_texts_wait() -> None:
    assert pieces("aé€") == ["a", "", "é", "", "", "€"]
    assert pieces("xENyEND", "END") == ["x", "", "", "ENy", "", "", ""]
    # What only looked like a stop text is shown at the end.
    assert pieces("xEN", "END") == ["x", "", "EN"]
    assert "".join(pieces("a\ufffd")) == "a\ufffd"
