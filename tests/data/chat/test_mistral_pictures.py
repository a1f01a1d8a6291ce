"""Conversations with pictures against mistral-common, whose own encoder needs OpenCV for the pixels, which are stubbed here."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers import image as theirs
from PIL import Image

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.chat import mistral
from moe_train.data.chat.conversation_to_tokens import examples, render_prompt, rendered_prompt
from moe_train.data.chat.example import fitting_tokens
from moe_train.data.chat.mistral_pictures import picture_files
from moe_train.data.records.normal_form import Conversation
from moe_train.data.records.problem import Problem
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.hugging_face import small_tekken

SIZES = {"image_patch_size": 14, "max_image_size": 140, "spatial_merge_size": 2}
TEXT = {"type": "text", "text": "What is this?"}
ANSWER = {"role": "assistant", "content": "A picture."}


@pytest.fixture(scope="module", params=["v7", "v11", "v13"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mistral:
    return Mistral(small_tekken(tmp_path_factory.mktemp("tokenizer"), request.param, vocab=300, image=SIZES))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A file, and a data URL."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    parts = []
    for number, (height, width) in enumerate(((200, 90), (30, 57))):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        image.save(folder / f"{number}.png")
        parts.append({"type": "image", "image": str(folder / f"{number}.png")})
    parts[1]["image"] = f"data:image/png;base64,{base64.b64encode((folder / '1.png').read_bytes()).decode()}"
    return parts


def chunk(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    url = part["image"] if part["image"].startswith("data:") else f"file://{part['image']}"
    return {"type": "image_url", "image_url": url}


def by_mistral_common(tokenizer: Mistral, messages: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(theirs, "transform_image", lambda image, size: np.zeros((3, size[1], size[0])))
    converted = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [chunk(part) for part in content]
        converted.append({"role": message["role"], "content": content})
    request: Any = ChatCompletionRequest.model_validate({"messages": converted})
    return tokenizer.finetuning.encode_chat_completion(request).tokens


def orders(pictures: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    first, second = pictures
    return [[first, TEXT], [TEXT, first], [TEXT, first, TEXT, second], [first, second, TEXT], [second]]


@pytest.mark.parametrize("order", range(5))
def test_tokens_equal_those_of_mistral_common(
    tokenizer: Mistral, pictures: list[dict[str, Any]], order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = orders(pictures)[order]
    messages = [{"role": "user", "content": content}, ANSWER, {"role": "user", "content": [pictures[1], TEXT]}, ANSWER]
    (example,) = examples(Conversation(messages, []), None, tokenizer)
    assert example.tokens == by_mistral_common(tokenizer, messages, monkeypatch)
    assert example.loss_mask is not None and tokenizer.pictures is not None
    trained = {token for token, is_trained in zip(example.tokens, example.loss_mask, strict=True) if is_trained}
    assert trained and trained.isdisjoint(tokenizer.pictures.control_ids)
    # Pictures are in the order of their tokens, whose number follows from each one's size.
    sizes = []
    for data in example.pictures:
        with Image.open(io.BytesIO(data)) as image:
            sizes.append(len(tokenizer.pictures.tokens(tokenizer.pictures.grid(*image.size))))
    assert tokenizer.pictures.sizes_in(example.tokens) == sizes
    assert len(example.picture_files) == sum(part is pictures[0] for part in content)
    prompt = rendered_prompt(messages[:1], None, tokenizer)
    assert example.tokens[: len(prompt.tokens)] == prompt.tokens and prompt.pictures == example.pictures[:-1]
    with pytest.raises(Problem, match="not shown to the model here"):
        render_prompt(messages[:1], None, tokenizer)


def test_pictures_and_tools_share_a_conversation(
    tokenizer: Mistral, pictures: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each example has the pictures of its tokens, and ends where mistral-common's encoding up to its last turn ends."""
    rules = tokenizer.pictures
    assert rules is not None
    tools = [{"type": "function", "function": {"name": "read", "parameters": {}}}]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "read", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [pictures[0], TEXT]},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "12"},
        ANSWER,
        {"role": "user", "content": [TEXT, pictures[1]]},
        ANSWER,
    ]
    found = mistral.examples(Conversation(messages, tools), tokenizer)
    monkeypatch.setattr(theirs, "transform_image", lambda image, size: np.zeros((3, size[1], size[0])))
    converted = [
        message | {"content": [chunk(part) for part in message["content"]]} if isinstance(message["content"], list) else message
        for message in messages
    ]
    request = ChatCompletionRequest.model_validate({"messages": converted, "tools": tools})
    assert found[-1].tokens == tokenizer.finetuning.encode_chat_completion(request).tokens
    counts = []
    for example in found:
        sizes = []
        for data in example.pictures:
            with Image.open(io.BytesIO(data)) as image:
                sizes.append(len(rules.tokens(rules.grid(*image.size))))
        assert rules.sizes_in(example.tokens) == sizes and example.picture_files == (pictures[0]["image"],)
        assert example.merged is not None and not example.merged.may_be_cut and fitting_tokens(example.merged, 10**6) == 0
        counts.append(len(sizes))
    # The tools stand before the last question up to v11, so turns before it have examples of their own.
    assert counts[-1] == 2 and (counts == [2] or counts[0] == 1)
    prompt = rendered_prompt(messages[:3], None, tokenizer, tools)
    assert len(prompt.pictures) == 1 and any(prompt.tokens == example.tokens[: len(prompt.tokens)] for example in found)


def test_what_has_no_place_for_pictures_refuses_them(tokenizer: Mistral, pictures: list[dict[str, Any]], tmp_path: Path) -> None:
    seen = Conversation([{"role": "user", "content": pictures[:1]}, ANSWER], [])
    assert picture_files(seen) == [pictures[0]["image"]]
    blind = Mistral(small_tekken(tmp_path, "v7", vocab=300))
    with pytest.raises(Problem, match="states no sizes for them"):
        mistral.examples(seen, blind)
    with pytest.raises(Problem, match=r"name the model's tekken.json"):
        examples(seen, "{{ messages }}", train_tokenizer(["a text"] * 3, 270, tmp_path / "tokenizer"))
    missing = Conversation([{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "none.png")}]}, ANSWER], [])
    with pytest.raises(Problem, match="there is no picture"):
        mistral.examples(missing, tokenizer)
