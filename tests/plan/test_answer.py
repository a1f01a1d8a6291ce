"""`moe-train plan` without a compiler: the config that it writes, and input that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.commands.plan import plan_run
from moe_train.config import yaml_file
from moe_train.plan.answer import PlanOptions
from tests.plan.pretraining import PRETRAIN, SMALL, run


def test_the_best_choice_is_written_as_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best.yaml"
    assert run("plan", PRETRAIN, "--topology", "v5p:2x2x2", "--no-compile", "--config-out", str(out), *SMALL) == 0
    said = capsys.readouterr().out
    assert "v5p:2x2x2: 8 chips of 95.0 GiB" in said and "confirmed: no" in said
    given = yaml_file.load_config(PRETRAIN, SMALL)
    best = plan_run(given, "v5p:2x2x2", PlanOptions(compile_best=0)).best
    assert best is not None
    written = yaml_file.load_config(out)
    assert config.run_of(written) == best.run
    unchanged = {"mesh": given.mesh, "compute": given.compute, "train": given.train}
    assert written.model_copy(update=unchanged) == given  # nothing else is touched
    assert written.train.batch_size == given.train.batch_size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5p:4x4x5"], "topology v5p:4x4x5 does not exist: 80 chips; nearest: v5p:4x4x4, 64 chips"),
        (["--topology", "v5p:2x2x2", "--compile-only"], "--compile-only has no effect with --no-compile; leave one of them out"),
        (
            ["--topology", "v5p:2x2x2", "--config-out", "nowhere/best.yaml"],
            "nowhere/best.yaml: the directory nowhere does not exist; create it first",
        ),
        (["--topology", "v5p:2x2x2", "train.batch_size=12"], "batch_size 12"),
        (["--topology", "v5p:2x2x2", "mesh={fsdp: 1, context: 3}"], "context 3"),
        (["--topology", "v5p:2x2x2", "mesh={context: 16}"], "mesh.context 16 does not divide the 8 devices of v5p:2x2x2; use 8"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", PRETRAIN, "--no-compile", *SMALL, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
