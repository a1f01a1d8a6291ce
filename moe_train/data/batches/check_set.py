"""Checks that a prepared set holds what the objective's batches need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from moe_train.data.batches.answer_batches import PreferenceBatch, SharedPromptBatch, UnpairedBatch
from moe_train.data.batches.batch import PackedBatch
from moe_train.data.batches.classification_batch import ClassificationBatch
from moe_train.data.batches.distillation_batch import DistillationBatch
from moe_train.data.batches.feature_batch import FeatureBatch
from moe_train.data.batches.media_batch import MediaBatch, check_sizes
from moe_train.data.batches.packing import TooLong
from moe_train.data.batches.reward_batch import RewardBatch
from moe_train.data.media import MediaRules
from moe_train.data.prepared.store import TokenStore
from moe_train.data.sound.rules import SoundRules

_KINDS: tuple[tuple[type[PackedBatch], str], ...] = (
    (PreferenceBatch, "preference"),
    (SharedPromptBatch, "preference"),
    (RewardBatch, "preference"),
    (UnpairedBatch, "labelled"),
    (ClassificationBatch, "classification"),
)
"""Batch types, and the kind of records that their rows are made from."""


def check_set(batch_type: type[PackedBatch], name: str, store: TokenStore, seq_len: int, too_long: TooLong) -> None:
    """Check the kind of the records, and their labels, pictures, sound or the predictions of a teacher, if batches have them.

    Args:
        batch_type: the batch type of the objective.
        name: the name of the source, for messages.
        store: its set.
        seq_len: positions in a row.
        too_long: what happens to longer examples.

    Raises:
        ValueError: the records are of another kind, the labels are others, pictures or sound have no place, or there are no
            predictions that belong to these rows.
    """
    kind = str(store.manifest.rules.record["name"])
    for needing, needed in _KINDS:
        if issubclass(batch_type, needing) and kind != needed:
            raise ValueError(
                f"{name} was prepared from records of kind {kind}, and the objective reads {needed}; prepare other records, or "
                "choose another objective"
            )
    if issubclass(batch_type, ClassificationBatch):
        _check_labels(cast(type[ClassificationBatch], batch_type), name, store)
    if issubclass(batch_type, FeatureBatch):
        # Stored features stand for pictures or sound, and have the same sizes.
        batch_type = cast(type[FeatureBatch], batch_type).computed_type()
    if store.manifest.media is not None:
        _check_media(batch_type, name, store.manifest.media, too_long)
    if issubclass(batch_type, DistillationBatch):
        _check_teacher(cast(type[DistillationBatch], batch_type), name, store, seq_len, too_long)


def _check_labels(batch_type: type[ClassificationBatch], name: str, store: TokenStore) -> None:
    stated = store.manifest.rules.record.get("targets")
    if stated != [target.model_dump(mode="json") for target in batch_type.targets]:
        raise ValueError(f"{name} was prepared with other labels than objective.labels; state the same, or prepare it again")


def _check_media(batch_type: type[PackedBatch], name: str, rules: MediaRules, too_long: TooLong) -> None:
    """Raise ValueError unless the batches have room for pictures or sound, and the tower takes them as they became tokens."""
    encoder = cast(type[MediaBatch], batch_type).encoder if issubclass(batch_type, MediaBatch) else None
    if encoder is None or encoder.media != rules.media:
        section = "audio" if isinstance(rules, SoundRules) else "vision"
        raise ValueError(
            f"{name} has records with {rules.media}; set {section}: {{}} in the config to train on them with the tower of "
            "init_from and objective next_token, or drop the records"
        )
    if too_long in ("split", "truncate"):
        raise ValueError(f"{name} has {rules.media}, and too_long {too_long} would cut it; set record.too_long to drop or error")
    check_sizes(encoder, rules, name)


def check_varied_labels(batch_type: type[PackedBatch], stores: Sequence[TokenStore]) -> None:
    """Raise ValueError if all texts of all sources have the same labels of a target, so that nothing tells one from another."""
    if not issubclass(batch_type, ClassificationBatch):
        return
    labels = np.concatenate([store.values for store in stores])
    start = 0
    for target in cast(type[ClassificationBatch], batch_type).targets:
        flags = labels[:, start : start + len(target.labels)]
        start += len(target.labels)
        known = flags[~np.isnan(flags[:, 0])]
        if not len(known) or (known == known[0]).all():
            chosen = [label for label, flag in zip(target.labels, known[0] if len(known) else (), strict=False) if flag]
            stated = (
                f"the same labels of target {target.name} ({', '.join(chosen) or 'none'})" if len(known) else f"no {target.name}"
            )
            raise ValueError(
                f"{stores[0].where(0)}: this and all other texts ({len(labels)}) have {stated}, so nothing tells one label from "
                "another; add records with others"
            )


def _check_teacher(batch_type: type[DistillationBatch], name: str, store: TokenStore, seq_len: int, too_long: TooLong) -> None:
    teacher = store.manifest.teacher
    if teacher is None:
        raise ValueError(
            f"{name} has no predictions of a teacher; run moe-train data prepare CONFIG --teacher MODEL, and name the set that it "
            "prints in the config: {name: prepared, path: …}"
        )
    if teacher.top_k < batch_type.top_k:
        raise ValueError(
            f"{name} holds {teacher.top_k} tokens of the teacher at each position, fewer than objective.top_k {batch_type.top_k}; "
            "lower it, or prepare the set again with --top-k"
        )
    if teacher.temperature != batch_type.temperature:
        raise ValueError(
            f"{name} holds predictions at temperature {teacher.temperature:g}, not objective.temperature "
            f"{batch_type.temperature:g}; set it to that, or prepare the set again"
        )
    longest = int(np.max(store.lengths(), initial=0))
    is_cut = longest > min(teacher.seq_len, seq_len)
    if is_cut and (seq_len > teacher.seq_len or (seq_len != teacher.seq_len and "split" in (too_long, teacher.too_long))):
        raise ValueError(
            f"{name} has examples of up to {longest} positions, which the teacher read in rows of {teacher.seq_len}, not of "
            f"train.seq_len {seq_len}; set it to {teacher.seq_len}, or prepare the set again"
        )
    if is_cut and too_long != teacher.too_long:
        raise ValueError(
            f"{name}: longer examples are handled with too_long {too_long}, and the teacher read them with {teacher.too_long}; "
            "state that"
        )
