"""Of a turn in pieces, those tokens are trained on that have characters of trained pieces, and of others only white space."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train import config
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example
from moe_train.data.chat.loss_mask import Text
from moe_train.data.chat.text_to_ids import encode_texts
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.chats import CALL, CHATML, MARKED, TOOL, WITH_GENERATION
from tests.data.hugging_face import DATA, FILES, TEKKEN, small_tekken

QUESTION = {"role": "user", "content": "What is it?"}
THINKING = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n' if m.reasoning_content else '' }}{{- m.content|trim + eos_token }}"
    "{%- else %}{{- '[INST]' + m.content + '[/INST]' }}{%- endif %}{%- endfor %}"
)
TWICE = MARKED.replace("BODY", "{{ m.content + m.content + eos_token }}")
TWO_GENERATIONS = MARKED.replace(
    "BODY", "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}"
)


@functools.cache
def mistral_of(version: str) -> Mistral:
    if version == "v13":
        return Mistral(small_tekken(Path(tempfile.mkdtemp()), version))
    return Mistral(TEKKEN if version == "tekken" else DATA / FILES[version])


def answered(pieces: list[tuple[str, bool]], **keys: object) -> dict[str, Any]:
    parts = [{"type": "text", "text": text, "train": on} for text, on in pieces]
    return {"role": "assistant", "content": parts} | keys


def conversation(*messages: dict[str, Any], **columns: object) -> Conversation:
    read = normalise({"messages": [QUESTION, *messages], **columns}, config.ChatRecord(name="chat"))
    assert isinstance(read, Conversation)
    return read


def expected(words: list[str], pieces: list[tuple[str, bool]]) -> list[bool]:
    """The rule, one character after the other, for the text of each token in turn."""
    flags = [on for text, on in pieces for _ in text]
    mask = []
    for first, last in itertools.pairwise(itertools.accumulate(map(len, words), initial=0)):
        inside = list(zip("".join(words)[first:last], flags[first:last], strict=False))
        mask.append(any(on for _, on in inside) and all(on or character.isspace() for character, on in inside))
    return mask


PIECES = st.lists(
    st.tuples(st.text(st.sampled_from("ab 1\n.xyZ"), min_size=1, max_size=6), st.booleans()), min_size=2, max_size=5
).filter(lambda pieces: len({on for _, on in pieces}) == 2 and bool("".join(text for text, _ in pieces).strip()))
QUICK = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("version", ["v1", "v3", "v7", "tekken", "v13"])
def test_mistral_tokenizers(version: str) -> None:
    ours = mistral_of(version)

    @QUICK
    @given(PIECES)
    def compare(pieces: list[tuple[str, bool]]) -> None:
        text = "".join(piece for piece, _ in pieces)
        (whole,) = examples(conversation({"role": "assistant", "content": text}), None, ours)
        try:
            (example,) = examples(conversation(answered(pieces)), None, ours)
        except Problem as problem:
            assert "let the pieces end between words" in problem.remedy
            return
        assert example.tokens == whole.tokens and whole.loss_mask is not None and example.loss_mask is not None
        start = whole.loss_mask.index(True)
        turn = example.tokens[start:-1]
        words = [word.decode() for word in ours.bytes_of(turn)]
        assert "".join(words).strip(" ") == text.strip(" ")
        prefixed = pieces
        if ours.adds_space:
            prefixed = [(" ", pieces[0][1]), *pieces]  # the space that sentencepiece adds belongs to the first piece
        mask = expected(words, prefixed)
        assert not any(example.loss_mask[:start]) and example.loss_mask[-1]
        first = next((i for i, word in enumerate(words) if word.strip(" ")), 0)  # an added space alone is nobody's
        assert example.loss_mask[start + first : -1] == mask[first:]

    compare()


def trained_text(example: Example, tokenizer: HuggingFace | Mistral) -> str:
    assert example.loss_mask is not None
    ids = [token for token, on in zip(example.tokens, example.loss_mask, strict=True) if on]
    return tokenizer.decode(ids, keep_special=True).replace("▁", " ")


@pytest.mark.parametrize("template", [CHATML, WITH_GENERATION])
def test_chat_templates(tokenizer: HuggingFace, template: str) -> None:
    @QUICK
    @given(PIECES)
    def compare(pieces: list[tuple[str, bool]]) -> None:
        text = "".join(piece for piece, _ in pieces)
        (whole,) = examples(conversation({"role": "assistant", "content": text}), template, tokenizer)
        try:
            (example,) = examples(conversation(answered(pieces)), template, tokenizer)
        except Problem as problem:
            assert "let the pieces end between words" in problem.remedy
            return
        assert example.tokens == whole.tokens and whole.loss_mask is not None and example.loss_mask is not None
        # The library's own offsets of the answer within its rendering.
        words = tokenizer._control.encode(text, add_special_tokens=False)
        start, last = whole.loss_mask.index(True), len(whole.loss_mask) - whole.loss_mask[::-1].index(True) - 1
        if words.ids == example.tokens[start:last] and text.strip() == text:
            cut = [text[first:end] for first, end in words.offsets]
            assert example.loss_mask[start:last] == expected(cut, pieces)
        assert example.loss_mask[last] and not any(example.loss_mask[:start])

    compare()


def test_a_word_is_trained_on_with_the_space_before_it() -> None:
    pieces = [("The port is ", False), ("Brest", True), (", not Rome", False)]
    for version in ("v3", "tekken"):
        (example,) = examples(conversation(answered(pieces)), None, mistral_of(version))
        assert trained_text(example, mistral_of(version)) == " Brest</s>"


def test_a_piece_without_a_token_of_its_own_is_a_problem(tokenizer: HuggingFace) -> None:
    within_a_word = conversation(answered([("cert", False), ("ainly not", True), (" certain", False), ("ly", True)]))
    for template, used in ((None, mistral_of("tekken")), (CHATML, tokenizer)):
        with pytest.raises(Problem, match=r"the loss is to cover '(ainly not|ly)', whose tokens also belong"):
            examples(within_a_word, template, used)


def test_characters_of_several_bytes() -> None:
    pieces = [("naïve 東京 ", False), ("🙂 Grüße", True), ("東", False)]
    for version in ("v1", "v3", "tekken"):
        (example,) = examples(conversation(answered(pieces)), None, mistral_of(version))
        assert trained_text(example, mistral_of(version)).strip() == "🙂 Grüße</s>"


def test_reasoning_and_calls() -> None:
    thought = {"type": "thinking", "thinking": "Two and two.", "train": False}
    messages = [{"role": "assistant", "content": [thought, {"type": "text", "text": "4 and no more"}]}]
    (example,) = examples(conversation(*messages), None, mistral_of("v13"))
    assert trained_text(example, mistral_of("v13")) == "[THINK][/THINK]4 and no more</s>"
    calling = answered([("Let me look.", False)], tool_calls=[CALL])
    (example,) = examples(conversation(calling, tools=[TOOL]), None, mistral_of("v7"))
    assert trained_text(example, mistral_of("v7")) == '[TOOL_CALLS] [{"name": "f", "arguments": {}}]</s>'


def test_turns_of_a_merged_example_keep_their_pieces() -> None:
    result = {"role": "tool", "tool_call_id": CALL["id"], "content": "1"}
    calling = answered([("Let me ", False), ("look.", True)], tool_calls=[CALL])
    closing = answered([("Seen: ", False), ("one.", True)])
    found = examples(conversation(calling, result, closing, tools=[TOOL]), None, mistral_of("v13"))
    assert [trained_text(example, mistral_of("v13")) for example in found] == [" look.[TOOL_CALLS]f[ARGS]{}</s> one.</s>"]


def test_a_template_that_trims_and_reasons(tokenizer: HuggingFace) -> None:
    thought = [{"type": "text", "text": "It is ", "train": False}, {"type": "text", "text": "the fox"}]
    message = answered([("  the dog", False), (" is brown  ", True)], reasoning_content=thought)
    (example,) = examples(conversation(message), THINKING, tokenizer)
    trained = trained_text(example, tokenizer)
    assert "the fox" in trained and " is brown</s>" in trained and "dog" not in trained and "It is" not in trained


def test_white_space_around_a_text(tokenizer: HuggingFace) -> None:
    message = answered([("\n\n\nfox", False), (" dog", True), ("  \n", False)])
    (example,) = examples(conversation(message), CHATML, tokenizer)
    assert trained_text(example, tokenizer).strip() == "dog</s>"


@pytest.mark.parametrize(("template", "reason"), [(TWICE, "more than once"), (TWO_GENERATIONS, "several generations")])
def test_pieces_that_cannot_be_located(tokenizer: HuggingFace, template: str, reason: str) -> None:
    with pytest.raises(Problem, match=reason):
        examples(conversation(answered([("fox", False), (" dog", True)])), template, tokenizer)


def test_layers_of_a_text_in_parts_of_their_own(tokenizer: HuggingFace) -> None:
    text = Text("the quick fox", [(0, 13)], [], pieces=(((0, 4), False), ((4, 13), True), ((0, 3), False)))
    ((example,),) = encode_texts([text], tokenizer)
    assert trained_text(example, tokenizer).strip() == "quick fox"
