"""Faults in words: each with its line, the key at fault, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.tiny import edited, faults


def test_one_fault(run: Path) -> None:
    assert faults(run, text=edited("seq_len: 32", 'seq_len: "32"')) == [
        'run.yaml:21: train.seq_len: has to be a whole number (value "32")'
    ]


def test_every_fault_has_its_line(run: Path) -> None:
    text = edited("steps: 10", "steps: 0").replace("weight: 3", "weigth: 3").replace("name: adamw", "name: adam")
    assert faults(run, text=text) == [
        "run.yaml:17: data.train.1.weigth: unknown key; did you mean weight? (value 3)",
        "run.yaml:19: train.steps: has to be greater than or equal to 1 (value 0)",
        'run.yaml:23: optimizer.name: one of adamw, adafactor, muon, lion (value "adam")',
    ]


def test_a_way_of_packing_that_is_gone_is_refused_with_the_one_there_is(run: Path) -> None:
    text = edited("data:\n", "data:\n  packing: {name: first_fit}\n")
    assert faults(run, text=text) == ["run.yaml:11: data.packing.name: has to be 'best_fit' (value \"first_fit\")"]


def test_missing_key_is_named_where_its_section_is(run: Path) -> None:
    assert faults(run, text=edited("  batch_size: 8\n", "")) == ["run.yaml:18: train.batch_size: required, and missing"]
    assert faults(run, text=edited("  name: adamw\n", "")) == [
        "run.yaml:22: optimizer.name: required, and missing; one of adafactor, adamw, lion, muon"
    ]
    assert faults(run, text=edited(", record: {name: text}", "")) == [
        "run.yaml:13: data.train.0.record: required, and missing; a section whose name is one of chat, classification, "
        "completion, labelled, preference, text, transcription"
    ]


def test_a_check_across_keys_blames_a_stated_key(run: Path) -> None:
    (line,) = faults(run, "mesh.expert=3", "train.batch_size=6")
    assert line.startswith("override mesh.expert=3: mesh.expert: mesh.expert 3 does not divide num_experts 4")
    (line,) = faults(run, text=edited("num_heads: 4", "num_heads: 3"))
    assert line.startswith("run.yaml:8: model.attention.num_heads: num_heads 3 is not a multiple")


def test_words_of_a_message_are_not_taken_for_keys(run: Path) -> None:
    (line,) = faults(run, "run_dir=gs://bucket")  # its message mentions a NAME
    assert "run_dir: this URL does not name a folder in a bucket" in line
    (line,) = faults(run, "model.ffn.router={name: sigmoid}")  # its message ends in "to train it anyway"
    assert "model: model has a sigmoid router" in line


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: adamw", "name: adamw\n  lr: 3", "use optimizer.learning_rate"),
        ("name: adamw", "name: lion\n  eps: 3", "lion does not have it; it belongs to adamw and muon"),
        ("steps: 10", "steps: 10\n  micro_batch_size: 2", "use train.batch_size (the sequences of one optimizer step"),
        ("steps: 10", "steps: 10\n  learning_rat: 2", "did you mean optimizer.learning_rate?"),
        ("steps: 10", "steps: 10\n  qqqq: 2", "train has "),
        ("run_dir:", "base_model: mistralai/Mixtral\nrun_dir:", "use init_from"),
        ("run_dir:", "learning_rate: 1\nrun_dir:", "did you mean optimizer.learning_rate?"),
        ("run_dir:", "lora_r: 16\nrun_dir:", "use lora.targets.0.rank"),
        ("run_dir:", "ici_expert_parallelism: 8\nrun_dir:", "use mesh.expert"),
        ("run_dir:", "sample_packing: true\nrun_dir:", "leave it out: sequences are always packed"),
        ("run_dir:", "optimiser: {}\nrun_dir:", "did you mean optimizer?"),
        ("model_dim: 16", "model_dim: 16\n  num_experts: 8", "did you mean model.ffn.num_experts?"),
        ("model_dim: 16", "model_dim: 16\n  num_experts_per_tok: 8", "use model.ffn.experts_per_token"),
    ],
)
def test_an_unknown_key_names_ours(run: Path, old: str, new: str, said: str) -> None:
    lines = faults(run, text=edited(old, new))
    assert [line for line in lines if f"unknown key; {said}" in line], lines
