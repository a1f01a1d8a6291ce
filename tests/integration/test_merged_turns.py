"""The loss of an example with several turns is the sum of the losses of an example for each turn."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_train import config
from moe_train.data.batches.batch import Batch, StoredPiece
from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.chat.example import Example
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine, parameters
from moe_train.model.transformer import abstract_model
from moe_train.train.token_logprobs import batch_logprobs
from tests.data.chat import trajectories
from tests.data.hugging_face import small_tekken
from tests.random_parameters import random_parameters
from tests.tiny import MIXTRAL, ONE

SEQ_LEN = 768
MADE = trajectories.conversation(
    trajectories.asked(),
    *(trajectories.called(i, parallel=1 + i % 2, weight=int(i != 1), backwards=True) for i in range(3)),
    trajectories.said(),
    trajectories.asked("And now?"),
    trajectories.called(3),
    trajectories.said("Done."),
)


def batch_of(made: list[Example]) -> Batch:
    """A row for each example."""
    batch = Batch.empty(8, SEQ_LEN)
    for row, example in enumerate(made):
        batch.fill_row(row, [StoredPiece(np.asarray(example.tokens), np.asarray(example.loss_mask))])
    return batch


def test_the_losses_are_the_same(tmp_path: Path) -> None:
    tokenizer = Mistral(small_tekken(tmp_path, "v13"))
    separate = trajectories.separate(MADE, None, tokenizer)
    merged = examples(MADE, None, tokenizer)
    assert (len(merged), len(separate)) == (1, 5)
    model = MIXTRAL.model_copy(update={"vocab_size": tokenizer.vocab_size, "max_seq_len": SEQ_LEN})
    with jax.set_mesh(ONE):
        compute = config.Compute(grouped_matmul="reference", attention="reference")
        structure, _ = parameters(abstract_model(model, compute, None))
        weights = random_parameters(model, scale=0.3)

        def losses(batch: Batch) -> jax.Array:
            outputs, _ = batch_logprobs(combine(structure, weights), batch)
            return jnp.where(batch.loss_mask, -outputs.logprob, 0)

        of_merged, of_separate = (np.asarray(jax.jit(losses)(put_batch(batch_of(made), ONE))) for made in (merged, separate))
    for row, example in enumerate(separate):
        place = [i for i, mask in enumerate(example.loss_mask or ()) if mask]
        assert of_merged[0, [i - 1 for i in place]] == pytest.approx(of_separate[row, [i - 1 for i in place]], rel=1e-4, abs=1e-4)
    assert of_merged.sum() == pytest.approx(of_separate.sum(), rel=1e-5) != 0
