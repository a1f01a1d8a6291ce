"""transformers as the judge of classifiers and reward models: scores of exports, padded batches included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint.model_dir import read_model
from moe_train.commands.text_scorer import NamedText, TextScorer
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.commands.write_and_prove import WriteOptions, export_model
from moe_train.weights.texts import Texts
from tests.meshes import mesh_of
from tests.random_parameters import random_parameters
from tests.tiny import MINISTRAL, MIXTRAL

pytestmark = pytest.mark.judges
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ONE = mesh_of(config.Mesh())
MOOD = config.ScoreTarget(name="mood", labels=("good", "bad", "none"))
TOPICS = config.ScoreTarget(name="topics", labels=("a", "b"), several=True)
HEADS = {"mood": config.ScoreHead(targets=(MOOD,)), "topics": config.ScoreHead(targets=(TOPICS,)), "reward": config.ScoreHead()}
MODELS: dict[str, config.Model] = {
    "mixtral": MIXTRAL,
    "ministral": MINISTRAL.model_copy(update={"tie_embeddings": False}),
    "mistral": MINISTRAL.model_copy(update={"family": "mistral", "tie_embeddings": False, "attention": MIXTRAL.attention}),
}
TEXTS = ["some text to learn from", "text", "learn to learn", "from some", "some some some some"]


@pytest.mark.parametrize(
    ("family", "head"), [("mixtral", "mood"), ("mistral", "topics"), ("ministral", "reward"), ("mixtral", "reward")]
)
def test_scores_of_an_export(family: str, head: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text to learn from"] * 5, 270, tmp_path / "tokenizer")
    model = MODELS[family].model_copy(update={"vocab_size": 280, "scores": HEADS[head]})
    with jax.set_mesh(ONE):
        weights = random_parameters(model, scale=0.3)
        export_model(weights, model, tmp_path / "hf", WriteOptions(dtype="float32", texts=Texts(tokenizer)))
    assert read_model(tmp_path / "hf").scores == HEADS[head]
    ours = TextScorer(tmp_path / "hf").score([NamedText(text, text) for text in TEXTS])

    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert not isinstance(loaded, transformers.PreTrainedModel) or type(loaded).__name__.endswith("ForSequenceClassification")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    pad = loaded.config.pad_token_id
    assert pad is not None
    rows = [own(text)["input_ids"] for text in TEXTS]
    assert not any(pad in row for row in rows)
    with torch.no_grad():
        alone = np.concatenate([loaded(torch.tensor([row])).logits.numpy() for row in rows])
        length = max(map(len, rows))
        padded = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        together = loaded(padded, attention_mask=(padded != pad).long()).logits.numpy()
    np.testing.assert_allclose(alone, ours, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(together, ours, rtol=1e-4, atol=1e-5)
    if head != "reward":
        assert list(loaded.config.id2label.values()) == list(HEADS[head].output_names)
