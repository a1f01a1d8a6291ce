"""The exchange of texts between processes, with a stand-in for the coordination service."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from jax._src import distributed

from moe_train.machine import agreement


class Store:
    """A key-value store whose other process answers after a number of polls, or never."""

    def __init__(self, polls: int | None) -> None:
        self.polls = polls
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key in self.values:
            return self.values[key]
        if self.polls == 0:
            return "theirs"
        if self.polls is not None:
            self.polls -= 1
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(polls: int | None) -> None:
        monkeypatch.setattr(distributed.global_state, "client", Store(polls))
        monkeypatch.setattr(jax, "process_count", lambda: 2)

    return make


def test_one_process_agrees_with_itself() -> None:
    assert agreement.exchange("mine", "on a test") == ["mine"]


def test_texts_come_in_the_order_of_the_processes(store: Any) -> None:
    store(polls=3)
    assert agreement.exchange("mine", "on a test") == ["mine", "theirs"]


def test_a_silent_process_is_an_error_after_the_deadline(store: Any) -> None:
    store(polls=None)
    with pytest.raises(ConnectionError, match=r"process 1 of 2 did not answer within 0\.01 s \(on a test\); start the job again"):
        agreement.exchange("mine", "on a test", 0.01)
