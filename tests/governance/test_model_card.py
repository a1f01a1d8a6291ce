"""The model card states what the records state, and TODO for the rest."""

from __future__ import annotations

import pytest
import yaml

from moe_train import config
from moe_train.governance.model_card import model_card
from tests.governance.lineages import lineage_of


@pytest.mark.parametrize("layout", ["hf", "peft"])
def test_a_card_states_base_data_results_and_compute(tmp_path, layout):
    text = model_card(lineage_of(tmp_path, layout, lora=True))
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "models/base" and metadata["license_name"] == "TODO"
    assert metadata["base_model_relation"] == {"hf": "finetune", "peft": "adapter"}[layout]
    assert "step 3 of the run run: LoRA from models/base" in body
    assert (", merged into the base" in body) == (layout == "hf")
    assert "| `dialogues.jsonl` | 400 | 12,345 | 678 | internal, contract \\| 17 | TODO |" in body
    assert "| first | 0 | 5.0000 |" in body and "| best | 2 | 3.5000 |" in body and "| last | 3 | 3.7500 |" in body
    assert "16 x TPU v5p" in body and "1.5 hours" in body and "4, of which 2 serve a token" in body


def test_a_model_that_was_not_trained_here_says_so(tmp_path):
    lineage = lineage_of(tmp_path)._replace(training=None, source="models/base")
    text = model_card(lineage)
    assert "from models/base; its weights were not trained here." in text
    assert "## Training" not in text and "base_model" not in text


@pytest.mark.parametrize(
    ("objective", "metric", "name"),
    [
        (config.NextToken(name="next_token"), "cross-entropy", "held-out loss at step 3: cross-entropy in nats a token"),
        (config.Preference(name="preference"), "loss", "held-out loss at step 3: loss of a pair of answers"),
        (config.Reward(name="reward"), "loss", "held-out loss at step 3: loss of a pair of answers"),
        (
            config.Classification.model_validate({"name": "classification", "labels": {"t": ["a", "b"]}}, strict=False),
            "cross-entropy",
            "held-out loss at step 3: cross-entropy in nats a text",
        ),
    ],
)
def test_the_held_out_loss_is_that_of_the_objective(tmp_path, objective, metric, name):
    lineage = lineage_of(tmp_path)
    run = lineage.training.run.model_copy(update={"objective": objective})
    scores = getattr(objective, "scores", None)
    model = lineage.model.model_copy(update={"scores": scores})
    text = model_card(lineage._replace(training=lineage.training._replace(run=run), model=model))
    metadata = yaml.safe_load(text.split("---\n", 2)[1])
    task = "text-generation" if scores is None else "text-classification"
    (result,) = metadata["model-index"][0]["results"]
    assert metadata["pipeline_tag"] == task and result["task"] == {"type": task}
    assert (result["metrics"][0]["type"], result["metrics"][0]["name"]) == (metric, name)
    assert f"| held-out loss | step | {objective.loss_unit} |" in text


@pytest.mark.parametrize(
    ("carried_input", "task"), [("image", "image-text-to-text"), ("audio", "audio-text-to-text"), (None, "text-generation")]
)
def test_the_task_of_a_multimodal_model_is_its_own(tmp_path, carried_input, task):
    lineage = lineage_of(tmp_path)._replace(carried_input=carried_input)
    assert yaml.safe_load(model_card(lineage).split("---\n", 2)[1])["pipeline_tag"] == task
