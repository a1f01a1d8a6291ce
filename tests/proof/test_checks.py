"""One check: passed, failed or not done, and why."""

from __future__ import annotations

import pytest

from moe_train.proof import checks
from moe_train.proof.checks import Check, Fault, Found, NotChecked


@pytest.mark.parametrize(
    ("error", "passed"), [(Fault("bad"), False), (ValueError("bad"), False), (OSError("bad"), False), (NotChecked("bad"), None)]
)
def test_what_a_check_raises_decides_whether_it_passed(error: Exception, passed: bool | None) -> None:
    def check() -> Found:
        raise error

    found = checks.run("name", check)
    assert (found.name, found.passed, found.said, found.figures) == ("name", passed, "bad", {})


def test_a_check_that_returns_has_passed() -> None:
    found = checks.run("name", lambda: ("all is well", {"count": 3}))
    assert (found.passed, found.said, found.figures) == (True, "all is well", {"count": 3}) and found.seconds >= 0


def test_a_fault_of_the_program_itself_is_no_failed_check() -> None:
    with pytest.raises(ZeroDivisionError):
        checks.run("name", lambda: (str(1 / 0), {}))


def test_failed_checks_are_named_with_the_first_fault() -> None:
    done = [Check("a", True, "", {}, 0), Check("b", None, "", {}, 0), Check("c", False, "first", {}, 0)]
    checks.require(done[:2])
    with pytest.raises(RuntimeError, match=r"^the proof failed \(c, d\): first$"):
        checks.require([*done, Check("d", False, "second", {}, 0)])
