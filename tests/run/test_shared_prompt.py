"""Which layout `objective.shared_prompt` gives pairs, by prompts and by attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_train import config
from moe_train.run.resolve import resolve
from moe_train.run.shared_prompt import with_layout
from tests.tiny import EIGHT


@pytest.fixture
def decided(small_run: Callable[..., config.Config], write_lines: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """`decided(prompt, shared_prompt, kernel)`: the value of `objective.shared_prompt` that a run on two pairs has."""

    def decide(prompt: str, shared_prompt: Any = "auto", kernel: str = "auto") -> Any:
        pairs = [{"prompt": prompt, "chosen": "dog " * 20, "rejected": f"{n} cats"} for n in range(2)]
        source = {"name": "files", "files": [str(write_lines("pairs.jsonl", pairs))], "record": {"name": "preference"}}
        objective = {"name": "preference", "loss": "simpo", "shared_prompt": shared_prompt}
        sizes: dict[str, Any] = {"model__max_seq_len": 128, "train__seq_len": 128, "compute": {"attention": kernel}}
        written = small_run(tmp_path / "run", data__train=[source], data__eval=[], objective=objective, **sizes)
        with jax.set_mesh(EIGHT):
            run = with_layout(resolve(written))
        assert isinstance(run.objective, config.Preference)
        return run.objective.shared_prompt

    return decide


def test_auto_shares_long_prompts_where_the_kernel_can(decided: Callable[..., Any]) -> None:
    assert decided("fox " * 50) is decided("fox " * 50, kernel="blocked") is True
    assert decided("fox " * 50, kernel="splash") is False
    assert decided("a") is False


def test_a_stated_layout_stays_unless_the_kernel_cannot_do_it(decided: Callable[..., Any]) -> None:
    assert decided("a", True) is True and decided("fox " * 50, False) is False
    with pytest.raises(ValueError, match=r"shared_prompt is true, and the attention kernel splash cannot .*; set it to auto"):
        decided("a", True, "splash")
