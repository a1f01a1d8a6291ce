"""A config of LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path

from moe_train import config
from tests.config.conversion.theirs import converted

LORA = """
model_name_or_path: /models/Mixtral-8x7B-Instruct-v0.1
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
quantization_bit: 4
dataset: identity,faq
template: mistral
cutoff_len: 2048
max_samples: 1000
output_dir: saves/lora
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
val_size: 0.1
eval_steps: 500
"""


def test_lora(tmp_path: Path) -> None:
    ours, conversion = converted(tmp_path, LORA)
    assert conversion.trainer == "llama-factory" and ours.init_from == "/models/Mixtral-8x7B-Instruct-v0.1"
    assert ours.lora is not None and ours.lora.quantize is not None
    (target,) = ours.lora.targets
    assert (target.modules, target.rank, target.alpha) == (("attention.q_proj", "attention.v_proj"), 8, 16)
    assert ours.data is not None and [source.model_dump()["files"] for source in ours.data.train] == [
        ("data/identity.json",),
        ("data/faq.json",),
    ]
    assert (ours.train.batch_size, ours.train.epochs, ours.evaluation.every_steps) == (8, 3, 500)
    named = {line.partition(":")[0] for line in conversion.remarks}
    assert {"template", "dataset", "val_size", "max_samples"} <= named


def test_pretraining_reads_texts_and_trains_everything(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nstage: pt\nfinetuning_type: full\ndataset: books\ndataset_dir: d\ncutoff_len: 128\n"
    ours, _ = converted(tmp_path, text)
    assert ours.lora is None and ours.data is not None
    (source,) = ours.data.train
    assert isinstance(source, config.FileSource) and source.files == ("d/books.json",)
    assert source.record == config.TextRecord(name="text")
