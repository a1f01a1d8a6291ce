"""What a writer leaves in its files."""

from __future__ import annotations

import json

import pytest

from moe_train import config
from moe_train.run import writer as writers

FIGURES = {"loss": 2.5, "tokens_per_second": 1234.0, "mfu": 0.25, "balance": 1.5, "skipped": 0, "load": [[0.75, 0.25]]}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_lines_files_and_events(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(writers, "LINE_SECONDS", 0)
    writer = writers.Writer(tmp_path, config.Metrics(tensorboard=False), start_step=0, total_steps=4)
    for step in (1, 2):
        writer.train(step, FIGURES)
    writer.evaluation(2, {"loss": 2.25, "loss_tokens": 1000})
    writer.close()
    assert [(line["kind"], line["step"], line["loss"]) for line in lines(tmp_path)] == [
        ("train", 1, 2.5),
        ("train", 2, 2.5),
        ("eval", 2, 2.25),
    ]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "step 1/4  loss 2.5000  1,234 tokens/s  MFU 25.0%  balance 1.50"
    assert said[1].startswith(said[0].replace("1/4", "2/4")) and said[1].endswith(" left")
    assert said[2] == "step 2/4  held-out loss 2.2500 over 1,000 tokens"


def test_steps_that_are_done_again_are_written_once(tmp_path):
    """A process died after step 4, without a checkpoint since step 2, in the middle of a line."""
    settings = config.Metrics(tensorboard=False)
    writer = writers.Writer(tmp_path, settings, start_step=0, total_steps=6)
    for step in (1, 2, 3, 4):
        writer.train(step, FIGURES)
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    writer = writers.Writer(tmp_path, settings, start_step=2, total_steps=6)
    writer.train(3, FIGURES)
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "tensorboard").exists()


def test_a_log_gets_a_line_now_and_then(tmp_path, capsys):
    with writers.Writer(tmp_path, config.Metrics(tensorboard=False), start_step=0, total_steps=50) as writer:
        for step in range(1, 51):
            writer.train(step, FIGURES)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/50", "50/50"]
    assert len(lines(tmp_path)) == 50


def test_other_processes_write_nothing(tmp_path):
    writer = writers.Writer(tmp_path, config.Metrics(), start_step=0, total_steps=4, write=False)
    writer.train(1, FIGURES)
    writer.evaluation(1, {"loss": 1.0, "loss_tokens": 1})
    writer.say("hello")
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_one_progress_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    writer = writers.Writer(tmp_path, config.Metrics(tensorboard=False), start_step=0, total_steps=4)
    for step in range(1, 5):
        writer.train(step, FIGURES)
    writer.close()
    shown = capsys.readouterr().err
    for part in ("loss 2.5000", "1,234 tokens/s", "MFU 25.0%", "balance 1.50", "4/4"):
        assert part in shown


@pytest.mark.parametrize(
    "line", [b"\x00\x00", b'{"kind": "train", "st', b"\xff\xfe{}", b"{}", b"[]", b"", b'{"kind": "train", "step": "1"}']
)
def test_a_damaged_line_is_dropped_and_named(tmp_path, caplog, line):
    settings = config.Metrics(tensorboard=False)
    writer = writers.Writer(tmp_path, settings, start_step=0, total_steps=6)
    for step in (1, 2, 3):
        writer.train(step, FIGURES)
    writer.close()
    first, *others = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([first, line, *others, b""]))
    writers.Writer(tmp_path, settings, start_step=2, total_steps=6).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert f"{tmp_path / 'metrics.jsonl'}:2 is dropped: not " in caplog.text


def test_a_full_disk_is_named_with_its_file(tmp_path):
    writer = writers.Writer(tmp_path, config.Metrics(tensorboard=False), start_step=0, total_steps=4)
    writer._file.close()
    writer._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        writer.train(1, FIGURES)
    writer._file = open("/dev/null", "w", encoding="utf-8")  # noqa: SIM115
