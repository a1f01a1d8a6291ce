"""A judge behind an endpoint of this test: verdicts, kept replies, and an endpoint that goes down half-way."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from moe_train import config
from moe_train.evaluate.suites import judge
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.judge import Endpoint, judge_grade
from moe_train.evaluate.suites.not_graded import NotGraded

ITEM = SuiteItem("1", "items.jsonl:1", [{"role": "user", "content": "Sky {answer}?"}], [], ("blue",), guidance="Be strict.")
GRADER = config.JudgeGrader(name="judge", model="m", verdicts={"correct": 1, "not correct": 0, "partly": 0.5})


class Judge(BaseHTTPRequestHandler):
    """Replies with the next of `replies`; a number is an error of that status."""

    replies: ClassVar[list[str | int]] = []
    requests: ClassVar[list[dict[str, object]]] = []

    def do_POST(self) -> None:
        type(self).requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = self.replies.pop(0)
        self.send_response(reply if isinstance(reply, int) else 200)
        if reply == 302:
            self.send_header("Location", "http://localhost:1/")
        self.end_headers()
        if not isinstance(reply, int):
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(judge, "WAIT_SECONDS", 0.0)
    Judge.requests = []
    server = HTTPServer(("localhost", 0), Judge)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield Endpoint(f"http://localhost:{server.server_port}/v1", tmp_path / "replies")
    server.shutdown()
    server.server_close()


def test_verdicts_are_kept(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    Judge.replies = ["It is not correct at first; correct.", "Not correct", "partly", 503, "correct"]
    with caplog.at_level(logging.INFO, "moe_train"):
        grade = judge_grade(GRADER, endpoint, "kpi")
    assert f"to the judge m at {endpoint.url.split('/')[2]}" in caplog.text
    assert [grade(ITEM, answer) for answer in ("a", "b", "c", "d")] == [1, 0, 0.5, 1]
    # Asked again, nothing is sent.
    assert [grade(ITEM, answer) for answer in ("a", "b", "c", "d")] == [1, 0, 0.5, 1]
    assert len(Judge.requests) == 5
    (message,) = Judge.requests[0]["messages"]  # type: ignore[misc]
    # Braces in an item's own text are text.
    assert "Sky {answer}?" in message["content"] and "Be strict." in message["content"] and "blue" in message["content"]


def test_an_endpoint_that_goes_down(endpoint: Endpoint) -> None:
    Judge.replies = ["correct", 503, 503, 503]
    grade = judge_grade(GRADER, endpoint, "kpi")
    assert grade(ITEM, "a") == 1
    with pytest.raises(ConnectionError, match=r"items.jsonl:1: the judge at .*(503).*the same command continues"):
        grade(ITEM, "b")
    Judge.replies = ["partly"]
    again = judge_grade(GRADER, endpoint, "kpi")
    assert [again(ITEM, "a"), again(ITEM, "b")] == [1, 0.5]
    assert len(Judge.requests) == 5


def test_what_an_endpoint_may_answer(endpoint: Endpoint) -> None:
    grade = judge_grade(GRADER, endpoint, "kpi")
    Judge.replies = ["incorrectly", 401, 302]
    with pytest.raises(NotGraded, match=r"'incorrectly', which is none of correct, not correct, partly"):
        grade(ITEM, "a")
    with pytest.raises(RuntimeError, match="refused the request: 401"):
        grade(ITEM, "b")
    with pytest.raises(RuntimeError, match="refused the request: 302"):
        grade(ITEM, "b")


def test_what_is_refused_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="suite kpi sends its questions and the answers to a judge, m; name its endpoint"):
        judge_grade(GRADER, None, "kpi")
    for url, message in (("localhost:80", "is no address"), ("http://me:secret@host/v1", "has a name or a password")):
        with pytest.raises(ValueError, match=message):
            judge_grade(GRADER, Endpoint(url, tmp_path), "kpi")
    with pytest.raises(ValueError, match="variable JUDGE_KEY is not set"):
        judge_grade(GRADER.model_copy(update={"api_key_variable": "JUDGE_KEY"}), Endpoint("http://h/v1", tmp_path), "kpi")
