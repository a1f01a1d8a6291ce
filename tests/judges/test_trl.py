"""TRL as the judge: its own loss code on the same log-probabilities, and on the same tiny Mixtral with gradients.

It needs trl 1.16 (`pip install --no-deps trl==1.16.0 accelerate datasets`); without it the tests are skipped.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_train import config
from moe_train.data.batches.answer_batches import PreferenceBatch, UnpairedBatch
from moe_train.data.batches.batch import StoredPiece
from moe_train.machine.mesh import put_batch
from moe_train.model import parameters as flat
from moe_train.train.gradients import step_gradients
from moe_train.train.objectives.choose import objective_of
from moe_train.train.objectives.objective import ModelWeights
from moe_train.train.objectives.preference_losses import PairLogprobs, pair_losses
from moe_train.train.step_definition import StepDefinition
from moe_train.train.token_logprobs import batch_logprobs
from moe_train.weights import names
from tests.judges.test_transformers_and_peft import distance, load, random_judge
from tests.tiny import EIGHT, ONE
from tests.train.objectives.judged_rows import piece
from tests.train.objectives.test_preference_losses import LOSSES, pairs, section_of

pytestmark = pytest.mark.judges


def trainer_of(kind: str, **settings: Any) -> Any:
    """A TRL trainer that has only what its loss needs: neither data nor an optimizer."""
    trl = pytest.importorskip("trl")
    if kind in ("CPO", "ORPO"):
        module = __import__(f"trl.experimental.{kind.lower()}", fromlist=["_"])
        trainer_class = getattr(module, f"{kind}Trainer")
    else:
        trainer_class = getattr(trl, f"{kind}Trainer")
    trainer = trainer_class.__new__(trainer_class)
    gather = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu", unwrap_model=lambda x: x)
    trainer.__dict__.update(
        accelerator=gather,
        aux_loss_enabled=False,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    trainer.model = SimpleNamespace(training=True)
    return trainer


class GivenLogprobs:
    """A model that answers with given sums of log-probabilities, as one token of each answer."""

    def __init__(self, sums: Any, width: int) -> None:
        torch = pytest.importorskip("torch")
        self.log_probs = torch.zeros(len(sums), width)
        self.log_probs[:, 0] = torch.tensor(np.asarray(sums))

    def __call__(self, **kwargs: Any) -> Any:
        zeros = self.log_probs * 0
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros > 1, aux_loss=None)


def loss_of_trl(name: str, section: config.Preference, values: PairLogprobs) -> float:
    """The mean loss that TRL's code computes from the same log-probabilities of pairs."""
    torch = pytest.importorskip("torch")
    l_w, l_l, ref_w, ref_l, n_w, n_l = (torch.tensor(np.asarray(x)) for x in values)
    if section.loss == "simpo":
        margin = 0.5 if section.margin is None else section.margin
        trainer = trainer_of(
            "CPO", alpha=0.0, beta=section.beta, simpo_gamma=margin, label_smoothing=section.label_smoothing, loss_type="simpo"
        )
        return float(trainer.cpo_loss(l_w / n_w, l_l / n_l)[0].mean())
    if section.loss == "orpo":
        return float(-trainer_of("ORPO", beta=section.beta).odds_ratio_loss(l_w / n_w, l_l / n_l)[0].mean())
    width = int(max(n_w.max(), n_l.max()))
    counts = torch.cat([n_w, n_l]).long()
    mask = torch.cat([torch.zeros(len(counts), 1), torch.arange(width)[None] < counts[:, None]], 1).long()
    loss_type = "sigmoid_norm" if section.length_normalized else section.loss
    trainer = trainer_of(
        "DPO", beta=section.beta, label_smoothing=section.label_smoothing, loss_types=[loss_type], loss_weights=[1.0]
    )
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": ref_w, "ref_rejected_logps": ref_l}
    return float(trainer._compute_loss(GivenLogprobs(torch.cat([l_w, l_l]), width), inputs, return_outputs=False))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_from_the_same_log_probabilities_are_those_of_trl(name: str) -> None:
    pytest.importorskip("trl")
    section = section_of(name)
    ours = float(jnp.mean(pair_losses(section, pairs())))
    assert ours == pytest.approx(loss_of_trl(name, section, pairs()), rel=1e-6)


def judged(count: int, answers: int) -> list[StoredPiece]:
    """Pairs, or labelled answers of which each third is good, set against the answer of the one before."""
    rng = np.random.default_rng(5)
    pieces = [piece(rng, answers, (float(i % 3 == 0),)) for i in range(count)]
    if answers == 2:
        return pieces
    return [own._replace(mismatched=pieces[i - 1]) for i, own in enumerate(pieces)]


def rows_of(batch_type: Any, pieces: list[StoredPiece]) -> Any:
    """Two pieces to a row, in eight rows."""
    batch = batch_type.empty(8, 20)
    for row in range(8):
        batch.fill_row(row, pieces[2 * row : 2 * row + 2])
    return batch


def padded(segments: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Any, Any, Any]:
    """(ids, attention mask, completion mask) of texts, filled up to equal length."""
    torch = pytest.importorskip("torch")
    width = max(len(ids) for ids, _ in segments)
    arrays = torch.zeros(3, len(segments), width, dtype=torch.long)
    for i, (ids, mask) in enumerate(segments):
        arrays[0, i, : len(ids)] = torch.tensor(ids)
        arrays[1, i, : len(ids)] = 1
        arrays[2, i, : len(ids)] = torch.tensor(mask.astype(np.int64))
    return tuple(arrays)


