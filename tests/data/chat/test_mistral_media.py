"""Conversations with pictures or sound against mistral-common, whose own reading of files (OpenCV, soundfile) is stubbed."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers import image as theirs
from mistral_common.tokens.tokenizers.audio import Audio
from PIL import Image

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.chat import mistral
from moe_train.data.chat.conversation_to_tokens import examples, render_prompt, rendered_prompt
from moe_train.data.chat.example import fitting_tokens
from moe_train.data.chat.mistral_media import media_files
from moe_train.data.media import media_of_piece
from moe_train.data.pictures.rules import PictureRules
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.sound.read import samples_of
from moe_train.data.tokenizers.mistral import Mistral
from tests.commands.audio_wrapper import AUDIO, tone, wav
from tests.data.hugging_face import small_tekken

SIZES = {"image_patch_size": 14, "max_image_size": 140, "spatial_merge_size": 2}
TEXT = {"type": "text", "text": "What is this?"}
ANSWER = {"role": "assistant", "content": "A picture."}
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "read", "arguments": "{}"}}
KINDS = {"image": {"image": SIZES}, "audio": {"audio": AUDIO}}
"""Kinds of parts, and the section of a tekken.json that states how they become tokens."""


@pytest.fixture(scope="module", params=[(kind, version) for kind in KINDS for version in ("v7", "v11", "v13")], ids="-".join)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    kind, version = request.param
    return Mistral(small_tekken(tmp_path_factory.mktemp("tokenizer"), version, vocab=300, **KINDS[kind]))


def kind_of(tokenizer: Mistral) -> str:
    return "image" if isinstance(tokenizer.media, PictureRules) else "audio"


def parts_of(kind: str, folder: Path) -> list[dict[str, Any]]:
    """A file and a data URL: pictures of several tokens, or clips of two chunks and of one."""
    contents = []
    if kind == "audio":
        contents = [wav(tone(300, 0.4)), wav(tone(600, 0.1))]
    else:
        draw = np.random.default_rng(0)
        for height, width in ((200, 90), (30, 57)):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
            contents.append(file.getvalue())
    (folder / "first").write_bytes(contents[0])
    url = f"data:{kind};base64,{base64.b64encode(contents[1]).decode()}"
    return [{"type": kind, kind: str(folder / "first")}, {"type": kind, kind: url}]


@pytest.fixture
def parts(tokenizer: Mistral, tmp_path: Path) -> list[dict[str, Any]]:
    return parts_of(kind_of(tokenizer), tmp_path)


@pytest.fixture(autouse=True)
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mistral-common read files without OpenCV and soundfile."""

    def of_bytes(data: bytes) -> Audio:
        return Audio(samples_of(data, 16000), 16000, "wav")

    monkeypatch.setattr(theirs, "transform_image", lambda image, size: np.zeros((3, size[1], size[0])))
    monkeypatch.setattr(Audio, "_check_valid", lambda self: None)
    monkeypatch.setattr(Audio, "from_file", staticmethod(lambda file: of_bytes(Path(file.removeprefix("file://")).read_bytes())))
    monkeypatch.setattr(Audio, "from_base64", staticmethod(lambda text: of_bytes(base64.b64decode(text.partition(",")[2]))))


