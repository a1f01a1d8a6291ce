"""Load a suite: its YAML file, its items and solved examples, and the function that grades."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_train import config
from moe_train.config.yaml_file import load_section
from moe_train.evaluate.suites.grade import Grade, GraderAccess, check_item, text_grader
from moe_train.evaluate.suites.items import ItemsFile, SuiteItem, read_items
from moe_train.evaluate.suites.judge import Endpoint
from moe_train.evaluate.suites.prompts import LETTERS


class LoadedSuite(NamedTuple):
    """A suite with its items."""

    suite: config.Suite
    file: Path
    """YAML file of the suite."""
    items: list[SuiteItem]
    examples: list[SuiteItem]
    """Solved examples that come before each question."""
    grade: Grade | None
    """The function that grades; None for a grader that compares likelihoods, and where answers are not graded."""
    digest: str
    """A sha256 over the suite's settings, items and examples."""


class SuiteOptions(NamedTuple):
    """What a user states beside the files of suites."""

    overrides: Sequence[str] = ()
    """`key.path=value` settings that replace those of every suite."""
    data: Path | None = None
    """The folder that items are relative to; None for the folder of each suite's file."""
    grader_files: Sequence[Path] = ()
    """Python files whose functions may grade."""
    judge: Endpoint | None = None
    """The endpoint of the judge."""
    grade: bool = True
    """Whether answers are graded; otherwise no code of a grader is executed, and no judge is asked."""


def suite_files(paths: Sequence[Path]) -> list[Path]:
    """Return the YAML files of suites; a folder stands for those in it.

    Raises:
        FileNotFoundError: A folder has none.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(f"{path} has no *.yaml, so no suite; name the file of a suite")
        files += inside
    return files


def load_suites(paths: Sequence[Path], options: SuiteOptions = SuiteOptions()) -> list[LoadedSuite]:  # noqa: B008 (immutable)
    """Load several suites, each of which has a name of its own; arguments and errors are those of `load_suite`."""
    suites = [load_suite(file, options) for file in suite_files(paths)]
    names = [loaded.suite.name for loaded in suites]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two suites have the name {twice[0]}; give each a name of its own")
    return suites


def load_suite(
    file: Path,
    options: SuiteOptions = SuiteOptions(),  # noqa: B008 (immutable)
    grader: config.Grader | None = None,
) -> LoadedSuite:
    """Read a suite and its items, and check that each item has what the grader needs.

    Args:
        file: the YAML file.
        options: what the user states beside it.
        grader: replaces the suite's own; None keeps that.

    Raises:
        FileNotFoundError: The suite or a file that it names does not exist.
        ValueError: With file and line, for what is not valid.
    """
    suite = load_section(file, config.Suite, options.overrides)
    if grader is not None:
        suite = suite.model_copy(update={"grader": grader})
    folder = file.parent if options.data is None else options.data
    source = ItemsFile(folder / suite.items, suite.columns, suite.category_of_file, suite.answers_are, f"{file}: items")
    items = read_items(source, suite.limit)
    return suite_of_items(suite, file, items, options)


def suite_of_items(suite: config.Suite, file: Path, items: list[SuiteItem], options: SuiteOptions) -> LoadedSuite:
    """Check items against a suite's settings, and read its solved examples; arguments and errors are as for `load_suite`."""
    for item in items:
        check_item(item, suite.grader)
        _check_letters(item, suite)
    folder = file.parent if options.data is None else options.data
    examples = _examples(file, folder, suite)
    access = GraderAccess(suite.name, file.parent, options.grader_files, options.judge)
    grade = text_grader(suite.grader, access) if options.grade else None
    return LoadedSuite(suite, file, items, examples, grade, _digest(suite, file.parent, items, examples))


def _examples(file: Path, folder: Path, suite: config.Suite) -> list[SuiteItem]:
    """Read the solved examples of a suite."""
    few_shot = suite.prompt.few_shot
    if few_shot is None:
        return []
    stated_as = f"{file}: prompt.few_shot.items"
    source = ItemsFile(folder / few_shot.items, suite.columns, suite.category_of_file, suite.answers_are, stated_as)
    # Those of a category may stand anywhere in a file; `Prompter` counts them.
    examples = read_items(source, None if few_shot.per_category else few_shot.count)
    if len(examples) < few_shot.count:
        raise ValueError(f"{file}: prompt.few_shot.count is {few_shot.count}, but {few_shot.items} has {len(examples)} items")
    if not few_shot.per_category:
        examples = examples[: few_shot.count]
    for example in examples:
        if not example.answers:
            raise ValueError(f"{example.location}: a solved example needs an answer; add it")
        _check_letters(example, suite)
    return examples


def _check_letters(item: SuiteItem, suite: config.Suite) -> None:
    """Raise ValueError if an item's choices cannot be named by letters, where the suite does so."""
    by_letter = isinstance(suite.grader, config.ChoiceGrader) and suite.grader.compare == "letters"
    if by_letter and not 2 <= len(item.choices) <= len(LETTERS):
        raise ValueError(f"{item.location}: the item has {len(item.choices)} choices, and letters name 2 to {len(LETTERS)}")


def _digest(suite: config.Suite, folder: Path, items: Sequence[SuiteItem], examples: Sequence[SuiteItem]) -> str:
    """Return a sha256 over what a suite asks, and what it expects; not over where its files are."""
    total = hashlib.sha256(suite.model_dump_json(exclude={"items", "batch_size"}).encode())
    if isinstance(suite.grader, config.FunctionGrader):
        total.update((folder / suite.grader.file).read_bytes())
    for item in (*items, *examples):
        total.update(repr(item._replace(location="")).encode())
    return total.hexdigest()