class Models:
    """A policy and a reference in transformers, and the same in this package."""

    def __init__(self, directory: Path) -> None:
        torch = pytest.importorskip("torch")
        trl_utils = __import__("trl.trainer.utils", fromlist=["add_fused_lm_head"])
        self.policy = random_judge("mixtral")
        self.reference = random_judge("mixtral")
        for parameter in self.reference.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
        self.policy.save_pretrained(directory / "policy")
        self.reference.save_pretrained(directory / "reference")
        self.directory = directory
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        for model in (self.policy, self.reference):
            trl_utils.add_fused_lm_head(model, outputs=outputs)

    def ours(self, section: Any, batch: Any, mesh: Any) -> tuple[Any, config.Model]:
        """Loss and gradients of this package, the reference's log-probabilities being stored in the batch."""
        with jax.set_mesh(mesh):
            model, structure, policy = load(self.directory / "policy")
            _, _, reference = load(self.directory / "reference")
            arrays = put_batch(batch, mesh)
            every = arrays
            if isinstance(arrays, UnpairedBatch):
                every = arrays._replace(segment_ids=arrays.segment_ids + arrays.mismatched_ids)
            logprobs = jax.jit(lambda weights, rows: batch_logprobs(flat.combine(structure, weights), rows)[0].logprob)
            arrays = arrays._replace(reference=logprobs(reference, every))
            definition = StepDefinition(structure, objective_of(section), optax.identity())
            run = jax.jit(partial(step_gradients, definition, key=None))
            return jax.device_get(run(policy, ModelWeights({}, {}, {}), arrays)), model

    def check_gradients(self, gradients: Any, model: config.Model) -> None:
        """Compare the gradients of every weight with those that torch accumulated."""
        state = dict(self.policy.named_parameters())
        for weight in names.weight_pieces(model, names.hugging_face(experts="fused")):
            ours = weight.to_file(gradients[weight.path][weight.lead])
            part = tuple(at if isinstance(at, int) else slice(*at) for at in weight.part)
            assert distance(ours, state[weight.name].grad.numpy()[part]) < 1e-3, weight.name


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one device", "eight"])
def test_a_step_of_dpo_is_that_of_trl(mesh: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    models = Models(tmp_path)
    pieces = judged(16, answers=2)
    segments = [list(piece.segments()) for piece in pieces]
    ordered = [(pair[k].tokens, pair[k].loss_mask) for k in (0, 1) for pair in segments]
    ids, attention, completion = padded(ordered)
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    trainer = trainer_of("DPO", beta=0.1, label_smoothing=0.0, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    trainer.precompute_ref_logps = False
    trainer.ref_model = models.reference
    trainer.args = SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None)
    trainer.model = models.policy.train()
    loss = trainer._compute_loss(models.policy, inputs, return_outputs=False)
    loss.backward()

    section = config.Preference(name="preference", sft_weight=0.5)
    step, model = models.ours(section, rows_of(PreferenceBatch, pieces), mesh)
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    metrics = {name: metric.sum / metric.weight for name, metric in step.terms.metrics.items()}
    for name, values in trainer._metrics["train"].items():
        if name in metrics:
            assert metrics[name] == pytest.approx(values[-1], rel=1e-4, abs=1e-5), name
    assert {"rewards/chosen", "rewards/accuracies", "logps/rejected", "entropy"} <= metrics.keys()
    models.check_gradients(step.gradients, model)


@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one device", "eight"])
def test_a_step_of_kto_is_that_of_trl(mesh: Any, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    torch = pytest.importorskip("torch")
    models = Models(tmp_path)
    pieces = judged(16, answers=1)
    own = [next(piece.segments()) for piece in pieces]
    mismatched = []
    for i, segment in enumerate(own):
        before = own[i - 1]
        tokens = np.concatenate([segment.tokens[:2], before.tokens[2:]])
        mismatched.append((tokens, np.arange(len(tokens)) >= 2))
    ids, attention, completion = padded([(segment.tokens, segment.loss_mask) for segment in own])
    kl_ids, kl_attention, kl_completion = padded(mismatched)
    inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
    inputs |= {"KL_input_ids": kl_ids, "KL_attention_mask": kl_attention, "KL_completion_mask": kl_completion}
    inputs["label"] = torch.tensor([piece.values[0] == 1 for piece in pieces if piece.values is not None])
    trainer = trainer_of("KTO", beta=0.1, loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=1.0)
    trainer.precompute_ref_logps = False
    trainer.ref_model = models.reference
    trainer.args = SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None)
    trainer.model = models.policy.train()
    loss = trainer._compute_loss(models.policy, inputs, return_outputs=False)
    loss.backward()

    section = config.UnpairedPreference(name="unpaired_preference", desirable_weight=1.5)
    step, model = models.ours(section, rows_of(UnpairedBatch, pieces), mesh)
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    metrics = {name: metric.sum / metric.weight for name, metric in step.terms.metrics.items()}
    assert metrics["kl"] == pytest.approx(trainer._metrics["train"]["kl"][0], rel=1e-4, abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "entropy"):
        assert metrics[name] == pytest.approx(trainer._metrics["train"][name][0], rel=1e-4, abs=1e-5), name
    models.check_gradients(step.gradients, model)
