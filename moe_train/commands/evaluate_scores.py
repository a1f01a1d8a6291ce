"""`moe-train evaluate --data` for a model with a head for classification or rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.commands.text_scorer import NamedText, TextScorer
from moe_train.data.records.answers import conversations_of
from moe_train.data.records.conversation import normalise
from moe_train.data.records.normal_form import ClassifiedText, NormalRecord, PreferencePair
from moe_train.data.records.open_source import open_source
from moe_train.data.records.problem import located
from moe_train.evaluate.label_metrics import label_metrics
from moe_train.machine.files import JsonObject


def evaluate_scores(directory: Path, files: Sequence[Path], run: config.Run | None, chat_template: str | None = None) -> JsonObject:
    """Compare the scores of a classifier with the labels of records, or those of a reward model with preference pairs.

    Args:
        directory: the run or model.
        files: files of records: `text` or `messages` with `labels`, or `prompt`, `chosen` and `rejected`.
        run: the record of the run, whose record sections are used; None for a model.
        chat_template: a jinja file, its text, or a name; None for the template of the run or of the model's tokenizer.

    Returns:
        For a classifier `labels`, a row for each target and label (see `label_metrics`); for a reward model the share of pairs
        whose chosen answer has the higher reward, and the mean margin.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: with file and line, for a record that cannot be used.
    """
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"--data {file}: no such file")
    scorer = TextScorer(directory, chat_template)
    section = _section(scorer.head, run)
    records = [record for file in files for record in _records(file, section)]
    if scorer.head.targets:
        return _classified(scorer, records)
    return _pairs(scorer, records)


def _section(head: config.ScoreHead, run: config.Run | None) -> config.Record:
    """Return how records are read: as in the run, or by the usual names."""
    sources = (*run.data.eval, *run.data.train) if run is not None and isinstance(run.data, config.RunData) else ()
    for source in sources:
        if isinstance(source, config.RecordSource):
            return source.record
    if head.targets:
        return config.ClassificationRecord(name="classification", targets=head.targets)
    return config.PreferenceRecord(name="preference")


def _records(file: Path, section: config.Record) -> Iterator[tuple[str, NormalRecord]]:
    """Yield (location, record) for each record of a file."""
    records = open_source(config.FileSource(name="files", files=(str(file),), record=section))
    for origin, fields in records:
        location = records.where(origin)
        normal: Any = located(location, normalise, fields, section)
        yield location, normal


def _classified(scorer: TextScorer, records: Sequence[tuple[str, NormalRecord]]) -> JsonObject:
    texts = []
    labels = []
    for location, record in records:
        assert isinstance(record, ClassifiedText)
        texts.append(NamedText(record.content, location))
        labels.append(record.labels)
    scores_NY = scorer.score(texts)
    return {"records": len(texts), "labels": label_metrics(scorer.head, scores_NY, np.array(labels))}


def _pairs(scorer: TextScorer, records: Sequence[tuple[str, NormalRecord]]) -> JsonObject:
    texts = []
    for location, record in records:
        assert isinstance(record, PreferencePair)
        texts += [NamedText(conversation, f"{location}: {name}") for name, conversation in conversations_of(record)]
    rewards_N2 = scorer.score(texts).reshape(-1, 2)
    margins_N = rewards_N2[:, 0] - rewards_N2[:, 1]
    return {
        "records": len(records),
        "accuracy": float(np.mean(margins_N > 0)),
        "margin": float(np.mean(margins_N)),
        "rewards/chosen": float(np.mean(rewards_N2[:, 0])),
        "rewards/rejected": float(np.mean(rewards_N2[:, 1])),
    }
