"""The model card states what the records state, and TODO for the rest."""

from __future__ import annotations

import pytest
import yaml

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
