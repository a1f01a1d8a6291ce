"""A config of mistral-finetune."""

from __future__ import annotations

from pathlib import Path

from moe_train import config
from tests.config.conversion.theirs import converted

LORA = """
data:
  instruct_data: "data/a.jsonl:5.,data/b.jsonl"
  data: ""
  eval_instruct_data: "data/eval.jsonl"
model_id_or_path: "/models/mixtral"
lora: {rank: 64}
seq_len: 32768
batch_size: 1
num_microbatches: 2
max_steps: 300
optim: {lr: 6.e-5, weight_decay: 0.1, pct_start: 0.05}
log_freq: 1
ckpt_freq: 100
no_eval: False
save_adapters: True
run_dir: runs/out
wandb: {project: mine}
"""


def test_lora(tmp_path: Path) -> None:
    ours, conversion = converted(tmp_path, LORA, devices=8)
    assert conversion.trainer == "mistral-finetune"
    assert ours.lora is not None and (ours.lora.targets[0].rank, ours.lora.targets[0].alpha) == (64, 128)
    assert (ours.train.steps, ours.train.batch_size, ours.train.microbatches) == (300, 16, 2)
    assert ours.optimizer.schedule == config.CosineSchedule(name="cosine", warmup_steps=15, final_fraction=0.0)
    assert ours.data is not None and [source.weight for source in ours.data.train] == [5, 1]
    assert {line.partition(":")[0] for line in conversion.remarks} == {"train.batch_size", "optim", "save_adapters", "wandb"}


def test_one_file_has_no_weight_and_full_finetuning_no_adapters(tmp_path: Path) -> None:
    text = "data: {data: t.jsonl}\nmodel_id_or_path: m\nfull_finetuning: true\noptim: {}\n"
    ours, _ = converted(tmp_path, text)
    assert ours.lora is None and ours.data is not None and ours.data.train[0].weight is None


def test_what_is_off_stays_off_and_trackers_are_kept(tmp_path: Path) -> None:
    text = """
data: {instruct_data: a.jsonl, eval_instruct_data: b.jsonl}
model_id_or_path: m
optim: {}
eval_freq: 1
no_eval: true
no_ckpt: true
world_size: 8
mlflow: {tracking_uri: "http://x", experiment_name: e}
"""
    ours, conversion = converted(tmp_path, text)
    assert ours.data is not None and not ours.data.eval
    assert [(section.name, section.project) for section in ours.metrics.trackers] == [("mlflow", "e")]
    remarks = "\n".join(conversion.remarks)
    assert "no_ckpt: left out" in remarks and "convert again with --devices 8" in remarks
