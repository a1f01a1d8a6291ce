"""Arguments of TRL's SFT script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from tests.config.conversion.theirs import converted

LORA = """
model_name_or_path: mistralai/Mistral-7B-v0.3
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
max_length: 2048
output_dir: out
push_to_hub: true
"""


def test_lora(tmp_path: Path) -> None:
    ours, conversion = converted(tmp_path, LORA)
    assert conversion.trainer == "trl" and ours.lora is not None
    assert ours.lora.targets[0].modules == ("attention.q_proj", "attention.v_proj")
    assert ours.data is not None and isinstance(ours.data.train[0], config.HubSource)
    assert isinstance(ours.data.train[0].record, config.ChatRecord)
    assert (ours.train.seq_len, ours.train.batch_size, ours.evaluation.every_steps) == (2048, 16, 100)
    named = {line.partition(":")[0] for line in conversion.remarks}
    assert {"lora_target_modules", "dataset_name", "packing", "push_to_hub"} <= named


def test_a_local_file_of_texts(tmp_path: Path) -> None:
    ours, _ = converted(
        tmp_path, "model_name_or_path: m\ndataset_name: ./a.jsonl\ndataset_text_field: body\nmax_length: 64\n", "trl"
    )
    assert ours.lora is None and ours.data is not None
    (source,) = ours.data.train
    assert isinstance(source, config.FileSource) and source.files == ("a.jsonl",)
    assert source.record == config.TextRecord(name="text", column="body")


@pytest.mark.parametrize(
    ("text", "objective", "learning_rate"),
    [
        ("", {"name": "next_token"}, 2e-5),
        ("loss_type: nll\n", {"name": "next_token"}, 2e-5),
        ("beta: 0.05\n", {"loss": "sigmoid", "beta": 0.05}, 1e-6),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.25]\n", {"loss": "sigmoid", "sft_weight": 0.25}, 1e-6),
        ("loss_type: [sigmoid, sft]\nloss_weights: [0.5, 0.25]\n", {"loss": "sigmoid", "sft_weight": 0.5}, 1e-6),
        ("loss_type: robust\nlabel_smoothing: 0.1\n", {"loss": "robust", "label_smoothing": 0.1}, 1e-6),
        ("loss_type: robust\n", {"loss": "sigmoid"}, 1e-6),
        ("loss_type: sigmoid_norm\n", {"loss": "sigmoid", "length_normalized": True}, 1e-6),
        ("loss_type: simpo\ncpo_alpha: 0\n", {"loss": "simpo", "sft_weight": 0, "margin": 0.5}, 1e-6),
        ("loss_type: kto\nbeta: 0.2\nundesirable_weight: 2\n", {"loss": "kto", "beta": 0.2, "undesirable_weight": 2}, 1e-6),
        ("center_rewards_coefficient: 0.01\n", {"name": "reward", "center_weight": 0.01}, 1e-4),
        ("beta: 0.1\nlearning_rate: 3e-6\n", {"name": "preference"}, 3e-6),
    ],
)
def test_what_is_learned(tmp_path: Path, text: str, objective: dict[str, Any], learning_rate: float) -> None:
    ours, _ = converted(tmp_path, f"model_name_or_path: m\ndataset_name: a.jsonl\nmax_length: 64\n{text}", "trl")
    written = ours.objective.model_dump()
    assert {key: written[key] for key in objective} == objective
    assert ours.optimizer.learning_rate == learning_rate and ours.compute.dtype == "bfloat16"
    assert ours.data is not None and ours.data.train[0].model_dump()["record"]["name"] in ours.objective.records


def test_losses_that_are_not_there_are_named(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ndataset_name: a.jsonl\nmax_length: 64\nloss_type: [aot, bco_pair]\nlabel_smoothing: 0.1\n"
    ours, conversion = converted(tmp_path, text, "trl")
    assert ours.objective.name == "preference"
    remarks = "\n".join(conversion.remarks)
    for part in ("aot is not supported; written is sigmoid", "bco_pair is not added to aot", "label_smoothing: aot has none here"):
        assert part in remarks


def test_a_mixture_of_data_sets(tmp_path: Path) -> None:
    text = """
model_name_or_path: m
max_length: 64
eval_strategy: epoch
test_split_size: 0.1
datasets:
  - {path: a/b, name: small, split: "train[:90%]", columns: [messages]}
  - {path: json, data_files: ./more.jsonl, data_dir: d}
"""
    ours, conversion = converted(tmp_path, text, "trl")
    assert ours.data is not None and not ours.data.eval
    hub, files = ours.data.train
    assert isinstance(hub, config.HubSource) and (hub.dataset, hub.subset, hub.split) == ("a/b", "small", "train[:90%]")
    assert isinstance(files, config.FileSource) and files.files == ("more.jsonl",)
    named = {line.partition(":")[0] for line in conversion.remarks}
    assert {"datasets.data_dir", "test_split_size", "eval_strategy"} <= named
