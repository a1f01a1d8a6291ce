"""Tokens that touch spans of characters, found by offsets or counted from control tokens."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.hugging_face import copied


def test_ids_counted_from_control_tokens_are_those_that_touch_the_characters(tokenizer: HuggingFace) -> None:
    text = "one </s>[INST] [/INST]Grüße, 東京\n</s><s>"
    edges = [0, *sorted({at for found in tokenizer.special_pattern.finditer(text) for at in found.span()})]
    spans = [(start, stop) for start in edges for stop in edges if start < stop]
    marked = tokenizer.marked([text], spans)
    assert marked.edges is not None and len(marked.edges) == len(spans)
    assert tokenizer.encode_marked([marked]) == tokenizer.encode_marked([marked._replace(edges=None)])
    assert tokenizer.marked([text], [*spans, (1, 4)]).edges is None


def test_a_control_token_that_takes_space_is_not_counted_from(tokenizer: HuggingFace, tmp_path: Path) -> None:
    added = json.loads(tokenizer.files[0].read_text())["added_tokens"]
    taking = [token | {"rstrip": token["content"] == "[/INST]"} for token in added]
    changed = HuggingFace(copied(tokenizer, tmp_path / "t", added_tokens=taking))
    marked = changed.marked(["[INST]a[/INST] b</s>"], [(14, 20)])
    assert marked.edges is None
    [(ids, [(first, last)])] = changed.encode_marked([marked])
    assert changed.decode(ids[first:last], keep_special=True) == "[/INST]b</s>"
