"""Progress is reported from any thread, whether or not somebody listens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from moe_train.machine.progress import Progress, counted, listening, report


def test_a_listener_receives_the_beginning_and_every_part() -> None:
    heard: list[Progress] = []
    with listening(heard.append):
        done = counted("writing", 100, "bytes")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(done, [10] * 10))
    assert heard == [Progress("writing", count, 100, "bytes") for count in range(0, 110, 10)]


def test_reports_go_to_the_innermost_listener() -> None:
    outer: list[Progress] = []
    inner: list[Progress] = []
    with listening(outer.append):
        with listening(inner.append):
            report(Progress("reading", 1, 2))
        report(Progress("reading", 2, 2))
    assert [now.done for now in inner] == [1] and [now.done for now in outer] == [2]


def test_nobody_need_listen() -> None:
    report(Progress("writing", 1, 3))
    counted("writing", 3)(3)
