"""The log of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.run.record import PACKAGES, check_checkpoints_kept, describe_process, read_events, write_event


def test_the_diary_grows_by_an_event_at_a_time_and_is_replaced_whole(tmp_path: Path) -> None:
    write_event(tmp_path, "start", 0, **describe_process())
    write_event(tmp_path, "stop", 5, reason="an ä")
    events = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["events"]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("stop", 5)]
    assert events[1]["reason"] == "an ä" and events[0]["time"].endswith("+00:00")
    assert set(events[0]["versions"]) == {"python", *PACKAGES} and events[0]["hardware"]["devices"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "content", [b"", b'{"events": [', b"\xff", b"{}", b"[]", b'{"events": [1]}', b'{"events": [{"event": "start"}]}']
)
def test_a_damaged_log_is_set_aside_and_named(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run.json").write_bytes(content)
    write_event(tmp_path, "resume", 5)
    assert [event["event"] for event in read_events(tmp_path / "run.json")] == ["resume"]
    assert (tmp_path / "damaged-run.json").read_bytes() == content
    assert str(tmp_path / "run.json") in caplog.text and "renamed to damaged-run.json" in caplog.text


@pytest.mark.parametrize(
    "evidence",
    [
        lambda run_dir: write_event(run_dir, "stop", 6, reason="finished"),
        lambda run_dir: write_event(run_dir, "stop", 6, reason="SIGTERM"),
        lambda run_dir: write_event(run_dir, "resume", 6),
        lambda run_dir: (run_dir / "metrics.jsonl").write_text('{"kind": "train", "step": 6}\n'),
    ],
)
def test_checkpoints_that_were_saved_and_are_gone_are_missed(tmp_path: Path, evidence: Callable[[Path], object]) -> None:
    evidence(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"has no checkpoint, but its .* \(step 6\); restore .*checkpoints \(is its disk mounted"):
        check_checkpoints_kept(tmp_path, 2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_that_failed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    check_checkpoints_kept(tmp_path, 2)
    write_event(tmp_path, "start", 0)
    write_event(tmp_path, "stop", 4, reason="RuntimeError: a fault")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 4}\n')
    check_checkpoints_kept(tmp_path, 2)
