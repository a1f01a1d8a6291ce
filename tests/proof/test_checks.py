"""One check: passed, failed or not done, and why."""

from __future__ import annotations

import pytest

from moe_train.proof import checks
from moe_train.proof.checks import Check, Fault, Finding, NotChecked


@pytest.mark.parametrize(
    ("error", "passed"), [(Fault("bad"), False), (ValueError("bad"), False), (OSError("bad"), False), (NotChecked("bad"), None)]
)
def test_what_a_check_raises_decides_whether_it_passed(error: Exception, passed: bool | None) -> None:
    def check() -> Finding:
        raise error

    found = checks.run("name", check)
    assert (found.name, found.passed, found.summary, found.metrics) == ("name", passed, "bad", {})


def test_a_check_that_returns_has_passed() -> None:
    found = checks.run("name", lambda: Finding("all is well", {"count": 3}))
    assert (found.passed, found.summary, found.metrics) == (True, "all is well", {"count": 3}) and found.seconds >= 0


def test_a_fault_of_the_program_itself_is_no_failed_check() -> None:
    with pytest.raises(ZeroDivisionError):
        checks.run("name", lambda: Finding(str(1 / 0)))


def test_failed_checks_are_named_with_the_first_fault() -> None:
    done = [Check("a", True, "", {}, 0), Check("b", None, "", {}, 0), Check("c", False, "first", {}, 0)]
    checks.require(done[:2])
    with pytest.raises(RuntimeError, match=r"^the proof failed \(c, d\): first$"):
        checks.require([*done, Check("d", False, "second", {}, 0)])


def test_the_keys_of_a_check_in_a_record() -> None:
    check = Check("tensors", True, "3 tensors", {"count": 3}, 0.5)
    assert check.to_json() == {"name": "tensors", "passed": True, "said": "3 tensors", "figures": {"count": 3}, "seconds": 0.5}


def test_several_faults_are_the_first_one_and_their_number() -> None:
    assert checks.first_and_count(["a is missing"]) == "a is missing"
    assert checks.first_and_count(["a is missing", "b is missing", "c"]) == "a is missing (and 2 more)"
