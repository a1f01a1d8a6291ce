"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import pytest

from moe_train.cli.terminal import print_checks, print_json, print_mapping, print_table, progress_line
from moe_train.machine import progress


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The words of each line on stdout."""
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("bytes_here", 3 << 20, ["bytes", "here", "3.00", "MiB"]),
        ("tokens", 1234567, ["tokens", "1,234,567"]),
        ("loss", 2.71828, ["loss", "2.718"]),
        ("speed", 12345.6, ["speed", "12,346"]),
        ("passed", True, ["passed", "true"]),
        ("name", "[red]é", ["name", "[red]é"]),
        ("mesh", {"fsdp": 2}, ["mesh", '{"fsdp":', "2}"]),
    ],
)
def test_values_as_people_read_them(key: str, value: object, text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    print_mapping({key: value})
    assert lines(capsys) == [text]


def test_json_keeps_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_mapping({"loss": 2.71828, "name": "é"}, as_json=True)
    assert capsys.readouterr().out == '{\n  "loss": 2.71828,\n  "name": "é"\n}\n'
    print_json([1, None])
    assert capsys.readouterr().out == "[\n  1,\n  null\n]\n"


def test_a_table_has_a_heading_and_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"layer_name": "a", "count": 1000}, {"layer_name": "b", "count": 2}])
    assert lines(capsys) == [["layer", "name", "count"], ["a", "1,000"], ["b", "2"]]


def test_a_check_passed_failed_or_was_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    results = {True: "ok", False: "FAILED", None: "not checked"}
    print_checks([{"name": "a", "passed": p, "said": "x", "figures": {"tolerance": 0.5}, "seconds": 0.123} for p in results])
    assert lines(capsys)[1:] == [["a", *text.split(), "x", "0.5", "0.12"] for text in results.values()]


def test_a_pipe_gets_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_line("merging"):
        progress.report(progress.Progress("reading", 1, 2))
    assert capsys.readouterr() == ("", "")
