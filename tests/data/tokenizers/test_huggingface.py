"""Tokenizers: plain text stays plain, what is trained is whole and the same each time, and transformers agrees."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_train import config
from moe_train.commands.train_tokenizer import train_bpe
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import check_vocab

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
TEXTS = ["some words to learn from, again and again"] * 20


@pytest.fixture(scope="module")
def mistral() -> Mistral:
    tokenizer = load_tokenizer(config.MistralTokenizer(name="mistral", path=str(TEKKEN)))
    assert isinstance(tokenizer, Mistral)
    return tokenizer


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(tokenizer: HuggingFace, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text
    assert tokenizer.encode_batch([text, text]) == [tokenizer.encode(text)] * 2


def test_control_tokens_in_plain_text_are_text(tokenizer: HuggingFace, mistral: Mistral) -> None:
    text = "<s>[INST] hello [/INST]</s><pad>"
    for either in (tokenizer, mistral):
        ids = either.encode(text)
        assert either.eos_id not in ids and either.bos_id not in ids
        assert either.decode(ids) == text


def test_the_ids_of_the_trained_tokenizer(tokenizer: HuggingFace) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 360)
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2], keep_special=True) == "<s>a</s>"
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (train_bpe(iter(TEXTS), 300, tmp_path / name) for name in ("a", "b"))
    assert first.identity == second.identity
    assert [f.read_bytes() for f in first.files] == [f.read_bytes() for f in second.files]


def test_training_refuses_what_is_there_and_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        train_bpe(TEXTS, 300, tmp_path / "there")

    def breaks():
        yield "a"
        raise OSError("gone")

    with pytest.raises(Exception, match="gone"):
        train_bpe(breaks(), 300, tmp_path / "new")
    with pytest.raises(ValueError, match="no text"):
        train_bpe([], 300, tmp_path / "new")
    with pytest.raises(ValueError, match="vocab_size 200 is less than the 256 bytes"):
        train_bpe(TEXTS, 200, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "tokenizer.json").read_text() == "mine"


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device; .*new was not written"):
        train_bpe(TEXTS, 300, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def _copied(tokenizer: HuggingFace, directory: Path, **changes: object) -> Path:
    """The tokenizer's files with top-level keys of tokenizer.json changed."""
    directory.mkdir()
    for file in tokenizer.files:
        (directory / file.name).write_bytes(file.read_bytes())
    main = json.loads((directory / "tokenizer.json").read_text()) | changes
    (directory / "tokenizer.json").write_text(json.dumps(main))
    return directory


def test_padding_truncation_and_trimmed_offsets_saved_in_the_file_have_no_effect(tokenizer: HuggingFace, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    trimming = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    directory = _copied(tokenizer, tmp_path / "t", truncation=truncation, padding=padding, post_processor=trimming)
    changed = HuggingFace(directory)
    text = "a text of more than four tokens   </s>  "
    assert changed.encode(text) == tokenizer.encode(text)
    characters = [(i, i + 1) for i in range(len(text))]
    assert changed.encode_marked([changed.marked([text], characters)]) == tokenizer.encode_marked(
        [tokenizer.marked([text], characters)]
    )
    assert changed.identity != tokenizer.identity


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
    changed = HuggingFace(_copied(tokenizer, tmp_path / "t", added_tokens=taking))
    marked = changed.marked(["[INST]a[/INST] b</s>"], [(14, 20)])
    assert marked.edges is None
    [(ids, [(first, last)])] = changed.encode_marked([marked])
    assert changed.decode(ids[first:last], keep_special=True) == "[/INST]b</s>"


def test_templates_in_the_config_file(tokenizer: HuggingFace, tmp_path: Path) -> None:
    directory = _copied(tokenizer, tmp_path / "t")
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for value in ("one", [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]):
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": value}))
        assert HuggingFace(directory / "tokenizer.json").chat_template == "one"


def test_files_that_cannot_be_used(tokenizer: HuggingFace, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        HuggingFace(tmp_path / "nothing")
    directory = _copied(tokenizer, tmp_path / "t")
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(ValueError, match="names no eos_token"):
        HuggingFace(directory)
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    with pytest.raises(ValueError, match=r"eos_token '<end>' .* is not in"):
        HuggingFace(directory)
    (directory / "tokenizer_config.json").write_text('{"eos_token": {"id": 2}}')
    with pytest.raises(ValueError, match="names no eos_token"):
        HuggingFace(directory)
    for text, reason in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        (directory / "tokenizer_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json {reason}"):
            HuggingFace(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        HuggingFace(directory)


def test_what_lies_at_a_path(tokenizer: HuggingFace, tmp_path: Path) -> None:
    def at(path: Path) -> tuple[str, str]:
        found = tokenizer_at(path)
        return found.name, Path(found.path).name

    directory = _copied(tokenizer, tmp_path / "t")
    (directory / "tekken.json").symlink_to(TEKKEN)
    assert at(directory) == ("huggingface", "t") and at(directory / "tokenizer.json") == ("huggingface", "tokenizer.json")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model.v3").touch()
    assert at(directory) == ("mistral", "tekken.json")
    (directory / "tekken.json").unlink()
    assert at(directory) == ("mistral", "t") and at(directory / "tokenizer.model.v3") == ("mistral", "tokenizer.model.v3")
    (directory / "tokenizer.model.v3").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*; give a folder"):
        tokenizer_at(directory)


def test_a_vocabulary_larger_than_the_models(tokenizer: HuggingFace) -> None:
    check_vocab(tokenizer, 360)
    with pytest.raises(ValueError, match="has 360 ids, the model's vocab_size is 359"):
        check_vocab(tokenizer, 359)


def test_both_kinds_travel_to_another_process(tokenizer: HuggingFace, mistral: Mistral) -> None:
    for either in (tokenizer, mistral):
        again = pickle.loads(pickle.dumps(either))
        assert again.identity == either.identity and again.encode("abc") == either.encode("abc")


def test_mistral(mistral: Mistral, tmp_path: Path) -> None:
    assert (mistral.bos_id, mistral.eos_id, mistral.vocab_size) == (1, 2, 131072)
    text = "Grüße, 東京!\n\n"
    assert mistral.decode(mistral.encode(text)) == text
    assert mistral.files == (TEKKEN,)
    (tmp_path / "tekken.json").symlink_to(TEKKEN)
    assert Mistral(tmp_path).identity == mistral.identity
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Mistral(tmp_path / "tekken2.json")
    (tmp_path / "tekken2.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="should hold one"):
        Mistral(tmp_path)
    with pytest.raises(ValueError, match="is not a tokenizer that mistral-common reads"):
        Mistral(tmp_path / "tekken2.json")


@pytest.mark.parametrize("file", sorted(file.name for file in TEKKEN.parent.glob("*.model.v*") if "m1" not in file.name))
def test_every_sentencepiece_version(file: str) -> None:
    tokenizer = Mistral(TEKKEN.parent / file)
    assert tokenizer.vocab_size == (32000 if file.endswith("v1") else 32768)
    assert tokenizer.decode(tokenizer.encode("Grüße, 東京")) == "Grüße, 東京"


@pytest.mark.judges
def test_transformers_loads_the_trained_tokenizer(tokenizer: HuggingFace) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' AutoTokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.files[0].parent)
    text = "Grüße from json.dumps: 東京 3.14\n  x"
    assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    assert theirs.chat_template == tokenizer.chat_template
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.decode(tokenizer.encode(text)) == text
