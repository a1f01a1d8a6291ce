"""Log-likelihood of continuations against the logits of each sequence alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.evaluate.suites.likelihood import Continuation, log_likelihoods, scored_continuations
from moe_train.machine.mesh import put_batch
from moe_train.model.parameters import combine
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model
from tests.meshes import mesh_of

RANDOM = np.random.default_rng(0)
CONTINUATIONS = [
    Continuation(RANDOM.integers(0, 300, n).tolist(), RANDOM.integers(0, 300, m).tolist()) for n, m in ((1, 3), (40, 1), (60, 30))
]


EIGHT = mesh_of(config.Mesh(expert=2, context=2, tensor=2))


def test_on_a_mesh_of_eight_as_each_alone_on_one_device() -> None:
    with jax.set_mesh(ONE):
        structure, weights = random_model(MIXTRAL)

        @jax.jit
        def logprobs(*batch: jax.Array) -> jax.Array:
            model = combine(structure, weights)
            return jax.nn.log_softmax(model.logits(model(*batch)[0]), axis=-1)

        expected = []
        greedy = []
        for prompt, text in CONTINUATIONS:
            sequence = np.array([*prompt, *text], np.int32)
            padded = np.zeros((1, 128), np.int32)
            padded[0, : len(sequence)] = sequence
            segments = (np.arange(128)[None] < len(sequence)).astype(np.int32)
            table = np.asarray(logprobs(*put_batch((padded, np.arange(128, dtype=np.int32)[None], segments), ONE)))[0]
            expected.append(sum(table[t - 1, sequence[t]] for t in range(len(prompt), len(sequence))))
            best = int(table[len(prompt) - 1].argmax())
            greedy.append(Continuation(prompt, [best]))
    with jax.set_mesh(EIGHT):
        computed = log_likelihoods(*random_model(MIXTRAL), EIGHT, CONTINUATIONS, batch_size=2)
        scored = scored_continuations(*random_model(MIXTRAL), EIGHT, [*CONTINUATIONS, *greedy], batch_size=2)
    assert computed == pytest.approx(expected, rel=1e-4)
    assert [one.log_likelihood for one in scored[:3]] == pytest.approx(expected, rel=1e-4)
    assert [one.is_greedy for one in scored] == [False] * 3 + [True] * 3
