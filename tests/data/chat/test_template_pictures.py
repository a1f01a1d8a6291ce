"""Pictures through a chat template of Hugging Face's have the tokens of mistral-common, or are refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moe_train.data.chat.conversation_to_tokens import examples, rendered_prompt
from moe_train.data.records.normal_form import Conversation
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.hugging_face import small_tekken, write

IMAGE = {"image_patch_size": 2, "max_image_size": 8, "spatial_merge_size": 2}
PROCESSOR = {"patch_size": 2, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with pictures, in both forms, and two pictures."""
    directory = tmp_path_factory.mktemp("processor")
    write(directory, small_tekken(directory, "v7", vocab=300, image=IMAGE))
    (directory / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 8}, "patch_size": 2}))
    (directory / "processor_config.json").write_text(json.dumps(PROCESSOR))
    for name, size in (("a", (7, 4)), ("b", (20, 13))):
        pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"{name}.png")
    return directory


def conversation(folder: Path, *names: str) -> Conversation:
    pictures: list[dict[str, Any]] = [{"type": "image", "image": str(folder / f"{name}.png")} for name in names]
    first, *others = pictures
    asked = {"role": "user", "content": [first, {"type": "text", "text": "What is [IMG] this?"}, *others]}
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Red."}]
    return Conversation([asked, {"role": "assistant", "content": "A box."}, *more], [])


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_tokens_are_those_of_mistral_common(names: tuple[str, ...], folder: Path) -> None:
    tokenizer, served = HuggingFace(folder), Mistral(folder / "tekken.json")
    assert tokenizer.media == served.media
    record = conversation(folder, *names)
    (ours,), (expected,) = examples(record, tokenizer.chat_template, tokenizer), examples(record, None, served)
    assert (ours.tokens, ours.loss_mask, ours.media) == (expected.tokens, expected.loss_mask, expected.media)
    assert ours.media_files == expected.media_files and len(ours.media) == len(names)
    prompt = rendered_prompt(record.messages[:1], tokenizer.chat_template, tokenizer)
    assert prompt == rendered_prompt(record.messages[:1], None, served)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    record = conversation(folder, "a")
    write(tmp_path, folder / "tekken.json")
    for name, fields, fault in (
        ("preprocessor_config.json", None, "there is no preprocessor_config.json"),
        ("preprocessor_config.json", {"size": {"longest_edge": 8}}, "state no patch_size"),
        ("preprocessor_config.json", {"patch_size": 2, "size": {"height": 8}}, "state no size.longest_edge"),
        ("processor_config.json", {"image_token": "[PICTURE]"}, r"it has no token \[PICTURE\]"),
    ):
        if fields is not None:
            (tmp_path / name).write_text(json.dumps(fields))
        tokenizer = HuggingFace(tmp_path)
        with pytest.raises(ValueError, match=rf"the record has pictures.*{fault}.*tekken.json"):
            examples(record, tokenizer.chat_template, tokenizer)


def test_a_template_without_pictures_and_tools_beside_them_are_refused(folder: Path) -> None:
    tokenizer = HuggingFace(folder)
    record = conversation(folder, "a")
    template = "{% for m in messages %}{{ m.role }}{{ m.content if m.content is string else m.content[1].text }}</s>{% endfor %}"
    with pytest.raises(ValueError, match="writes 0 placeholders for the 1 pictures"):
        examples(record, template, tokenizer)
    tools = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]
    with pytest.raises(ValueError, match="pictures together with tools"):
        examples(record._replace(tools=tools), tokenizer.chat_template, tokenizer)
