"""`moe-train improve`: rounds of sampling answers, grading them, learning from them, and a gate (online DPO by repetition)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_train import config
from moe_train.checkpoint.runs import is_run
from moe_train.commands.evaluate_suite import Comparisons, Outputs, evaluate_suites
from moe_train.commands.synthesize import SynthesisOptions, load_questions, made_with, synthesize
from moe_train.commands.train import train
from moe_train.config import yaml_file
from moe_train.config.strict_yaml import ConfigError
from moe_train.evaluate.paired_comparison import parse_requirement
from moe_train.evaluate.suites.load import SuiteOptions, load_suites
from moe_train.evaluate.suites.result import checked_requirements
from moe_train.evaluate.synthesis import RecordForm
from moe_train.machine.files import JsonObject
from moe_train.machine.processes import require_one_process
from moe_train.run import loop

_RECORDS = {"sft": "chat", "pairs": "preference", "kto": "labelled"}
"""Kind of the records of each form."""


@dataclass(frozen=True)
class Rounds:
    """What is repeated.

    Each round has a folder `round_N` in `out`: `answers` (as `synthesize` writes them), `run`, and `gate` (as `evaluate --out`
    writes it).
    """

    config_path: Path
    """Config of the run of each round. `run_dir`, `seed` and `data.train` are those of the round, and from the second round on the
    weights to start from are those of the round before (`init_from`, with adapters `lora.init_from`).
    """
    overrides: Sequence[str]
    """`key=value` settings that override those of the file."""
    questions: Path
    """Items, or the YAML file of a suite, whose answers are sampled."""
    suites: Sequence[Path]
    """The gate: suites that each round answers, and the model before the first round."""
    requirements: Sequence[str]
    """What the comparison with that model, and with the round before, has to show."""
    out: Path
    count: int = 3
    """Number of rounds."""
    start: Path | None = None
    """The run or model that answers in the first round, and that the others are compared with; None for `init_from`."""


def improve(
    rounds: Rounds,
    options: SynthesisOptions = SynthesisOptions(),  # noqa: B008 (immutable)
    suite_options: SuiteOptions = SuiteOptions(),  # noqa: B008 (immutable)
) -> Iterator[JsonObject]:
    """Repeat sampling, grading, training and the gate, each time from the model of the round before and with another seed.

    What exists is not made again, so the same command continues where it was stopped.

    Args:
        rounds: what is repeated.
        options: how answers are sampled; the form is that which the objective reads, and the seed that of the config plus the
            number of the round.
        suite_options: where the data and graders of suites are.

    Yields:
        A row for each finished round: counts of answers and records, scores on the suites, and `passed`, whether the requirements
        are met. No round follows one that does not meet them, or whose training was stopped (`exit_code` is not 0).

    Raises:
        ConfigError: The config does not fit, or names other weights than the first round can sample from.
        FileNotFoundError, ValueError: A file or setting is not valid; nothing was generated then.
    """
    require_one_process("repeating rounds")
    first = _config_of(rounds, 1, None)
    form = form_of(first.objective)
    start = _start(rounds, first)
    suites = load_suites(rounds.suites, suite_options)
    checked_requirements(rounds.requirements, [loaded.suite.name for loaded in suites], has_base=True)
    load_questions(rounds.questions, options, suite_options)
    previous: Path | None = None
    for number in range(1, rounds.count + 1):
        written = _config_of(rounds, number, previous)
        folder = rounds.out / f"round_{number}"
        sampling = options._replace(form=form, seed=written.seed)
        row = {
            "round": number,
            "seed": written.seed,
            **_sample(rounds.questions, previous or start, folder, sampling, suite_options),
        }
        code = train(written)
        if code != loop.FINISHED:
            yield {**row, "exit_code": code}
            return
        result = _gate(rounds, folder, [start] if previous is None else [start, previous], suite_options)
        scores = {score["suite"]: score["score"] for score in result["suites"] if score["model"] == result["model"]}
        yield {**row, **scores, "passed": result["passed"], "exit_code": 0}
        if not result["passed"]:
            return
        previous = folder / "run"


def form_of(objective: config.Objective) -> RecordForm:
    """Return the form of records that an objective learns from. Raises ConfigError for one that learns from no sampled answers."""
    match objective:
        case config.Preference():
            return "pairs"
        case config.UnpairedPreference():
            return "kto"
        case config.NextToken():
            return "sft"
        case _:
            raise ConfigError(
                f"objective {objective.name} does not learn from answers that are sampled in rounds; use preference, "
                "unpaired_preference or next_token"
            )


def _config_of(rounds: Rounds, number: int, previous: Path | None) -> config.Config:
    """Return the config of a round's run, checked."""
    base = yaml_file.load_config(rounds.config_path, rounds.overrides)
    folder = rounds.out / f"round_{number}"
    record: JsonObject = {"name": _RECORDS[form_of(base.objective)]}
    if base.data is not None and base.data.train:
        stated = base.data.train[0]
        if isinstance(stated, config.RecordSource) and stated.record.name == record["name"]:
            # Column names of other files do not fit; how long records are treated does.
            record["too_long"] = stated.record.too_long
    source = {"name": "files", "files": [str(folder / "answers" / "records.jsonl")], "record": record}
    changes = [f"run_dir={folder / 'run'}", f"seed={base.seed + number}", f"data.train={json.dumps([source])}"]
    if previous is not None:
        changes.append(f"{'init_from' if base.lora is None else 'lora.init_from'}={previous}")
    return yaml_file.load_config(rounds.config_path, [*rounds.overrides, *changes])


