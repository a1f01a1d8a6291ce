"""Records of every kind, good and bad, and the answer of the check on files of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_train import config
from moe_train.data.check.check import check_data
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral

Write = Callable[..., Path]
USER = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
CHAT = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = {
    "messages": [
        USER,
        {
            "role": "assistant",
            "tool_calls": [{"id": "aaaaaaaa1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "aaaaaaaa1"},
        ANSWER,
    ],
    "tools": [TOOL],
}
KINDS = [{"text": "The quick brown fox"}, CHAT, {"question": "2 + 3?", "answer": "5"}, {"prompt": "a", "completion": "b"}]
# A line of a file and the rule that it breaks.
LINES: list[tuple[bytes, str | None]] = [
    (b'{"text": "a"}', None),
    (b'{"text": "a"', "not-json"),
    (b"[1, 2]", "not-a-record"),
    (b"", None),
    (b'{"text": "\xff"}', "not-utf-8"),
    (b'{"text": "a\\ud800"}', "unicode"),
    (b'{"text": 3}', "type"),
    (b'{"text": ""}', "empty-text"),
    (b'{"text": "a", "content": "b"}', "text-and-content"),
    (b'{"body": "a"}', "columns"),
    (b'{"text": "x </s> y"}', "control-token"),
    (json.dumps({"messages": [USER | {"role": "narrator"}, ANSWER]}).encode(), "role"),
    (json.dumps({"messages": [USER, ANSWER | {"content": ""}]}).encode(), "empty-assistant"),
    (json.dumps({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}).encode(), "system-first"),
    (json.dumps({"messages": [USER, USER, ANSWER]}).encode(), "role-order"),
    (json.dumps({"messages": [USER, ANSWER, USER]}).encode(), "last-turn"),
    (json.dumps({"messages": [USER, ANSWER | {"weight": 2}]}).encode(), "weight"),
    (json.dumps({"messages": [USER, ANSWER | {"weight": 0}]}).encode(), "no-loss"),
    (json.dumps({"messages": [USER, ANSWER | {"content": "word " * 200}]}).encode(), "too-long"),
    (json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}).encode(), "pair"),
]


def varied(count: int) -> list[dict[str, Any]]:
    """Records of every kind, some bad, some twice."""
    records: list[dict[str, Any]] = []
    for n in range(count):
        text = " ".join(f"word{(n * k * k) % 997}" for k in range(5 + n % 60))
        kinds = [
            {"text": text},
            {"messages": [USER | {"content": text}, ANSWER | {"content": text[::-1]}]},
            {"messages": [USER, USER | {"content": text}, ANSWER]},
            {"question": text, "answer": text[:40] or "-"},
            {"text": 3},
        ]
        records.append(records[n // 2] if n % 17 == 5 else kinds[n % 5])
    return records


def check_files(
    tokenizer: HuggingFace | Mistral,
    *files: Path,
    record: config.Record | None = None,
    ignore: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    settings.setdefault("template", tokenizer.chat_template)
    sources = [CheckedSource(tuple(map(str, files)), record=record, ignore=ignore)]
    return check_data(sources, tokenizer, CheckSettings(**settings))
