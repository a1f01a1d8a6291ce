"""The answer of a plan for people."""

from __future__ import annotations

import pytest

from tests.plan.pretraining import PRETRAIN, run


@pytest.mark.parametrize(
    ("layers", "last"),
    [(32, "it fits on v5e:8x8 (64 chips): "), (4000, "no larger slice or number of hosts of v5e fits it either")],
    ids=["here", "anywhere"],
)
def test_a_model_that_does_not_fit(layers: int, last: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = [f"model.num_layers={layers}", "train.batch_size=4", "train.microbatches=1", "mesh={fsdp: 4}"]
    assert run("plan", PRETRAIN, "--topology", "v5e:2x2", "--no-compile", *few) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("nothing fits on v5e:2x2: the closest is") and said[-1].startswith(last)
