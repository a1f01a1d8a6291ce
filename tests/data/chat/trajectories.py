"""Conversations with many calls, and what an example trains on."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from typing import Any

from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example, turns
from moe_train.data.records.normal_form import Conversation, Message
from moe_train.data.tokenizers.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "bash", "description": "Run a command.", "parameters": {"type": "object"}}}


def asked(text: str = "Fix the test.") -> list[Message]:
    return [{"role": "user", "content": text}]


def said(text: str = "It is fixed.", weight: int = 1) -> list[Message]:
    return [{"role": "assistant", "content": text, "weight": weight}]


def called(
    number: int, parallel: int = 1, weight: int = 1, result: str = "line 1\nline 2", backwards: bool = False
) -> list[Message]:
    """A turn with calls, and their results."""
    ids = [f"call{number:03d}{i:02d}" for i in range(parallel)]
    calls = []
    for i, name in enumerate(ids):
        arguments = json.dumps({"cmd": f"sed -n {i},20p file{number}.py", "cwd": None})
        calls.append({"id": name, "type": "function", "function": {"name": "bash", "arguments": arguments}})
    results = [{"role": "tool", "tool_call_id": name, "name": "bash", "content": f"{result} of {i}"} for i, name in enumerate(ids)]
    if backwards:
        results.reverse()
    return [{"role": "assistant", "tool_calls": calls, "weight": weight}, *results]


def conversation(*parts: Sequence[Message]) -> Conversation:
    return Conversation([message for part in parts for message in part], [TOOL])


def agent(num_calls: int, **settings: Any) -> Conversation:
    """A question, calls one after the other, and an answer."""
    return conversation(asked(), *(called(i, **settings) for i in range(num_calls)), said())


def predictions(trained: list[Example]) -> collections.Counter[tuple[int, int]]:
    """How often each token is trained on after each sequence of tokens, which is represented by a hash."""
    counts: collections.Counter[tuple[int, int]] = collections.Counter()
    for example in trained:
        before = 0
        for token, mask in zip(example.tokens, example.loss_mask or (), strict=True):
            if mask and before:
                counts[before, token] += 1
            before = hash((before, token))
    return counts


def separate(merged: Conversation, template: str | None, tokenizer: Tokenizer) -> list[Example]:
    """An example for each turn: of the conversation up to the turn, with weight 0 for the turns before."""
    made = []
    for turn in turns(merged.messages):
        if turn.trained_on:
            before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in merged.messages[: turn.start]]
            messages = before + merged.messages[turn.start : turn.end]
            (example,) = examples(Conversation(messages, merged.tools, merged.settings), template, tokenizer)
            made.append(example)
    return made


def trained_ids(example: Example) -> list[int]:
    return [token for token, mask in zip(example.tokens, example.loss_mask or (), strict=True) if mask]
