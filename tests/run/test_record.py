"""The log of a run."""

from __future__ import annotations

import json
from pathlib import Path

from moe_train.run.record import PACKAGES, describe_process, write_event


def test_the_diary_grows_by_an_event_at_a_time_and_is_replaced_whole(tmp_path: Path) -> None:
    write_event(tmp_path, "start", 0, **describe_process())
    write_event(tmp_path, "stop", 5, reason="an ä")
    events = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["events"]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("stop", 5)]
    assert events[1]["reason"] == "an ä" and events[0]["time"].endswith("+00:00")
    assert set(events[0]["versions"]) == {"python", *PACKAGES} and events[0]["hardware"]["devices"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
