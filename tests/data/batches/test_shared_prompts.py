"""The positions that both answers of a pair share, in stores and in rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.answer_batches import PreferenceBatch, SharedPromptBatch
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.shared_prompts import share_saved, shared_positions
from moe_train.data.prepared.store import TokenStore
from moe_train.data.tokenizers.huggingface import HuggingFace

RECORD = config.PreferenceRecord(name="preference")


@pytest.fixture
def loaders(tokenizer: HuggingFace, tmp_path: Path, write_lines: Callable[..., Path]) -> list[Loader]:
    """The same pairs in rows of both layouts; the longest pair fits only with one prompt."""
    pairs = [{"prompt": "fox " * n, "chosen": "dog " * 2, "rejected": "cat " * 3} for n in (0, 1, 5, 20, 33, 60)]
    source = config.FileSource(
        name="files", files=(str(write_lines("pairs.jsonl", pairs)),), record=RECORD.model_copy(update={"too_long": "drop"})
    )
    data = config.Data(train=(source,), cache_dir=str(tmp_path / "cache"), tokenizer=None)
    rows = BatchRows(2, 128)
    return [Loader(data, "train", tokenizer, rows, seed=0, batch_type=kind) for kind in (PreferenceBatch, SharedPromptBatch)]


def test_rows_hold_more_pairs_with_the_same_targets(loaders: list[Loader]) -> None:
    plain, shared = loaders
    assert shared.num_dropped < plain.num_dropped and shared.num_rows <= plain.num_rows
    answers: list[dict[tuple[int, ...], int]] = []
    for loader in loaders:
        seen: dict[tuple[int, ...], int] = {}
        for step in range(-(-loader.num_rows // 2)):
            batch = loader.batch(step)
            for row in range(2):
                for answer in range(1, int(batch.answer_ids[row].max()) + 1):
                    own = (batch.answer_ids[row] == answer) & batch.loss_mask[row]
                    seen[(*batch.targets[row, own].tolist(), *batch.positions[row, own].tolist())] = answer % 2
        answers.append(seen)
    assert len(answers[0]) >= 8 and answers[0].items() < answers[1].items()
    store = loaders[0].sources[0].store
    positions = shared_positions(store)
    assert share_saved([store]) == positions.sum() / store.lengths().sum() > 0.4
    assert (np.diff(positions) > 0).all()


def test_a_set_of_an_older_version_is_not_shared(loaders: list[Loader]) -> None:
    class OldStore:
        path = "old/set"
        values = np.zeros((3, 1))

    old = cast(TokenStore, cast(Any, OldStore()))
    assert share_saved([loaders[0].sources[0].store, old]) == 0
    with pytest.raises(ValueError, match=r"old/set was prepared by an older version, .* or set objective.shared_prompt to false"):
        shared_positions(old)
