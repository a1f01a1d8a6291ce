"""Show preference pairs side by side, and labelled answers with their labels, as text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moe_train import config
from moe_train.commands.show import escape_control_characters
from moe_train.data.records.answers import judged_messages
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import LabelledAnswer, Message, PreferencePair
from moe_train.data.records.open_source import open_source
from moe_train.data.records.problem import located
from moe_train.data.records.source import OpenSource
from moe_train.machine.files import JsonObject


class ShownPair(NamedTuple):
    """A record with one or two answers to a prompt."""

    place: str
    prompt: list[Message]
    answers: dict[str, list[Message]]
    """What is said of an answer (chosen, rejected, good, bad) -> its messages."""
    tools: list[JsonObject]

    def as_json(self) -> JsonObject:
        """Return the record for use by a program."""
        return {"place": self.place, "prompt": self.prompt, "tools": self.tools, **self.answers}


def pairs_of(source: config.FileSource, count: int) -> list[ShownPair]:
    """Read the first records of a source of pairs or labelled answers.

    Args:
        source: The files and the record section.
        count: Number of records.

    Raises:
        ValueError: If a record cannot be read (with file and line), or there is none.
    """
    records = open_source(source)
    pairs = list(itertools.islice(_pairs(records, source.record), count))
    if not pairs:
        raise ValueError(f"{', '.join(records.names)}: no records")
    return pairs


def _pairs(records: OpenSource, section: config.Record) -> Iterator[ShownPair]:
    """Yield the records of an opened source."""
    for origin, fields in records:
        place = records.where(origin)
        record = located(place, normalise, fields, section)
        match record:
            case PreferencePair():
                answers = {"chosen": record.chosen, "rejected": record.rejected}
                yield ShownPair(place, record.prompt.messages, answers, record.prompt.tools)
            case LabelledAnswer():
                judged = judged_messages(record)
                prompt = record.conversation.messages[: -len(judged) or None]
                yield ShownPair(place, prompt, {"good" if record.good else "bad": judged}, record.conversation.tools)


def print_pairs(pairs: list[ShownPair], console: Console) -> None:
    """Print each record under a rule that states its origin: the prompt, and below it the answers side by side."""
    for pair in pairs:
        console.print(Rule(Text(escape_control_characters(pair.place)), align="left"))
        for message in pair.prompt:
            console.print(Text(_written(message), overflow="fold"))
        table = Table(*pair.answers, expand=True)
        table.add_row(*(Text("\n".join(map(_written, messages)), overflow="fold") for messages in pair.answers.values()))
        console.print(table)
    console.print(
        Text("the objectives preference and unpaired_preference compare these answers; prompts bear no loss", style="dim")
    )


def _written(message: Message) -> str:
    """Return a message as text, with its role, reasoning and calls."""
    content = message.get("content", "")
    parts: list[str] = []
    if isinstance(content, str):
        parts.append(content)
    else:
        # A part holds its text under the name of its type.
        parts += [f"({part['type']}) {part[part['type']]}" for part in content]
    parts += [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return escape_control_characters(f"{message.get('role')}: " + "\n".join(part for part in parts if part))
