"""A config of LLaMA-Factory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moe_train import config
from moe_train.commands.convert import convert_config
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
    assert {"template", "dataset faq", "dataset_dir", "val_size", "max_samples"} <= named


def test_pretraining_reads_texts_and_trains_everything(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nstage: pt\nfinetuning_type: full\ndataset: books\ndataset_dir: d\ncutoff_len: 128\n"
    ours, _ = converted(tmp_path, text)
    assert ours.lora is None and ours.data is not None
    (source,) = ours.data.train
    assert isinstance(source, config.FileSource) and source.files == ("d/books.json",)
    assert source.record == config.TextRecord(name="text")


@pytest.mark.parametrize(
    ("text", "objective", "records"),
    [
        (
            "stage: dpo\npref_beta: 0.3\npref_loss: simpo\nsimpo_gamma: 1.2\n",
            {"name": "preference", "loss": "simpo", "beta": 0.3, "margin": 1.2},
            [{"prompt": "talk", "chosen": "better"}, {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}],
        ),
        ("stage: dpo\npref_ftx: 0.1\n", {"loss": "sigmoid", "sft_weight": 0.1}, [{"prompt": "talk"}, {"name": "preference"}]),
        ("stage: rm\n", {"name": "reward"}, [{"name": "preference", "prompt": "talk"}, {"rejected": "rejected"}]),
        (
            "stage: kto\nkto_chosen_weight: 2\n",
            {"loss": "kto", "beta": 0.1, "desirable_weight": 2},
            [{"messages": "talk", "label": "kto_tag"}, {"prompt": "instruction", "completion": "output", "label": "good"}],
        ),
        ("stage: ppo\n", {"name": "next_token"}, [{"name": "chat"}, {"name": "completion"}]),
    ],
)
def test_what_is_learned(tmp_path: Path, text: str, objective: dict[str, object], records: list[dict[str, object]]) -> None:
    info = {
        "talks": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "chosen": "better"}},
        "single": {"file_name": "b.json", "columns": {"kto_tag": "good"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    ours, conversion = converted(tmp_path, f"model_name_or_path: m\ndataset: talks,single\ncutoff_len: 8\n{text}", "llama-factory")
    written = ours.objective.model_dump()
    assert {key: written[key] for key in objective} == objective and ours.data is not None
    for source, record in zip(ours.data.train, records, strict=True):
        written = source.model_dump()["record"]
        assert {key: written[key] for key in record} == record
    assert any("ppo is not supported" in line for line in conversion.remarks) == ("ppo" in text)


def test_pictures_are_switched_on(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"p": {"file_name": "p.json", "columns": {"images": "images"}}}))
    ours, _ = converted(tmp_path, "model_name_or_path: m\ndataset: p\ncutoff_len: 8\n", "llama-factory")
    assert ours.vision is not None


def test_dataset_info_states_files_columns_and_roles(tmp_path: Path) -> None:
    info = {
        "faq": {"file_name": "faq_en.json", "columns": {"prompt": "question", "response": "reply", "history": "before"}},
        "calls": {
            "file_name": "calls.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "customer", "assistant_tag": "assistant"},
        },
        "chats": {"hf_hub_url": "a/chats", "formatting": "sharegpt", "split": "test"},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "theirs.yaml").write_text(LORA.replace("identity,faq", "faq,calls,chats,other"))
    conversion = convert_config(tmp_path / "theirs.yaml", tmp_path / "ours.yaml")
    faq, calls, chats, other = yaml.safe_load((tmp_path / "ours.yaml").read_text())["data"]["train"]
    assert faq == {
        "name": "files",
        "files": ["data/faq_en.json"],
        "record": {"name": "completion", "prompt": "question", "completion": "reply"},
    }
    assert calls["files"] == ["data/calls.jsonl"]
    expected = {"name": "chat", "column": "turns", "role": "role", "content": "content", "roles": {"customer": "user"}}
    assert calls["record"] == expected
    assert (chats["dataset"], chats["split"], chats["revision"]) == ("a/chats", "test", "STATE-THE-COMMIT")
    assert chats["record"] == {"name": "chat", "column": "conversations", "role": "from", "content": "value"}
    assert other["files"] == ["data/other.json"]
    text = "\n".join(conversion.remarks)
    assert "dataset faq: the column before (history) has to be named history to be read" in text
    assert "dataset other: is not in dataset_info.json" in text and "a/chats is a data set of the hub" in text
    (tmp_path / "data/dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info\.json is not JSON"):
        convert_config(tmp_path / "theirs.yaml", tmp_path / "other.yaml")


@pytest.mark.parametrize(("shares", "weights"), [("0.7,0.3", [0.7, 0.3]), ("[2, 1]", [2, 1]), ("0.5", [None, None])])
def test_shares_become_weights(tmp_path: Path, shares: str, weights: list[float | None]) -> None:
    text = f"model_name_or_path: m\ndataset: a,b\ncutoff_len: 8\nstage: sft\ninterleave_probs: {shares}\n"
    ours, conversion = converted(tmp_path, f"{text}train_on_prompt: true\npure_bf16: true\nfinetuning_type: freeze\n")
    assert ours.data is not None and [source.weight for source in ours.data.train] == weights
    assert ours.compute.param_dtype == "bfloat16"
    named = {line.partition(":")[0] for line in conversion.remarks}
    assert {"train_on_prompt", "finetuning_type"} <= named and ("interleave_probs" in named) == (weights[0] is None)


@pytest.mark.parametrize(
    "entry", [{"columns": ["a"]}, {"columns": {"messages": 1}}, {"formatting": "sharegpt", "tags": {"user_tag": []}}]
)
def test_an_entry_of_another_form_is_one_line(tmp_path: Path, entry: dict[str, object]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"faq": entry, "identity": {}}))
    with pytest.raises(ValueError, match=r"dataset faq: (columns|tags)"):
        converted(tmp_path, LORA)


@pytest.mark.parametrize(("role", "is_named"), [("function_call", False), ("call", True)])
def test_turns_that_call_tools_have_one_role(tmp_path: Path, role: str, is_named: bool) -> None:
    (tmp_path / "data").mkdir()
    entry = {"file_name": "a.json", "formatting": "sharegpt", "tags": {"function_tag": role}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"faq": entry, "identity": {}}))
    _, conversion = converted(tmp_path, LORA)
    assert any("calls of tools only if" in line for line in conversion.remarks) == is_named
