"""Chat templates next to a tokenizer.json: in the config file, in a file, in a folder of templates with names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.data.chat.sandbox import render
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.hugging_face import copied


def test_templates_in_the_config_file(tokenizer: HuggingFace, tmp_path: Path) -> None:
    directory = copied(tokenizer, tmp_path / "t")
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for value in ("one", [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}]):
        (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": value}))
        assert HuggingFace(directory / "tokenizer.json").chat_template == "one"


def test_the_template_for_tools(tokenizer: HuggingFace, tmp_path: Path) -> None:
    default, tool_use = "\n  {% if x %}\na{% endif %}\n\n", "  \n{% set tools = 1 %}b \n"
    expected = [render(text, [{"x": 1}])[0] for text in (default, tool_use)]
    for place in ("config", "folder", "both"):
        directory = copied(tokenizer, tmp_path / place)
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        named = [{"name": "default", "template": default}, {"name": "tool_use", "template": tool_use}]
        (directory / "chat_template.jinja").unlink()
        if place != "config":
            (directory / "chat_template.jinja").write_text(default)
            (directory / "additional_chat_templates").mkdir()
            (directory / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
            named = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "old"}]
        if place != "folder":
            (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
        loaded = HuggingFace(directory)
        assert loaded.chat_template is not None
        assert render(loaded.chat_template, [{"x": 1, "tools": None}, {"x": 1, "tools": [{}]}]) == expected
        assert (directory / "additional_chat_templates" / "tool_use.jinja" in loaded.files) == (place != "config")
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    alone = HuggingFace(directory).chat_template
    with pytest.raises(ValueError, match="there is no chat template for conversations without tools"):
        render(str(alone), [{"tools": None}])