def _start(rounds: Rounds, first: config.Config) -> Path:
    """Return the model that answers in the first round. Raises ConfigError if it is not known, or not that which is trained."""
    if rounds.start is not None:
        return rounds.start
    if first.init_from is None:
        raise ConfigError(f"{rounds.config_path} has no init_from, so no model can answer in the first round; state it")
    if first.lora is not None and first.lora.init_from is not None:
        if is_run(first.lora.init_from):
            return Path(first.lora.init_from)
        raise ConfigError(
            f"{rounds.config_path}: lora.init_from is an adapter; name with --start a run or a merged model with its weights, "
            "which answers in the first round"
        )
    return Path(first.init_from)


def _sample(questions: Path, teacher: Path, folder: Path, options: SynthesisOptions, suite_options: SuiteOptions) -> JsonObject:
    """Sample and grade the answers of a round, unless that has been done, and return counts of them."""
    answers = folder / "answers"
    if not answers.exists():
        synthesize(questions, teacher, answers, options, suite_options)
    manifest = made_with(answers, questions, teacher, options, suite_options)
    counts: JsonObject = manifest["answers"]
    return {"accepted": counts["accepted"], "rejected": counts["rejected"], "records": manifest["records"]}


def _gate(rounds: Rounds, folder: Path, bases: Sequence[Path], suite_options: SuiteOptions) -> JsonObject:
    """Compare the run of a round with others on the suites, unless that has been done, and return the result.

    Raises:
        ValueError: It was done with other suites or requirements.
    """
    out = folder / "gate"
    if not out.exists():
        evaluate_suites(folder / "run", rounds.suites, Comparisons(bases, rounds.requirements), None, suite_options, Outputs(out))
    result: JsonObject = json.loads((out / "result.json").read_text(encoding="utf-8"))
    stated = {(row.suite, 0 - row.margin) for row in map(parse_requirement, rounds.requirements)}
    asked = {(row["suite"], row["must_be_at_least"]) for row in result["requirements"]}
    digests = [loaded.digest for loaded in load_suites(rounds.suites, suite_options)]
    if asked != stated or [score["digest"] for score in result["suites"]][: len(digests)] != digests:
        raise ValueError(f"{out} was made with other suites or requirements; state the same ones, or name another --out")
    return result
