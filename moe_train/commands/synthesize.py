"""`moe-train synthesize`: records for training from the answers of a model, kept or ranked by a grader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import yaml
from pydantic import TypeAdapter, ValidationError

from moe_train import config
from moe_train.checkpoint.identity import WeightsIdentity, weights_identity
from moe_train.checkpoint.model_dir import open_model
from moe_train.commands.evaluate_suite import template_of
from moe_train.config.strict_yaml import ConfigError
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.suites.answer import Answer, answer_items, prompter_of
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.items import SuiteItem, read_items
from moe_train.evaluate.suites.load import LoadedSuite, SuiteOptions, load_suite, suite_of_items
from moe_train.evaluate.suites.prompts import Prompter
from moe_train.evaluate.synthesis import (
    AnswerCounts,
    RecordForm,
    SampledAnswer,
    SynthesizedRecord,
    records_of,
    sort_answers,
    turn_of,
)
from moe_train.machine.files import JsonObject, new_directory, refuse_existing, write_text


class SynthesisOptions(NamedTuple):
    """How answers are sampled, and what becomes of them."""

    samples: int = 4
    """Number of answers to each question."""
    form: RecordForm = "sft"
    """The kind of records."""
    grader: str | None = None
    """Name of a grader, or its settings as YAML; None for the grader of the suite."""
    min_score: float = 1.0
    """Smallest score of an accepted answer."""
    temperature: float = 1.0
    """Temperature of sampling."""
    max_tokens: int | None = None
    """Most tokens of an answer; None for the suite's setting."""
    seed: int = 0
    """Seed of sampling; another seed gives other answers."""
    chat_template: str | None = None
    """A jinja file, its text, or a name; None for the template of the run or of the model's tokenizer."""
    batch_size: int | None = None
    """Number of answers that are generated together; None for the suite's setting."""


def synthesize(
    prompts: Path,
    teacher: Path,
    out: Path,
    options: SynthesisOptions = SynthesisOptions(),  # noqa: B008 (immutable)
    suite_options: SuiteOptions = SuiteOptions(),  # noqa: B008 (immutable)
) -> JsonObject:
    """Sample answers of a model to questions, grade them, and write records.

    Args:
        prompts: a file of items, or the YAML file of a suite, whose prompt settings are used then.
        teacher: the run or model that answers; the model that is trained itself, for a further round of it.
        out: directory to create: records.jsonl, origins.jsonl (for each record its question, samples and scores) and manifest.json.
        options: how answers are sampled, and what becomes of them.
        suite_options: where the suite's data and graders are.

    Returns:
        Counts of questions, answers and records.

    Raises:
        FileNotFoundError: a file or the model does not exist.
        ValueError: an item, a setting or the grader is not valid, with file and line; nothing was generated then. Or no answer
            became a record.
    """
    refuse_existing(out)
    loaded = load_questions(prompts, options, suite_options)
    opened = open_model(teacher)
    identity = weights_identity(teacher)
    prompter = prompter_of(loaded, opened.tokenizer, template_of(opened, options.chat_template))
    # Each sample is an item of its own: its draws depend on its place in the list.
    repeated = [item for item in loaded.items for _ in range(options.samples)]
    with jax.set_mesh(opened.mesh):
        structure, weights = opened.load()
        model = LoadedModel(structure, weights, opened.model, opened.mesh, opened.compute.dtype)
        answers = answer_items(loaded._replace(items=repeated), prompter, model)
    result = _records(loaded, prompter, answers, options)
    if not result.records:
        raise ValueError(
            f"none of the {len(answers)} answers of {teacher} became a record ({_in_words(result.counts)}); sample more (--n), "
            "raise --temperature or --max-tokens, or lower --min-score"
        )
    _write(out, result, _manifest(prompts, loaded, identity, options, result))
    counts = result.counts._asdict()
    return {"questions": len(loaded.items), "answers": len(answers), **counts, "records": len(result.records), "out": str(out)}


@dataclass(frozen=True)
class _Result:
    """The records of all questions."""

    records: list[SynthesizedRecord]
    counts: AnswerCounts
    questions_used: int
    """Number of questions that have a record."""


def made_with(out: Path, prompts: Path, teacher: Path, options: SynthesisOptions, suite_options: SuiteOptions) -> JsonObject:
    """Return the manifest of records, which have to be made from these questions, this teacher and these options.

    Raises:
        FileNotFoundError: `out` has no manifest.
        ValueError: The records were made otherwise.
    """
    manifest: JsonObject = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    loaded = load_questions(prompts, options, suite_options)
    # Through JSON, so that tuples compare as lists.
    stated = json.loads(json.dumps(_settings(loaded, weights_identity(teacher), options)))
    for key, value in stated.items():
        if manifest[key] != value:
            raise ValueError(
                f"{out} was made with another {key.replace('_', ' ')} ({manifest[key]}, now {value}); name another --out"
            )
    return manifest


