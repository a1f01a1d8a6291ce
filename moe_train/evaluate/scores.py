"""Scores of whole texts by a model with a head for classification or rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_train import config
from moe_train.machine.mesh import BATCH, put_batch
from moe_train.model.transformer import Transformer

_SHORTEST = 16  # positions of the shortest rows


class Scorer:
    """A loaded model that scores texts. The mesh has to be in force whenever it is used.

    Args:
        transformer: the model with its weights, adapters included.
        model: its architecture.
        mesh: the mesh.
        rows: texts that are scored at once, rounded up to a multiple of the devices that split them.
    """

    def __init__(self, transformer: Transformer, model: config.Model, mesh: Mesh, rows: int = 8) -> None:
        assert model.scores is not None, "callers refuse language models"
        self._transformer = transformer
        self._model = model
        self._mesh = mesh
        replicas = math.prod(mesh.shape[axis] for axis in BATCH)
        self._rows = -(-rows // replicas) * replicas
        self._scores = jax.jit(_scores_at_all_positions)

    def score(
        self, texts: Sequence[Sequence[int]], names: Sequence[str], report: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """Return (N, Y) float32 the scores of each text, read at its last token, before any softmax.

        Args:
            texts: token ids of each text.
            names: what each is called in a message, such as its file and line.
            report: called with the number of texts that were scored.

        Raises:
            ValueError: a text is longer than the model's max_seq_len.
        """
        for tokens, name in zip(texts, names, strict=True):
            if len(tokens) > self._model.max_seq_len:
                raise ValueError(
                    f"{name}: the text has {len(tokens)} tokens, more than the model's max_seq_len {self._model.max_seq_len}; "
                    "shorten it"
                )
        assert self._model.scores is not None
        scores = np.zeros((len(texts), self._model.scores.num_outputs), np.float32)
        # Texts of similar length share a batch, whose length is a power of two, so that few programs are compiled.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self._rows):
            group = order[start : start + self._rows]
            scores[group] = self._score_batch([texts[i] for i in group])
            report(len(group))
        return scores

    def _score_batch(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        longest = max(len(tokens) for tokens in texts)
        length = max(_SHORTEST, 2 ** math.ceil(math.log2(longest)))
        # Two chunks for each device along `context`, as in training.
        length += -length % (2 * self._mesh.shape["context"])
        tokens_BT = np.zeros((self._rows, length), np.int32)
        segment_ids_BT = np.zeros_like(tokens_BT)
        for row, tokens in enumerate(texts):
            tokens_BT[row, : len(tokens)] = tokens
            segment_ids_BT[row, : len(tokens)] = 1
        positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), tokens_BT.shape).copy()
        arrays = put_batch((tokens_BT, positions_BT, segment_ids_BT), self._mesh)
        scores_BTY = np.asarray(jax.device_get(self._scores(self._transformer, *arrays)))
        return np.stack([scores_BTY[row, len(tokens) - 1] for row, tokens in enumerate(texts)])


def _scores_at_all_positions(
    transformer: Transformer, tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array
) -> Float[Array, "B T Y"]:
    hidden_BTD, _ = transformer(tokens_BT, positions_BT, segment_ids_BT)
    return transformer.logits(hidden_BTD)


def probabilities(target: config.ScoreTarget, scores_NY: np.ndarray) -> np.ndarray:
    """Return (N, Y) the probability of each label of a target, given its scores."""
    scores_NY = scores_NY.astype(np.float64)
    if target.several:
        return 1 / (1 + np.exp(-scores_NY))
    exps_NY = np.exp(scores_NY - scores_NY.max(axis=1, keepdims=True))
    return exps_NY / exps_NY.sum(axis=1, keepdims=True)


def predicted(target: config.ScoreTarget, probabilities_NY: np.ndarray) -> np.ndarray:
    """Return (N, Y) whether each label is predicted: the likeliest one, or each above one half where there may be several."""
    if target.several:
        return probabilities_NY > 0.5
    return np.arange(len(target.labels)) == probabilities_NY.argmax(axis=1)[:, None]


def outputs_of(head: config.ScoreHead) -> list[tuple[config.ScoreTarget, slice]]:
    """Return each target with its outputs."""
    outputs = []
    start = 0
    for target in head.targets:
        stop = start + len(target.labels)
        outputs.append((target, slice(start, stop)))
        start = stop
    return outputs
