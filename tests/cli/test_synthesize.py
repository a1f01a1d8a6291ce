"""Options of `synthesize` that contradict each other."""

from __future__ import annotations

import pytest

from tests.cli.command import run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "pairs", "--n", "1"], "--as pairs compares answers"),
        (["--temperature", "0"], "all answers to a question are equal"),
    ],
)
def test_options_without_effect_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("synthesize", "items.jsonl", "--teacher", "model", "--out", "out", *options) == 2
    assert message in capsys.readouterr().err
