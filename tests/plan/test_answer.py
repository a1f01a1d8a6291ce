"""`moe-train plan` without a compiler: what it ranks, what it says, what it writes, and how it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moe_train import config
from moe_train.cli import main
from moe_train.commands.plan import plan
from moe_train.config import yaml_file

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAIN = str(CONFIGS / "mixtral_8x7b_pretrain_v5p.yaml")
SMALL = ["model.num_layers=4", "model.model_dim=512", "model.ffn.ffn_dim=1024", "train.batch_size=16", "train.microbatches=1"]
SMALL += ["model.attention={num_heads: 8, num_kv_heads: 4, head_dim: 64}", "mesh={fsdp: 8}"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main.main([*arguments])
    return int(stop.value.code or 0)


def test_json_has_what_programs_build_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", PRETRAIN, "--topology", "tpu7x-8", "--no-compile", "--json", "--price", "3", *SMALL) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["topology", "price", "considered", "fitting", "given", "best", "choices"]
    assert answer["topology"] == {
        **{"name": "tpu7x:2x2x1", "device": "tpu7x", "slices": 1, "chips": 4, "devices": 8},
        "hbm_bytes_per_device": 96 * 2**30,
    }
    assert answer["price"] == {"dollars_per_chip_hour": 3.0, "source": "--price"}
    assert answer["best"] == answer["choices"][0]
    assert answer["given"]["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    for choice in answer["choices"]:
        assert math.prod(choice["mesh"].values()) == 8
        assert choice["memory_bytes"]["total"] == sum(v for k, v in choice["memory_bytes"].items() if k != "total")
        assert choice["seconds"]["step"] >= max(choice["seconds"][k] for k in ("compute", "hbm", "network", "dcn"))
        assert choice["binds"] in ("compute", "HBM", "network", "DCN")
        dollars = 3.0 * 4 / 3600 / choice["tokens_per_second"] * 1e9
        assert choice["dollars_per_billion_tokens"] == pytest.approx(dollars)
        assert bool(choice["why_not"]) == (choice is not answer["choices"][0])
    speeds = [choice["tokens_per_second"] for choice in answer["choices"] if choice["fits"]]
    assert speeds == sorted(speeds, key=lambda s: -float(f"{s:.3g}"))


def test_the_best_choice_is_written_as_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "best.yaml"
    assert run("plan", PRETRAIN, "--topology", "v5p:2x2x2", "--no-compile", "--config-out", str(out), *SMALL) == 0
    said = capsys.readouterr().out
    assert "v5p:2x2x2: 8 chips of 95.0 GiB" in said and "confirmed: no" in said
    given = yaml_file.load(PRETRAIN, SMALL)
    best = plan(given, "v5p:2x2x2", compile_best=0).best
    assert best is not None
    written = yaml_file.load(out)
    assert config.run_of(written) == best.run
    unchanged = {"mesh": given.mesh, "compute": given.compute, "train": given.train}
    assert written.model_copy(update=unchanged) == given  # nothing else is touched
    assert written.train.batch_size == given.train.batch_size


def test_a_free_batch_moves_fewer_bytes_a_token() -> None:
    given = yaml_file.load(PRETRAIN, SMALL)
    kept, free = (plan(given, "v5p:2x2x2", compile_best=0, free_batch=free).best for free in (False, True))
    assert kept is not None and free is not None
    assert kept.run.train.batch_size == 16 < free.run.train.batch_size
    assert free.received_per_token(8) < kept.received_per_token(8)


def test_only_replicas_stand_in_different_slices() -> None:
    given = yaml_file.load(PRETRAIN, [*SMALL, "mesh={data: 2, fsdp: 4}"])
    answer = plan(given, "2xv5p:2x2x1", compile_best=0)
    assert all(choice.run.mesh.data % 2 == 0 for choice in answer.choices)
    assert all(choice.work.dcn_bytes > 0 for choice in answer.choices)
    one = plan(given, "v5p:2x2x2", compile_best=0)
    assert all(choice.work.dcn_bytes == 0 for choice in one.choices)


@pytest.mark.parametrize(
    ("layers", "last"),
    [(32, "it fits on v5e:8x8 (64 chips): "), (4000, "nor does it on any larger slice")],
    ids=["here", "anywhere"],
)
def test_a_model_that_does_not_fit(layers: int, last: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = [f"model.num_layers={layers}", "train.batch_size=4", "train.microbatches=1", "mesh={fsdp: 4}"]
    assert run("plan", PRETRAIN, "--topology", "v5e:2x2", "--no-compile", *few) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("nothing fits on v5e:2x2: the closest is") and said[-1].startswith(last)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v5p:4x4x5"], "topology v5p:4x4x5 does not exist: 80 chips; nearest: v5p:4x4x4, 64 chips"),
        (["--topology", "v5p:2x2x2", "--compile-only"], "--no-compile leaves nothing for --compile-only; leave one out"),
        (["--topology", "v5p:2x2x2", "--config-out", "nowhere/best.yaml"], "nowhere/best.yaml: there is no folder nowhere"),
        (["--topology", "v5p:2x2x2", "train.batch_size=12"], "batch_size 12"),
        (["--topology", "v5p:2x2x2", "mesh={fsdp: 1, context: 3}"], "context 3"),
        (["--topology", "v5p:2x2x2", "mesh={context: 16}"], "mesh.context 16 does not divide the 8 devices of v5p:2x2x2; use 8"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", PRETRAIN, "--no-compile", *SMALL, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1
