"""A config of axolotl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from tests.config.conversion.theirs import converted

QLORA = """
base_model: mistralai/Mixtral-8x7B-v0.1
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
datasets:
  - path: data/dialogues.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {role: from, content: value}
    roles: {assistant: [gpt, model], user: [human]}
  - path: tatsu-lab/alpaca
    type: alpaca
    name: small
  - path: ./text.jsonl
    type: completion
    field: body
    shards: 4
test_datasets:
  - {path: data/held.jsonl, ds_type: json, type: chat_template}
val_set_size: 0
chat_template: chatml
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
bf16: auto
gradient_checkpointing: true
flash_attention: true
output_dir: ./outputs/out
plugins: [axolotl.integrations.liger.LigerPlugin]
"""


def test_qlora(tmp_path: Path) -> None:
    ours, conversion = converted(tmp_path, QLORA, devices=4)
    assert conversion.trainer == "axolotl"
    assert ours.init_from == "models/Mixtral-8x7B-v0.1" and ours.run_dir == "outputs/out"
    assert ours.lora is not None and ours.lora.quantize == config.Nf4(name="nf4")
    (target,) = ours.lora.targets
    assert (target.modules, target.rank, target.alpha) == (("attention.*", "ffn.*"), 32, 16)
    assert ours.lora.train == ("embed", "head") and ours.lora.dropout == 0.05
    assert (ours.train.batch_size, ours.train.microbatches, ours.train.seq_len, ours.train.epochs) == (32, 4, 4096, 2)
    assert isinstance(ours.optimizer, config.AdamW) and (ours.optimizer.learning_rate, ours.optimizer.b2) == (2e-4, 0.999)
    assert ours.optimizer.schedule == config.CosineSchedule(name="cosine", warmup_steps=10, final_fraction=0.0)
    assert ours.compute == config.Compute(dtype="bfloat16", param_dtype="bfloat16", remat="full")


def test_data(tmp_path: Path) -> None:
    ours, conversion = converted(tmp_path, QLORA)
    assert ours.data is not None and ours.data.chat_template == "chatml" and len(ours.data.eval) == 1
    chat, alpaca, text = ours.data.train
    roles = {"gpt": "assistant", "model": "assistant", "human": "user"}
    assert chat.model_dump()["record"]["roles"] == roles and chat.model_dump()["record"]["column"] == "turns"
    assert isinstance(alpaca, config.HubSource) and alpaca.subset == "small"
    assert isinstance(alpaca.record, config.CompletionRecord) and alpaca.record.prompt == "instruction"
    assert isinstance(text, config.FileSource) and text.files == ("text.jsonl",)
    assert text.record == config.TextRecord(name="text", column="body")
    named = {line.partition(":")[0] for line in conversion.remarks}
    assert {"init_from", "datasets.path", "datasets.shards", "optimizer", "sample_packing", "plugins"} <= named


def test_a_full_fine_tune_has_no_adapters(tmp_path: Path) -> None:
    text = "base_model: m\nsequence_len: 64\nlearning_rate: 1e-5\ndatasets: [{path: a.jsonl}]\nbf16: true\n"
    ours, _ = converted(tmp_path, text)
    assert ours.lora is None and ours.compute.param_dtype == "float32"


LEARNED = "base_model: m\nsequence_len: 64\nmicro_batch_size: 1\nlearning_rate: 1e-5\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rl: dpo\nrl_beta: 0.2\nrpo_alpha: 0.5\n", {"loss": "sigmoid", "beta": 0.2, "sft_weight": 0.5}),
        ("rl: ipo\n", {"loss": "ipo", "beta": 0.1}),
        ("rl: dpo\ndpo_norm_loss: true\n", {"loss": "sigmoid", "length_normalized": True}),
        ("rl: dpo\ndpo_loss_type: [apo_zero]\n", {"loss": "apo_zero"}),
        ("rl: orpo\norpo_alpha: 0.3\n", {"loss": "orpo", "beta": 0.3}),
        ("rl: simpo\nrl_beta: 2\ncpo_alpha: 0\nsimpo_gamma: 0.8\n", {"loss": "simpo", "beta": 2, "sft_weight": 0, "margin": 0.8}),
        ("rl: simpo\n", {"loss": "simpo", "sft_weight": 1}),
        ("rl: kto\nkto_desirable_weight: 0.2\n", {"loss": "kto", "desirable_weight": 0.2, "undesirable_weight": 1}),
        ("reward_model: true\ncenter_rewards_coefficient: 0.01\n", {"name": "reward", "center_weight": 0.01}),
    ],
)
def test_what_is_learned(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    ours, _ = converted(tmp_path, f"{LEARNED}{text}datasets: [{{path: a.jsonl}}]\n")
    written = ours.objective.model_dump()
    assert {key: written[key] for key in expected} == expected


def test_reinforcement_learning_is_named(tmp_path: Path) -> None:
    ours, conversion = converted(tmp_path, f"{LEARNED}rl: grpo\ndatasets: [{{path: a.jsonl}}]\n")
    assert ours.objective.name == "next_token" and any("grpo is not supported" in line for line in conversion.remarks)


@pytest.mark.parametrize(
    ("rl", "entry", "expected"),
    [
        ("dpo", "type: chatml.intel", {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}),
        ("ipo", "type: llama3.argilla", {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}),
        ("dpo", "type: chatml.ultra", {"prompt": None, "chosen": "chosen"}),
        ("orpo", "type: chat_template.argilla", {"prompt": None, "rejected": "rejected"}),
        ("dpo", "type: chat_template.default, field_messages: c, field_chosen: b", {"prompt": "c", "chosen": "b"}),
        ("dpo", "type: {field_prompt: q, field_chosen: a, field_rejected: r}", {"prompt": "q", "chosen": "a", "rejected": "r"}),
        ("dpo", "split: train", {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}),
        ("kto", "type: llama3.argilla", {"prompt": "instruction", "completion": "completion", "label": "label"}),
        ("kto", "type: chatml.argilla_chat", {"messages": "completion", "label": "label"}),
        ("kto", "type: {field_completion: a, field_label: ok}", {"prompt": "prompt", "completion": "a", "label": "ok"}),
    ],
)
def test_records_of_preferences(tmp_path: Path, rl: str, entry: str, expected: dict[str, Any]) -> None:
    ours, conversion = converted(tmp_path, f"{LEARNED}rl: {rl}\ndatasets: [{{path: a.jsonl, {entry}}}]\n")
    assert ours.data is not None
    written = ours.data.train[0].model_dump()["record"]
    assert {key: written[key] for key in expected} == expected
    assert not any(line.startswith("datasets.field") for line in conversion.remarks)


@pytest.mark.parametrize(("train_on_eos", "is_named"), [("turn", False), ("last", True)])
def test_settings_of_a_data_set_that_hold_anyway_are_no_remarks(tmp_path: Path, train_on_eos: str, is_named: bool) -> None:
    entry = f"{{path: a.jsonl, type: chat_template, roles_to_train: [assistant], train_on_eos: {train_on_eos}}}"
    _, conversion = converted(tmp_path, f"{LEARNED}datasets: [{entry}]\n")
    assert not any("roles_to_train" in line for line in conversion.remarks)
    assert any("train_on_eos" in line for line in conversion.remarks) == is_named


def test_pretraining_data_are_texts(tmp_path: Path) -> None:
    text = """pretraining_dataset:
  - {path: a/b, name: en, text_column: body}
  - c/d
datasets: [{path: more.txt, type: pretraining}]
fsdp: [full_shard]
lora_target_parameters: [mlp.experts.gate_up_proj]
train_on_inputs: true
adapter: lora
"""
    ours, conversion = converted(tmp_path, f"{LEARNED}{text}")
    assert ours.data is not None and ours.lora is not None
    columns = [source.model_dump()["record"] for source in ours.data.train]
    assert [record["name"] for record in columns] == ["text"] * 3 and columns[0]["column"] == "body"
    assert ours.lora.targets[0].modules == ("ffn.gate_proj", "ffn.up_proj")
    remarks = "\n".join(conversion.remarks)
    assert "fsdp: use mesh.fsdp" in remarks and "train_on_inputs: prompts are not trained on here" in remarks


def test_columns_of_a_format_of_ones_own_are_named(tmp_path: Path) -> None:
    kind = "{field_instruction: q, field_input: ctx, field_system: system, system_prompt: Be brief., field_output: a}"
    _, conversion = converted(tmp_path, f"{LEARNED}datasets: [{{path: a.jsonl, type: {kind}}}]\n")
    remarks = "\n".join(conversion.remarks)
    assert "the column ctx has to be named input" in remarks and "system_prompt" in remarks and "field_system" not in remarks
