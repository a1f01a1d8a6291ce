"""Arguments of TRL's SFT script."""

from __future__ import annotations

from pathlib import Path

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