def chunk(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return part
    url = part[kind] if part[kind].startswith("data:") or kind == "audio" else f"file://{part[kind]}"
    return {"type": f"{kind}_url", f"{kind}_url": url}


def by_mistral_common(tokenizer: Mistral, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
    converted = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [chunk(part) for part in content]
        converted.append(message | {"content": content})
    request: Any = ChatCompletionRequest.model_validate({"messages": converted, "tools": tools})
    return tokenizer.finetuning.encode_chat_completion(request).tokens


def sizes_of(tokenizer: Mistral, files: tuple[bytes, ...]) -> list[int]:
    """The tokens of each file by its own size."""
    rules = tokenizer.media
    assert rules is not None
    if not isinstance(rules, PictureRules):
        return [len(rules.tokens(len(samples_of(data, 16000)))) for data in files]
    sizes = []
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            sizes.append(len(rules.tokens(rules.grid(*image.size))))
    return sizes


def orders(parts: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    first, second = parts
    return [[first, TEXT], [TEXT, first], [TEXT, first, TEXT, second], [first, second, TEXT], [second]]


@pytest.mark.parametrize("order", range(5))
def test_tokens_equal_those_of_mistral_common(tokenizer: Mistral, parts: list[dict[str, Any]], order: int) -> None:
    content = orders(parts)[order]
    messages = [{"role": "user", "content": content}, ANSWER, {"role": "user", "content": [parts[1], TEXT]}, ANSWER]
    (example,) = examples(Conversation(messages, []), None, tokenizer)
    assert example.tokens == by_mistral_common(tokenizer, messages)
    assert example.loss_mask is not None and tokenizer.media is not None
    trained = {token for token, is_trained in zip(example.tokens, example.loss_mask, strict=True) if is_trained}
    assert trained and trained.isdisjoint(tokenizer.media.control_ids)
    # Files are in the order of their tokens, whose number follows from each one's size.
    assert tokenizer.media.sizes_in(example.tokens) == sizes_of(tokenizer, example.media)
    assert len(example.media_files) == sum(part is parts[0] for part in content)
    prompt = rendered_prompt(messages[:1], None, tokenizer)
    assert example.tokens[: len(prompt.tokens)] == prompt.tokens and prompt.media == example.media[:-1]
    with pytest.raises(Problem, match="not shown to the model here"):
        render_prompt(messages[:1], None, tokenizer)


def test_files_and_tools_share_a_conversation(tokenizer: Mistral, parts: list[dict[str, Any]]) -> None:
    """Each example has the files of its tokens, and ends where mistral-common's encoding up to its last turn ends."""
    rules = tokenizer.media
    assert rules is not None
    messages = [
        {"role": "user", "content": [parts[0], TEXT]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "12"},
        ANSWER,
        {"role": "user", "content": [TEXT, parts[1]]},
        ANSWER,
    ]
    found = mistral.examples(Conversation(messages, TOOLS), tokenizer)
    assert found[-1].tokens == by_mistral_common(tokenizer, messages, TOOLS)
    counts = []
    for example in found:
        sizes = sizes_of(tokenizer, example.media)
        assert rules.sizes_in(example.tokens) == sizes and example.media_files == (parts[0][kind_of(tokenizer)],)
        # As many patches or chunks as the tokens have room for.
        media = media_of_piece(example.media, rules)
        assert media is not None and len(media.units) == rules.room(example.tokens)
        assert example.merged is not None and not example.merged.may_be_cut and fitting_tokens(example.merged, 10**6) == 0
        counts.append(len(sizes))
    # The tools stand before the last question up to v11, so turns before it have examples of their own.
    assert counts[-1] == 2 and (counts == [2] or counts[0] == 1)
    prompt = rendered_prompt(messages[:3], None, tokenizer, TOOLS)
    assert len(prompt.media) == 1 and any(prompt.tokens == example.tokens[: len(prompt.tokens)] for example in found)


def test_system_turns_and_several_questions(tokenizer: Mistral, parts: list[dict[str, Any]]) -> None:
    """mistral-common decides where a system text stands, and refuses one beside sound up to version 11."""
    messages = [
        {"role": "system", "content": "Answer in a word."},
        {"role": "user", "content": [parts[0], TEXT]},
        ANSWER,
        {"role": "user", "content": "And the other?"},
        ANSWER,
        {"role": "user", "content": [TEXT, parts[1], parts[0]]},
        ANSWER,
    ]
    try:
        expected = by_mistral_common(tokenizer, messages)
    except Exception as error:
        assert kind_of(tokenizer) == "audio" and "system" in str(error).lower()
        with pytest.raises(Problem, match=r"(?i)system") as caught:
            examples(Conversation(messages, []), None, tokenizer)
        assert "\n" not in str(caught.value)
        return
    (example,) = examples(Conversation(messages, []), None, tokenizer)
    assert example.tokens == expected and len(example.media) == 3
    assert tokenizer.media is not None and tokenizer.media.sizes_in(example.tokens) == sizes_of(tokenizer, example.media)


def test_what_has_no_place_for_files_refuses_them(tokenizer: Mistral, parts: list[dict[str, Any]], tmp_path: Path) -> None:
    kind = kind_of(tokenizer)
    shown = Conversation([{"role": "user", "content": parts[:1]}, ANSWER], [])
    assert media_files(shown.messages) == (parts[0][kind],)
    plain = Mistral(small_tekken(tmp_path, "v7", vocab=300))
    with pytest.raises(Problem, match="states no sizes for them" if kind == "image" else "states no chunks for it"):
        mistral.examples(shown, plain)
    with pytest.raises(Problem, match=r"name the model's tekken.json"):
        examples(shown, "{{ messages }}", train_tokenizer(["a text"] * 3, 270, tmp_path / "tokenizer"))
    missing = Conversation([{"role": "user", "content": [{"type": kind, kind: str(tmp_path / "none")}]}, ANSWER], [])
    with pytest.raises(Problem, match=f"there is no {'picture' if kind == 'image' else 'sound'}"):
        mistral.examples(missing, tokenizer)
    (tmp_path / "second").mkdir()
    (other,) = parts_of("audio" if kind == "image" else "image", tmp_path / "second")[:1]
    with pytest.raises(Problem, match="sound and pictures, which no model takes together"):
        examples(Conversation([{"role": "user", "content": [*parts, other]}, ANSWER], []), None, tokenizer)
    with pytest.raises(Problem, match="states no"):
        examples(Conversation([{"role": "user", "content": [other]}, ANSWER], []), None, tokenizer)


def test_samples_are_those_of_mistral_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("soundfile")
    monkeypatch.undo()
    for clip in parts_of("audio", tmp_path):
        reference = clip["audio"]
        is_url = reference.startswith("data:")
        data = base64.b64decode(reference.partition(",")[2]) if is_url else Path(reference).read_bytes()
        expected = Audio.from_base64(reference) if is_url else Audio.from_file(reference)
        assert np.array_equal(samples_of(data, 16000), expected.audio_array)
