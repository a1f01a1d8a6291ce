"""Long texts are split only where their ids stay the same, and a stretch that cannot be split is refused at once."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.stretches import stretches_of_json, words_of_vocabulary
from tests.data import hugging_face

BITS = [
    *"a The x1 é 日本 Ж 🙂 _ foo_ 9 0.5 's don't ( ); … 。 // </s> [INST] [/INST] ▁ ½ ß ǅ \u0301 가 न ि ﬁ \u200b \ufeff".split(),
    *("  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\x85"),
]
KINDS = ("byte-level", "tekken.json", "v3", "v3 as json", "v1 of transformers", "tekken as json")


def drawn(rng: random.Random, size: int) -> str:
    return "".join(rng.choice(BITS) + rng.choice(["", " ", " ", "\n"]) for _ in range(size))


@pytest.fixture(scope="module")
def paths(tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("tekken", "v3", "v1"):
        (root / name).mkdir()
    small = hugging_face.small_tekken(root, "v3")
    hugging_face.write(root / "tekken", small)
    hugging_face.write(root / "v3", hugging_face.V3)
    hugging_face.write(root / "v1", hugging_face.V3)
    described = json.loads((root / "v1" / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    described["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    (root / "v1" / "tokenizer.json").write_text(json.dumps(described | {"pre_tokenizer": None}))
    return dict(zip(KINDS, (tokenizer.path, small, hugging_face.V3, root / "v3", root / "v1", root / "tekken"), strict=True))


def loaded(path: Path, longest: int) -> HuggingFace | Mistral:
    return Mistral(path, longest) if path.is_file() and path.name != "tokenizer.json" else HuggingFace(path, longest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_the_parts_are_those_of_the_text(paths: dict[str, Path], kind: str) -> None:
    rng = random.Random(kind)
    in_parts, at_once = loaded(paths[kind], 60), loaded(paths[kind], 1 << 20)
    split = 0
    for _ in range(400):
        text = drawn(rng, rng.randrange(20, 120))
        try:
            ids = in_parts.encode(text)
        except Problem:  # it has a long stretch without a place
            continue
        split += len(text) > 60
        assert ids == at_once.encode(text), text
    assert split > 100


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "json" in kind or "level" in kind or "transformers" in kind])
def test_spans_are_the_same_in_parts(paths: dict[str, Path], kind: str) -> None:
    if kind == "tekken.json":
        return  # mistral-common writes no control tokens from text
    rng = random.Random(kind)
    in_parts, at_once = HuggingFace(paths[kind], 60), HuggingFace(paths[kind])
    split = 0
    for number in range(120):
        pieces = [drawn(rng, rng.randrange(3, 50)) for _ in range(rng.randrange(1, 5))]
        spans = [tuple(sorted(rng.choices(range(len("".join(pieces)) + 1), k=2))) for _ in range(4)]
        if number % 2:
            ends = [match.end() for match in at_once.special_pattern.finditer(pieces[0])]
            spans = list(itertools.pairwise(ends))
        marked = at_once.marked(pieces, spans)
        try:
            encoded = in_parts.encode_marked([marked])
        except Problem:
            continue
        split += len(marked.text) > 60
        assert encoded == at_once.encode_marked([marked]), (pieces, spans)
    assert split > 8


def test_the_parts_of_a_message_of_mistral_common(paths: dict[str, Path]) -> None:
    text = "The quick brown fox.\n" * 20
    for kind in ("v3", "tekken.json"):
        ids = [
            loaded(paths[kind], longest).finetuning.instruct_tokenizer.tokenizer.encode(text, bos=True, eos=True)  # type: ignore[union-attr]
            for longest in (30, 1 << 20)
        ]
        assert ids[0] == ids[1] and ids[0][0] == 1 and ids[0][-1] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stretch_of_megabytes_is_refused_at_once(paths: dict[str, Path], kind: str) -> None:
    tokenizer = loaded(paths[kind], 1 << 16)
    begun = time.process_time()
    for unit in ("a", "ab", " ", "\n", "7", "🙂", "x+/", "好"):
        text = "Words and then " + unit * 5_000_000
        with pytest.raises(Problem, match=r"characters; the tokenizer takes 65,536 at once, .*--longest-stretch") as caught:
            tokenizer.encode_batch(["short", text])
        assert caught.value.rule == "stretch"
    assert time.process_time() - begun < 3


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"added_tokens": [{"content": "New York"}]},
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": {"type": "BPE", "vocab": {}, "end_of_word_suffix": "</w>"}},
    ],
)
def test_other_tokenizers_are_split_nowhere(change: dict[str, Any]) -> None:
    described = {
        "model": {"type": "BPE", "vocab": {}},
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    }
    assert stretches_of_json(9, described).cut is not None
    assert stretches_of_json(9, described | change).cut is None


def test_a_vocabulary_with_spaces_within_pieces_is_split_nowhere() -> None:
    assert words_of_vocabulary(9, ["▁a", "▁▁", "b"], adds_space=True).parts("aa bb cc dd") == ["aa bb", "cc dd"]
    with pytest.raises(Problem, match="splits texts nowhere for certain"):
        words_of_vocabulary(9, ["▁a", "of▁the"], adds_space=True).parts("aa bb cc dd")
