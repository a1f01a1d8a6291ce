"""What people read of a check: every figure that it has, and no markup of the records' own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import NEW_USER_TURN, WITHOUT_ID
from moe_train.data.check.check import check_data
from moe_train.data.check.report import print_report
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat import trajectories
from tests.data.check.samples import Write


def shown(answer: dict[str, Any]) -> str:
    text = io.StringIO()
    print_report(answer, Console(file=text, width=400))
    return text.getvalue()


def test_all_that_is_known_is_shown(tokenizer: HuggingFace, tmp_path: Path) -> None:
    words = " ".join(f"w{n}" for n in range(100))
    lines = [
        f'{{"text": "{words}"}}',
        f'{{"text": "{words.upper()}"}}',
        '{"text": "[bold]x[/bold]"}',
        *['{"text": 3}'] * 12,
        '{"[red]": 1}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    (tmp_path / "bench.json").write_text('{"tokens_per_second": 0.01}')
    source = CheckedSource((str(path),))
    settings = CheckSettings(
        seq_len=64,
        batch_size=1,
        against=(CheckedSource((str(path.with_name("e.csv")),)),),
        bench=tmp_path / "bench.json",
        fix=tmp_path / "out",
    )
    path.with_name("e.csv").write_text(f'question,answer\n"{words}",x\n')
    answer = check_data([source], tokenizer, settings)
    text = shown(answer)
    for fragment in (
        "type: 12 × — write it as a string",
        f"{path}:4: column 'text' should be text, not 3",
        "… and 2 more",
        "the record has '[red]'",
        f"{path}:2: like {path}:1 (100%)",
        "duplicates: 1 × — no fault; training sees each copy, so remove those that are not intended",
        "overlap with the evaluation set: 2 × — ",
        "16 (3 text)",
        "with problems     13",
        "0 exact, 1 near",
        "2 records share 13 consecutive words with 1 of its 1",
        f"{tmp_path / 'out'}: 3 records kept (0 of them changed), 13 dropped",
        "hours",
        "longer than 64",
    ):
        assert fragment in text, fragment
    assert "unknown: state --seq-len" in shown(check_data([source], tokenizer, CheckSettings()))
    assert " of about " in shown(check_data([source], tokenizer, CheckSettings(sample=5)))


def test_what_merging_turns_with_tools_saves_is_said(v3: Mistral, write_lines: Write) -> None:
    conversation = trajectories.conversation(
        trajectories.asked(),
        *(trajectories.called(i) for i in range(5)),
        trajectories.said(),
        trajectories.asked(),
        trajectories.said(),
    )
    path = write_lines("a.jsonl", [{"messages": conversation.messages, "tools": conversation.tools}] * 2)
    separate = 2 * sum(len(example.tokens) for example in trajectories.separate(conversation, None, v3))
    merged = examples(conversation, None, v3)
    tokens = 2 * sum(len(example.tokens) for example in merged)
    text = shown(check_data([CheckedSource((str(path),))], v3, CheckSettings(seq_len=len(merged[1].tokens) - 2)))
    assert f"14; as one example per turn: {separate:,} tokens; merged: {tokens:,} tokens in 6 examples" in text
    assert f"2 started anew because {WITHOUT_ID}; 2 started anew because {NEW_USER_TURN}" in text
    assert "too_long: drop keeps the turns that fit of 2 with tools" in text


def test_a_remedy_that_differs_from_that_of_its_rule_is_said(tokenizer: HuggingFace, write_lines: Write) -> None:
    path = write_lines("a.jsonl", [{"text": "a", key: "b"} for key in ("label", "images", "label")])
    lines = shown(check_data([CheckedSource((str(path),))], tokenizer, CheckSettings())).splitlines()
    (heading,) = [line for line in lines if line.startswith("unread-key: 3 × ")]
    assert "--ignore label" in heading
    said = [("--ignore" in line, "--ignore images" in line) for line in lines if line.startswith("  ") and "a.jsonl:" in line]
    assert said == [(False, False), (True, True), (False, False)]


def test_nothing_that_can_be_read(tokenizer: HuggingFace, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    text = shown(check_data([CheckedSource((str(tmp_path / "a.jsonl"),))], tokenizer, CheckSettings(seq_len=8, batch_size=1)))
    assert "empty-file: 1" in text and "none that can be read" in text and "0 rows" in text
