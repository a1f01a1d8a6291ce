"""The page of a run: finished, still going on, failed, or without metrics; nothing of it is loaded from elsewhere."""

from __future__ import annotations

import datetime
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moe_train.commands.report import write_report
from moe_train.run.folder import only_one

NOW = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page: its text, the addresses that it names, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_run(folder: Path, metrics: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: a <b>&\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"kind": "tra')
    (folder / "run.json").write_text(json.dumps({"events": events}))
    return folder


def steps(count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [{"kind": "eval", "step": 0, "loss": 3.25, "routing_drift": [0.1, 0.2]}]
    for step in range(1, count + 1):
        load = [[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]]
        loss = None if step == 2 else 3 / step
        lines.append({"kind": "train", "step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 90.0, "load": load})
    return [*lines, {"kind": "eval", "step": count, "loss": 1.125}, {"kind": "suite", "step": count, "kpi": 0.5}]


START = {"event": "start", "time": "2026-11-30T00:00:00+00:00", "step": 0, "hardware": {"devices": 8, "device": "cpu"}}


def report(run_dir: Path, **more: Any) -> Page:
    out = run_dir.parent / "report.html"
    write_report(run_dir, out, **more)
    page = Page(out.read_text(encoding="utf-8"))
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    return page


def test_a_finished_run_with_its_export_and_evaluation(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps(12), [START, {"event": "stop", "step": 12, "reason": "finished"}])
    seconds = {"start": 2.0, "compile": 1.0, "input": 0.5, "steps": 6.0, "evaluation": 0.5, "checkpoint": 0.0}
    session = {"began": 0, "updated": 10, "first_step": 0, "step": 12, "seconds": seconds, "end": "finished"}
    (run_dir / "goodput.json").write_text(json.dumps({"sessions": [session]}))
    entry = {
        "records": 1234,
        "tokens": 5678,
        "loss_tokens": 910,
        "files": [{"path": "a<i>.jsonl"}],
        "licence": None,
        "hash": "f" * 64,
    }
    (run_dir / "manifest.json").write_text(json.dumps({"sets": [entry]}))
    export = tmp_path / "hf"
    export.mkdir()
    checks = [{"name": "tensors", "passed": True, "said": "572 tensors"}, {"name": "answers", "passed": None, "said": "no"}]
    (export / "export_proof.json").write_text(json.dumps({"checks": checks, "files": {"model.safetensors": "0" * 64}}))
    (export / "README.md").write_text("# A card & more")
    result = tmp_path / "results"
    result.mkdir()
    (result / "result.json").write_text(json.dumps({"suites": [{"suite": "kpi", "score": 0.75, "digest": "0"}], "passed": True}))
    page = report(run_dir, exports=[export], evaluations=[result])
    for expected in (
        *("Status: finished", "1.1250 at step 12", "8 x cpu", "1,234", "910", "a<i>.jsonl", "not stated", "572 tensors"),
        *("not checked", "model.safetensors", "# A card & more", "0.75", "name: a <b>&", "60.0%", "scores on suites"),
    ):
        assert expected in page.text, expected
    assert (
        len(page.addresses) == 3 and page.tags.count("svg") == 5
    )  # maps of the end and of two layers; loss, norm, speed, drift, suite


def test_a_run_that_goes_on_and_one_that_was_killed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps(3), [START, {"event": "resume", "step": 2}])
    with only_one(run_dir):
        page = report(run_dir)
    assert "Status: running" in page.text and "No export was named" in page.text and "no goodput.json" in page.text
    assert "goodput.json is missing" in page.text and "manifest.json is missing" in page.text
    assert "Status: ended without a record: it was killed, or it runs on another machine" in report(run_dir).text


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    reason = "RuntimeError: 4 steps had a loss <that> is not finite"
    run_dir = make_run(tmp_path / "run", [], [START, {"event": "stop", "step": 0, "reason": reason}])
    page = report(run_dir)
    assert f"Status: failed: {reason}" in page.text and "No step has been measured yet." in page.text
    (run_dir / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in report(run_dir).text


def test_damaged_records_are_named_and_left_out(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", steps(3), [START])
    content = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text("{}\nnot JSON\n" + content)
    for name in ("run.json", "goodput.json", "manifest.json"):
        (run_dir / name).write_text('{"sets": [{}], "sessions": [1], "events": 3}')
    page = report(run_dir)
    assert "metrics.jsonl has 2 damaged lines, which are left out: 1, 2." in page.text
    for name in ("run.json", "goodput.json", "manifest.json"):
        assert f"{name} is damaged and left out: " in page.text


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is no run: it has neither config\.yaml nor run\.json"):
        write_report(tmp_path, tmp_path / "a.html")
    run_dir = make_run(tmp_path / "run", [], [])
    with pytest.raises(ValueError, match=r"--html .*a\.pdf does not end in \.html"):
        write_report(run_dir, tmp_path / "a.pdf")
    with pytest.raises(FileNotFoundError, match=r"has no export_proof\.json; name a directory that moe-train export made"):
        write_report(run_dir, tmp_path / "a.html", exports=[tmp_path])
