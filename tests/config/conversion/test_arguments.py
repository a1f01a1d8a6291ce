"""The arguments of Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train.config.conversion import arguments
from moe_train.config.conversion.draft import Draft
from tests.config.conversion.theirs import converted


def read(**theirs: Any) -> Draft:
    draft = Draft(theirs)
    arguments.read_length_and_batch(draft, devices=2)
    arguments.read_optimizer(draft)
    arguments.read_precision(draft)
    arguments.read_evaluation_and_saving(draft)
    return draft


def test_the_batch_counts_devices_and_accumulation() -> None:
    draft = read(per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert draft.tree["train"] == {"batch_size": 24, "microbatches": 4, "epochs": 3}


def test_the_length_is_steps_if_they_are_stated() -> None:
    assert read(max_steps=50, num_train_epochs=2).tree["train"]["steps"] == 50
    draft = read(max_steps=-1, num_train_epochs=1.5)
    assert draft.tree["train"]["epochs"] == 2 and any("a part of an epoch" in line for line in draft.remarks)


@pytest.mark.parametrize(
    ("theirs", "optimizer"),
    [
        ({"optim": "adamw_torch"}, {"name": "adamw", "b1": 0.9, "b2": 0.999}),
        ({"optim": "adamw_torch", "adam_beta2": 0.95}, {"name": "adamw", "b1": 0.9, "b2": 0.95}),
        ({"optim": "adafactor"}, {"name": "adafactor"}),
        ({"optim": "paged_lion_8bit"}, {"name": "lion"}),
        ({"optimizer": "muon"}, {"name": "muon", "adamw_learning_rate": 5e-5}),
    ],
)
def test_optimizers(theirs: dict[str, Any], optimizer: dict[str, Any]) -> None:
    written = read(**theirs).tree["optimizer"]
    assert {key: written[key] for key in optimizer} == optimizer and written["learning_rate"] == 5e-5


@pytest.mark.parametrize(
    ("theirs", "schedule"),
    [
        ({}, {"name": "linear"}),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 7}, {"name": "cosine", "final_fraction": 0.0, "warmup_steps": 7}),
        ({"lr_scheduler_type": "cosine", "cosine_min_lr_ratio": 0.2}, {"name": "cosine", "final_fraction": 0.2}),
        (
            {"lr_scheduler_type": "constant_with_warmup", "max_steps": 100, "warmup_ratio": 0.05},
            {"name": "constant", "warmup_steps": 5},
        ),
        ({"max_steps": 100, "warmup_steps": 0.1}, {"name": "linear", "warmup_steps": 10}),
    ],
)
def test_schedules(theirs: dict[str, Any], schedule: dict[str, Any]) -> None:
    assert read(**theirs).tree["optimizer"]["schedule"] == schedule


def test_what_needs_the_number_of_steps_is_a_remark() -> None:
    draft = read(warmup_ratio=0.03, eval_strategy="epoch", save_steps=0.2, logging_steps=5, save_total_limit=3)
    assert draft.tree["metrics"] == {"every_steps": 5} and draft.tree["checkpoint"] == {"keep_last": 3}
    assert {line.partition(":")[0] for line in draft.remarks} == {"train.batch_size", "warmup_ratio", "eval_strategy", "save_steps"}


def test_half_precision() -> None:
    assert read(bf16=True, gradient_checkpointing=True).tree["compute"] == {
        "dtype": "bfloat16",
        "param_dtype": "float32",
        "remat": "full",
    }
    assert "compute" not in read().tree and any("float16" in line for line in read(fp16=True).remarks)


@pytest.mark.parametrize(
    ("text", "trackers"),
    [
        ("report_to: wandb\n", [("wandb", "moe_train")]),
        ("report_to: [tensorboard, mlflow]\nmlflow_experiment_name: faq\n", [("mlflow", "faq")]),
        ("wandb_project: faq\nwandb_entity: bank\n", [("wandb", "faq")]),
        ("report_to: none\n", []),
        ("report_to: comet_ml\n", []),
    ],
)
def test_trackers(tmp_path: Path, text: str, trackers: list[tuple[str, str]]) -> None:
    ours, conversion = converted(
        tmp_path, f"base_model: m\nsequence_len: 8\ndatasets: [{{path: a.jsonl, type: completion}}]\n{text}"
    )
    assert [(section.name, section.project) for section in ours.metrics.trackers] == trackers
    assert any("comet_ml is not supported" in line for line in conversion.remarks) == ("comet_ml" in text)
