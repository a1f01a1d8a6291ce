"""Answer and grade the suites of `evaluation.suites` during a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from moe_train import config
from moe_train.config.yaml_file import load_section
from moe_train.data.chat.chat_date import date_of_data, dated
from moe_train.data.chat.conversation_to_tokens import load_template
from moe_train.evaluate.suites.answer import answer_items, check_prompts, prompter_of
from moe_train.evaluate.suites.generation import LoadedModel
from moe_train.evaluate.suites.load import LoadedSuite, SuiteOptions, load_suites
from moe_train.run.inputs import RunInputs
from moe_train.run.writer import Writer
from moe_train.train.state import TrainState


class SuiteScores:
    """Scores on suites at the steps where they are due; without suites they are never due.

    Args:
        run: The resolved run.
        suites: The suites of `load_run_suites`.
        mesh: The mesh of the run.
        inputs: The opened data, for the tokenizer.
        structure: The model without its weights.

    Raises:
        ValueError: The prompt of an item cannot be written, or is too long for the model. Nothing has been written then.
    """

    def __init__(self, run: config.Run, suites: Sequence[LoadedSuite], mesh: Mesh, inputs: RunInputs, structure: PyTreeDef) -> None:
        self._run = run
        self._mesh = mesh
        self._total_steps = inputs.total_steps
        self._structure = structure
        self._tokenizer = inputs.tokenizer
        self._suites = suites
        self._template: str | None = None
        if self._suites:
            data = run.training_data()
            template = load_template(data.chat_template, inputs.tokenizer)
            self._template = None if template is None else dated(template, date_of_data(data))
        for loaded in suites:
            check_prompts(loaded, prompter_of(loaded, inputs.tokenizer, self._template), run.model)

    def are_due(self, step: int) -> bool:
        """Return whether the suites are answered after `step`."""
        every = self._run.evaluation.suites_every_steps or self._run.evaluation.every_steps
        return bool(self._suites) and (step % every == 0 or step == self._total_steps)

    def measure(self, step: int, state: TrainState, writer: Writer) -> dict[str, float] | None:
        """Answer the suites after `step`, write the mean score on each and return them; None without suites.

        An answer that could not be graded is left out of the mean, and counted.
        """
        if not self._suites:
            return None
        model = LoadedModel(
            self._structure, {**state.learned, **state.frozen}, self._run.model, self._mesh, self._run.compute.dtype
        )
        scores: dict[str, float] = {}
        ungraded = 0
        for loaded in self._suites:
            answers = answer_items(loaded, prompter_of(loaded, self._tokenizer, self._template), model)
            graded = [answer.score for answer in answers if answer.score is not None]
            ungraded += len(answers) - len(graded)
            scores[loaded.suite.name] = sum(graded) / max(len(graded), 1)
        writer.suites(step, scores, ungraded)
        return scores


def load_run_suites(run: config.Run) -> list[LoadedSuite]:
    """Load the suites of a run, and check that what makes a checkpoint the best is among them.

    Raises:
        FileNotFoundError: The file of a suite, or one that it names, does not exist.
        ValueError: A suite cannot be used during a run.
    """
    settings = run.evaluation
    files = [Path(file) for file in settings.suites]
    for file in files:
        grader = load_section(file, config.Suite).grader
        if isinstance(grader, config.FunctionGrader | config.JudgeGrader):
            raise ValueError(
                f"{file}: the grader {grader.name} needs to be allowed on a command line, so it cannot grade during a run; "
                "evaluate the checkpoints with moe-train evaluate --suite"
            )
    suites = load_suites(files, SuiteOptions(data=None if settings.suite_data is None else Path(settings.suite_data)))
    names = [loaded.suite.name for loaded in suites]
    best_by = run.checkpoint.best_by
    if best_by != "loss" and best_by not in names:
        known = ", ".join(["loss", *names])
        raise ValueError(f"checkpoint.best_by is {best_by}, which is no suite of evaluation.suites; state one of {known}")
    return suites
