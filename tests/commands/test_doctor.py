"""What `doctor` finds on a machine that works, and on ones that do not."""

from __future__ import annotations

import jax
import pytest

from moe_train.commands import doctor
from moe_train.commands.doctor import Finding, examine_machine


def by_part() -> dict[str, Finding]:
    return {finding.part: finding for finding in examine_machine()}


def test_this_machine_works() -> None:
    findings = by_part()
    assert not [finding for finding in findings.values() if finding.state == "broken"]
    assert f"jax {jax.__version__}" in findings["packages"].text
    assert findings["devices"].text.startswith(f"{len(jax.devices())} x ")
    assert findings["chat template"].state == findings["compilation"].state == "ok"
    assert findings["extra gguf"].state == "ok"  # the tests need it


def test_what_is_missing_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "report", ("no_such_module", "`plot`"))
    assert by_part()["extra report"] == Finding("extra report", "missing", "for `plot`", "bash launch/install.sh report")


def test_a_part_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(*_: object) -> list[jax.Device]:
        raise RuntimeError("no driver\nfor this card")

    monkeypatch.setattr(jax, "devices", devices)
    findings = by_part()
    assert findings["devices"].state == "broken" and findings["devices"].text == "RuntimeError: no driver for this card"
    assert findings["compilation"].state == "ok"
    monkeypatch.setattr(jax, "jit", devices)
    assert by_part()["compilation"].text == "not tried without devices"


def test_little_disk_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOW_DISK", 10**18)
    assert by_part()["disk"].remedy


def test_network_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE=1" in by_part()["network"].text
