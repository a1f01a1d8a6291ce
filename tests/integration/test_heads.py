"""A classifier and a reward model from records to files: train, evaluate, classify, export, read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_train import config
from moe_train.checkpoint.model_dir import read_model
from moe_train.commands.classify import classify
from moe_train.commands.evaluate import evaluate_model
from moe_train.commands.export import export
from moe_train.commands.generate import generate_text
from moe_train.commands.train import train
from moe_train.run import loop
from tests.run_dir import lines

LABELS = {"animal": ["fox", "dog"], "speed": {"names": ["quick", "lazy"], "several": True}}
TEXTS = [
    ("the quick fox", "fox", ["quick"]),
    ("the lazy dog", "dog", ["lazy"]),
    ("a dog", "dog", []),
    ("quick lazy fox", "fox", ["quick", "lazy"]),
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else '' }}"
)
TRAIN = {"steps": 40, "batch_size": 8, "seq_len": 32}


def records(labels: list[str]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for text, animal, speed in TEXTS * 8:
        values = {"animal": animal, "speed": speed}
        made.append({"text": text, "labels": {name: values[name] for name in labels}})
    return made


def write(file: Path, lines: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture
def classifier(small_run: Callable[..., config.Config], tmp_path: Path) -> Callable[..., config.Config]:
    def make(targets: list[str], **changes: Any) -> config.Config:
        file = write(tmp_path / f"{'_'.join(targets)}.jsonl", records(targets))
        source = {"name": "files", "files": [file], "record": {"name": "classification"}}
        objective = {"name": "classification", "labels": {name: LABELS[name] for name in targets}}
        data = {
            "data__train": [source],
            "data__eval": [source],
            "train": TRAIN,
            "checkpoint": {"every_steps": 40},
            "evaluation": {"every_steps": 40},
        }
        run_dir = changes.pop("run_dir", tmp_path / "run")
        return small_run(run_dir, **{"objective": objective, **data, **changes})

    return make


def test_a_classifier_from_records_to_files(classifier: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(classifier(["speed"])) == loop.FINISHED
    first, last = lines(run_dir)[0], lines(run_dir)[-1]
    assert first["classification_loss"] > last["classification_loss"]
    assert last["texts"] > TRAIN["batch_size"]  # several texts in a row
    assert lines(run_dir, "eval")[-1]["accuracy"] == 1
    record = export(run_dir, tmp_path / "hf")
    assert all(check["passed"] is not False for check in record["checks"])
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["MistralForSequenceClassification"]
    assert settings["id2label"] == {"0": "quick", "1": "lazy"} and settings["problem_type"] == "multi_label_classification"
    assert settings["pad_token_id"] is not None and not (tmp_path / "hf" / "generation_config.json").exists()
    scores = read_model(tmp_path / "hf").scores
    assert scores is not None and scores.targets[0].name == "speed"

    texts = Path(write(tmp_path / "texts.jsonl", [{"id": i, "text": text} for i, (text, *_) in enumerate(TEXTS)]))
    of_run, of_files = (list(classify(folder, texts)) for folder in (run_dir, tmp_path / "hf"))
    assert [result["labels"]["speed"] for result in of_run] == [speed for *_, speed in TEXTS]
    for a, b in zip(of_run, of_files, strict=True):
        assert a["id"] == b["id"] and a["scores"]["speed"] == pytest.approx(b["scores"]["speed"], abs=1e-4)
    measured = evaluate_model(tmp_path / "hf", [tmp_path / "speed.jsonl"])
    assert measured["labels"][0]["accuracy"] == 1 and measured["labels"][1]["auc"] == 1
    with pytest.raises(ValueError, match=r"the model scores texts \(quick, lazy\) and predicts no tokens, so it cannot generate"):
        generate_text(run_dir, ["a"], 2)


def test_heads_on_a_frozen_base_and_with_adapters(classifier: Any, small_run: Any, tmp_path: Path) -> None:
    base = small_run(tmp_path / "base", train={"steps": 1, "batch_size": 8, "seq_len": 32})
    assert train(base) == loop.FINISHED
    common = {"init_from": str(tmp_path / "base"), "model": None}
    with pytest.raises(ValueError, match=r"several targets of which one has exactly one label.*set export: none"):
        train(classifier(["animal", "speed"], **common))
    frozen = {**common, "lora": {"train": ["head"]}, "export": "none", "train": {**TRAIN, "steps": 2}}
    assert train(classifier(["animal", "speed"], **frozen)) == loop.FINISHED
    metrics = lines(tmp_path / "run")[-1]
    assert {"accuracy/animal", "accuracy/speed"} <= metrics.keys()
    targets = [{"modules": ["attention.*", "ffn.*"], "rank": 2, "alpha": 4.0}]
    adapted = classifier(["animal"], **common, lora={"targets": targets}, run_dir=tmp_path / "lora", train={**TRAIN, "steps": 2})
    assert train(adapted) == loop.FINISHED
    assert export(tmp_path / "lora", tmp_path / "merged", merge=True)["checks"]
    with pytest.raises(ValueError, match="which --format gguf cannot hold"):
        export(tmp_path / "lora", tmp_path / "gguf", "gguf", merge=True)


def test_a_reward_model(small_run: Any, tmp_path: Path) -> None:
    pairs = [{"prompt": "say 1", "chosen": text, "rejected": "lazy dog"} for text in ("quick fox", "fox", "quick")] * 4
    file = write(tmp_path / "pairs.jsonl", pairs)
    source = {"name": "files", "files": [file], "record": {"name": "preference"}}
    changes = {"data__train": [source], "data__eval": [source], "data__chat_template": TEMPLATE, "objective": {"name": "reward"}}
    changes |= {"train": {**TRAIN, "seq_len": 64}, "checkpoint": {"every_steps": 40}, "evaluation": {"every_steps": 40}}
    assert train(small_run(tmp_path / "run", **changes)) == loop.FINISHED
    assert lines(tmp_path / "run", "eval")[-1]["accuracy"] == 1
    assert export(tmp_path / "run", tmp_path / "hf")["checks"]
    measured = evaluate_model(tmp_path / "hf", [Path(file)])
    assert measured["accuracy"] == 1 and measured["margin"] > 0
    chats = [
        {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": text}]}
        for text in ("quick fox", "lazy dog")
    ]
    better, worse = classify(tmp_path / "hf", Path(write(tmp_path / "chats.jsonl", chats)))
    assert better["reward"] > worse["reward"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"animal": "cat"}, r"animal.jsonl:1: target 'animal' has the label 'cat'; its labels are fox, dog"),
        ({"plant": "oak"}, r"animal.jsonl:1: labels has the target 'plant'; the targets are animal"),
        (None, r"animal.jsonl:1: the record has no labels"),
        ({"animal": ["fox", "dog"]}, r"animal.jsonl:1: target 'animal' has 2 labels, and each text has exactly one"),
        (
            {"animal": "fox"},
            r"animal.jsonl:1: this and all other texts \(1\) have the same labels of target animal \(fox\), so nothing",
        ),
    ],
)
def test_bad_labels(labels: Any, message: str, classifier: Any, tmp_path: Path) -> None:
    run = classifier(["animal"])
    write(tmp_path / "animal.jsonl", [{"text": "a", "labels": labels}])
    with pytest.raises(ValueError, match=message) as refused:
        train(run)
    assert "\n" not in str(refused.value)