def load_questions(prompts: Path, options: SynthesisOptions, suite_options: SuiteOptions) -> LoadedSuite:
    """Load the questions, with the sampling settings of the options. Raises ValueError for a grader that reads no answers."""
    stated: dict[str, config.Grader] = {}
    if options.grader is not None:
        stated["grader"] = read_grader(options.grader)
    if prompts.suffix in (".yaml", ".yml"):
        loaded = load_suite(prompts, suite_options, stated.get("grader"))
    else:
        if "grader" not in stated:
            raise ValueError(f"{prompts} is a file of items, which names no grader; state --keep GRADER, such as --keep number")
        if suite_options.data is not None or suite_options.overrides:
            raise ValueError(f"{prompts} is a file of items; --suite-data and overrides are for a suite's YAML file")
        suite = config.Suite(name="prompts", items=str(prompts), grader=stated["grader"])
        loaded = suite_of_items(suite, prompts, read_items(prompts), suite_options)
    if isinstance(loaded.suite.grader, config.ChoiceGrader | config.PerplexityGrader):
        raise ValueError(
            f"the grader {loaded.suite.grader.name} compares likelihoods and reads no answer; choose another for --keep"
        )
    changes: dict[str, object] = {"temperature": options.temperature, "seed": options.seed}
    if options.max_tokens is not None:
        changes["max_tokens"] = options.max_tokens
    generation = loaded.suite.generation.model_copy(update=changes)
    settings: dict[str, object] = {"generation": generation}
    if options.batch_size is not None:
        settings["batch_size"] = options.batch_size
    return loaded._replace(suite=loaded.suite.model_copy(update=settings))


def read_grader(text: str) -> config.Grader:
    """Read a grader from its name, or from its settings as YAML. Raises ConfigError, in one line."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--keep {text}: not YAML; state a name such as number, or {{name: number, after: '####'}}") from error
    if isinstance(tree, str):
        tree = {"name": tree}
    try:
        grader: config.Grader = TypeAdapter(config.Grader).validate_json(json.dumps(tree))
    except (ValidationError, TypeError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
        raise ConfigError(f"--keep {text}: {reason}; state a name such as number, or {{name: number, after: '####'}}") from error
    return grader


def _records(loaded: LoadedSuite, prompter: Prompter, answers: Sequence[Answer], options: SynthesisOptions) -> _Result:
    """Sort the answers to each question, and make its records."""
    records: list[SynthesizedRecord] = []
    counts = AnswerCounts(*(0 for _ in AnswerCounts._fields))
    questions_used = 0
    for index, item in enumerate(loaded.items):
        stops = loaded.suite.generation.stop
        given = answers[index * options.samples : (index + 1) * options.samples]
        graded = sort_answers(
            [_sampled(number, answer, prompter.tokenizer, stops) for number, answer in enumerate(given)], options.min_score
        )
        made = records_of(options.form, prompter.question(item), item.tools, graded)
        questions_used += bool(made)
        records += made
        counts = AnswerCounts(*(a + b for a, b in zip(counts, graded.counts, strict=True)))
    return _Result(records, counts, questions_used)


def _sampled(number: int, answer: Answer, tokenizer: Tokenizer, stops: Sequence[str]) -> SampledAnswer:
    """Return an answer with the turn that it is written as."""
    tokens = list(answer.tokens)
    text = tokenizer.decode(tokens, keep_special=True)
    plain = tokenizer.decode(tokens)
    if text == plain:
        # Without control tokens: as it was graded.
        return SampledAnswer(number, answer, turn_of(answer.text, answer.text))
    for stop in stops:
        text = text.partition(stop)[0]
        plain = plain.partition(stop)[0]
    return SampledAnswer(number, answer, turn_of(text, plain))


def _manifest(
    prompts: Path, loaded: LoadedSuite, identity: WeightsIdentity, options: SynthesisOptions, result: _Result
) -> JsonObject:
    """Return what made the records."""
    return {
        "prompts": str(prompts),
        **_settings(loaded, identity, options),
        "questions": len(loaded.items),
        "questions_with_records": result.questions_used,
        "answers": result.counts._asdict(),
        "records": len(result.records),
    }


def _settings(loaded: LoadedSuite, identity: WeightsIdentity, options: SynthesisOptions) -> JsonObject:
    """Return what decides which records are made."""
    return {
        "suite_sha256": loaded.digest,
        "teacher": identity._asdict(),
        "grader": loaded.suite.grader.model_dump(mode="json"),
        "generation": loaded.suite.generation.model_dump(mode="json"),
        "options": {"samples": options.samples, "form": options.form, "min_score": options.min_score},
        "chat_template_sha256": None if options.chat_template is None else _sha256(options.chat_template),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(out: Path, result: _Result, manifest: JsonObject) -> None:
    """Write the directory, which appears complete or not at all."""
    lines = []
    origins = []
    for number, record in enumerate(result.records, start=1):
        lines.append(json.dumps(record.fields, ensure_ascii=False))
        first = record.sources[0].answer.item
        origin: JsonObject = {"line": number, "id": first.id, "where": first.location}
        origin["samples"] = [source.sample for source in record.sources]
        origin["scores"] = [source.answer.score for source in record.sources]
        origins.append(json.dumps(origin, ensure_ascii=False))
    records_text = "".join(f"{line}\n" for line in lines)
    with new_directory(out) as folder:
        write_text(folder / "records.jsonl", records_text)
        write_text(folder / "origins.jsonl", "".join(f"{line}\n" for line in origins))
        text = json.dumps({**manifest, "records_sha256": _sha256(records_text)}, indent=1, ensure_ascii=False)
        write_text(folder / "manifest.json", text + "\n")


def _in_words(counts: AnswerCounts) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts._asdict().items() if count)


__all__ = ["SuiteItem", "SynthesisOptions", "read_grader", "synthesize"]
