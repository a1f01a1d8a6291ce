"""What a run says before its first step and after its last."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.machine.mesh import make_mesh
from moe_train.run import introduction
from tests.run.tiny_config import LORA, MODEL, written

LOADER = SimpleNamespace(
    num_records=1200,
    num_examples=1200,
    num_rows=300,
    num_tokens=9000,
    num_dropped=0,
    num_truncated=7,
    num_empty=1,
    unread={"label": 300, "tools": 12},
    epochs=lambda steps: {"a.jsonl": 0.08},
)
INPUTS: Any = SimpleNamespace(train=LOADER, total_steps=3)


def begin(**changes: Any) -> Any:
    start = {"sizes": (12345, 678), "resumed": False, "changed": {}, "damaged": {}, "state": SimpleNamespace(step=np.int32(2))}
    return SimpleNamespace(**{**start, **changes})


def introduced(start: Any, **sections: Any) -> list[str]:
    said: list[str] = []
    run = config.run_of(written(**{"model": MODEL, **sections}))
    with jax.set_mesh(make_mesh(run.mesh, jax.devices()[: run.mesh.fsdp])):
        introduction.introduce(run, said.append, INPUTS, start)
    return said


def test_a_new_run_says_its_size_its_mesh_and_its_data() -> None:
    assert introduced(begin(), mesh={"fsdp": 2}) == [
        "run: 12,345 parameters, 678 trained, on fsdp 2",
        "data: 1,200 records in 300 rows, 9,000 tokens; 7 truncated; 1 empty",
        "not read: label (300 records), tools (12)",
        "3 steps = 0.08 epochs of a.jsonl",
    ]
    assert introduced(begin())[0].endswith("on one device")


def test_how_often_each_of_several_sources_is_seen() -> None:
    assert introduction._describe_epochs({"a": 0.5, "b": 136.0}) == "0.50 epochs of a, 136.00 of b"
    assert introduction._describe_epochs({"a": 0.5, "b": 0.5}) == "0.50 epochs of all 2 sources"


def test_a_resumed_run_says_where_it_continues_and_what_has_changed() -> None:
    changed = {"evaluation.batches": (None, 1)}
    assert introduced(begin(resumed=True, changed=changed))[-2:] == [
        "continuing after step 2",
        "changed since the checkpoint: evaluation.batches None -> 1",
    ]


def test_damage_is_said_with_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    introduction.print_damage(begin(damaged={6: "no index"}))
    assert capsys.readouterr().err == "WARNING: the checkpoint of step 6 is damaged and was renamed to damaged-6: no index\n"


def test_a_finished_run_says_which_changes_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    introduction.print_finished(config.run_of(written(model=MODEL)), begin(changed={"metrics.every_steps": (1, 5)}), 3)
    said = capsys.readouterr()
    assert said.out == "run: all 3 steps are done; raise train.steps, train.epochs or train.tokens to continue\n"
    assert said.err.endswith("but without effect, since the run is finished: metrics.every_steps 1 -> 5\n")


def test_a_finished_run_refuses_another_learning_rate() -> None:
    run = config.run_of(written(model=MODEL))
    message = "learning_rate is 2.0, but the run in runs/run is finished, and was last trained with 1.0; choose another run_dir"
    with pytest.raises(ValueError, match=message):
        introduction.print_finished(run, begin(changed={"optimizer.learning_rate": (1.0, 2.0)}), 3)
    introduction.print_finished(run, begin(changed={"train.steps": (5, 3)}), 3)


@pytest.mark.parametrize(
    ("sections", "command"),
    [
        ({}, ["to use the model in other tools: moe-train export runs/run runs/run-hf"]),
        ({"lora": LORA, "init_from": "base"}, ["to use the model in other tools: moe-train export runs/run runs/run-hf --merge"]),
        ({"export": "none"}, []),
    ],
    ids=["full training", "adapters", "no export"],
)
def test_the_end_names_the_command_that_exports(sections: dict[str, Any], command: list[str]) -> None:
    said: list[str] = []
    model = {**MODEL, "ffn": {**MODEL["ffn"], "num_shared_experts": 1}} if sections.get("export") else MODEL
    introduction.conclude(config.run_of(written(**{"model": model, **sections})), said.append, 3)
    assert said == ["finished 3 steps; the checkpoints are in runs/run/checkpoints", *command]


def test_muon_says_what_it_leaves_to_adamw() -> None:
    muon = config.Muon(name="muon", learning_rate=0.02, adamw_learning_rate=3e-4)
    trained = ["embed.weight", "stacks.0.layers.0.attention.q_proj.weight", "vision.projector.in_proj.weight"]
    line = introduction.describe_muon(muon, [*trained, "vision.projector.in_proj.bias", "final_norm.scale"])
    assert line == (
        "optimizer: Muon orthogonalizes the updates of 2 arrays of matrices; AdamW (learning rate 0.0003) takes 3, which are no "
        "matrices of linear maps: biases, embeddings, norms"
    )
    assert "AdamW" not in introduction.describe_muon(muon, trained[1:])
