"""Records from the graded answers of a small model: what is written, and what is refused before anything is generated."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jax
import pytest

from moe_train import config
from moe_train.commands import write_and_prove
from moe_train.commands.synthesize import SynthesisOptions, read_grader, synthesize
from moe_train.data.records.conversation import read
from moe_train.data.records.normal_form import PreferencePair
from moe_train.data.records.recognise import recognise
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.evaluate.suites import answer
from moe_train.evaluate.suites.generation import GeneratedText, TextOptions
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model

SUITE = """
name: words
items: items.jsonl
prompt: {chat: false, template: "{question}"}
generation: {max_tokens: 6, stop: ["e"]}
grader: {name: exact}
"""


CALLS = [
    '<tool_call>{"name": "look", "arguments": {"at": "fox"}}</tool_call>',
    '<tool_call>{"arguments": {"at": "fox"}, "name": "look"}</tool_call>',
    'Well.\n<tool_call>{"name": "look", "arguments": {"at": "dog"}}</tool_call>',
    '<tool_call>{"name": "look", "arguments": {"at": "fox"}}</tool_call> and more',
    "I cannot.",
]


@pytest.fixture(autouse=True)
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one letter in place of the model's, the last of each five cut off; the generator has tests of its own."""

    def generate(
        model: object, tokenizer: object, prompts: list[list[int]], options: TextOptions, *_: object
    ) -> list[GeneratedText]:
        rng = random.Random(options.generation.seed)
        assert options.generation.temperature == 1.0
        texts = CALLS if options.keep_special else list("abcdefgh")
        return [GeneratedText((), rng.choice(texts), i % 5 < 4) for i in range(len(prompts))]

    monkeypatch.setattr(answer, "generate_answers", generate)


@pytest.fixture(scope="module")
def teacher(small_tokenizer: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    with jax.set_mesh(ONE):
        _, weights = random_model(MIXTRAL)
        # A prompt with tools has some hundred tokens of this tokenizer.
        model = MIXTRAL.model_copy(update={"max_seq_len": 1024})
        write_and_prove.export_model(
            weights, model, folder, write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(small_tokenizer))
        )
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    items = [{"id": f"q{i}", "question": q, "answer": ["a", "b", "c"]} for i, q in enumerate(("the quick", "brown fox"))]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "words.yaml").write_text(SUITE)
    return tmp_path / "words.yaml"


@pytest.mark.parametrize("form", ["sft", "pairs", "kto"])
def test_records_are_read_without_a_section_of_their_own(form: str, teacher: Path, suite: Path, tmp_path: Path) -> None:
    options = SynthesisOptions(12, form)  # type: ignore[arg-type]
    result = synthesize(suite, teacher, tmp_path / "out", options)
    assert result["answers"] == 24 == sum(result[name] for name in ("accepted", "rejected", "repeated", "unfinished", "empty"))
    assert result["accepted"] and result["rejected"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(lines) == result["records"]
    kinds = {"sft": "chat", "pairs": "preference", "kto": "labelled"}
    for line in lines:
        record = recognise(line)
        assert record.name == kinds[form]
        reading = read(line, record)
        assert not reading.unread
    origins = [json.loads(line) for line in (tmp_path / "out" / "origins.jsonl").read_text().splitlines()]
    assert [origin["line"] for origin in origins] == list(range(1, len(lines) + 1))
    assert {origin["where"] for origin in origins} <= {f"{tmp_path}/items.jsonl:{n}" for n in (1, 2)}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["teacher"]["sha256"] and manifest["generation"]["stop"] == ["e"]
    if form == "sft":
        again = synthesize(suite, teacher, tmp_path / "again", options)
        other = synthesize(suite, teacher, tmp_path / "other", options._replace(seed=1))
        assert again["records"] == result["records"] and other["answers"] == 24
        records = [(tmp_path / name / "records.jsonl").read_text() for name in ("out", "again", "other")]
        assert records[0] == records[1] != records[2]


def test_answers_that_call_tools(teacher: Path, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "system", "content": "Look."}, {"role": "user", "content": "the quick"}]
    item = {"messages": turns, "tools": [tool], "tool_calls": [{"name": "look", "arguments": {"at": "fox"}}]}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    options = SynthesisOptions(20, "pairs", "tool_calls", max_tokens=6, chat_template="chatml")
    result = synthesize(tmp_path / "items.jsonl", teacher, tmp_path / "out", options)
    assert result["accepted"] == 1 and result["rejected"] == 2 and result["not_written"] and result["records"] == 1
    (line,) = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    record = recognise(json.loads(line))
    pair = read(json.loads(line), record).record
    assert isinstance(pair, PreferencePair) and pair.prompt.messages == turns and pair.prompt.tools
    (call,) = pair.chosen[0]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"at": "fox"}'}
    assert pair.rejected[0]["content"] in ("I cannot.", "Well.")


def test_what_is_refused(teacher: Path, suite: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    with pytest.raises(ValueError, match=r"is a file of items, which names no grader; state --keep"):
        synthesize(items, teacher, tmp_path / "out")
    with pytest.raises(ValueError, match=r"items.jsonl:1: the item has 0 choices"):
        synthesize(suite, teacher, tmp_path / "out", SynthesisOptions(grader="choice"))
    with pytest.raises(ValueError, match=r"items.jsonl:1: .*number"):
        synthesize(suite, teacher, tmp_path / "out", SynthesisOptions(2, grader="number"))
    assert not (tmp_path / "out").exists()


def test_graders_on_the_command_line() -> None:
    assert read_grader("number") == config.NumberGrader(name="number")
    assert read_grader("{name: number, after: '####'}") == config.NumberGrader(name="number", after="####")
    for text in ("nothing", "{name: number, befor: x}", "[1", "7"):
        with pytest.raises(ValueError, match=r"^--keep .*; state a name such as number") as refused:
            read_grader(text)
        assert "\n" not in str(refused.value)
