"""Grade with a Python function of the user's, which is executed only if its file was named on the command line."""

from __future__ import annotations

import importlib.util
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_train import config
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.not_graded import NotGraded


def function_grade(grader: config.FunctionGrader, folder: Path, allowed: Sequence[Path]) -> Callable[[SuiteItem, str], float]:
    """Import the function of a suite.

    Args:
        grader: The suite's section.
        folder: The folder of the suite's file, to which the function's file is relative.
        allowed: Files that the user has named.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file was not named, cannot be imported, or has no such function.
    """
    file = (folder / grader.file).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of a grader; its path is relative to the folder of the suite's file")
    if file not in [path.resolve() for path in allowed]:
        raise ValueError(f"the suite would run the code in {file}; read it, and add --grader {folder / grader.file} to allow that")
    specification = importlib.util.spec_from_file_location(f"moe_train_grader_{file.stem}", file)
    if specification is None or specification.loader is None:
        raise ValueError(f"{file} is no Python file, so it has no grader; name a file that ends in .py")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{_place(error, file)}: the grader's file cannot be imported: {_described(error)}") from error
    function = getattr(module, grader.function, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {grader.function}; define it, or name another one in grader.function")

    def grade(item: SuiteItem, answer: str) -> float:
        try:
            score = function(_as_json(item), answer)
        except (Exception, SystemExit) as error:  # a call of sys.exit would end the command as if the gate had passed
            raise NotGraded(f"{_place(error, file)}: the grader raised {_described(error)}") from error
        # NumPy's scalars count, too.
        is_number = isinstance(score, numbers.Real | np.bool_) and math.isfinite(score)
        if not is_number or not 0 <= score <= 1:
            raise NotGraded(f"{file}: the grader returned {score!r:.80}, which is no number from 0 to 1")
        return float(score)

    return grade


def _as_json(item: SuiteItem) -> dict[str, Any]:
    """Return what a grader is told of an item."""
    return {
        "id": item.id,
        "messages": item.messages,
        "tools": item.tools,
        "answers": list(item.answers),
        "choices": list(item.choices),
        "category": item.category,
        "source": item.source,
    }


def _described(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _place(error: BaseException, file: Path) -> str:
    """Return the file and the line in it where an error was raised."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    if isinstance(error, SyntaxError) and error.lineno is not None:
        lines = [error.lineno]
    return f"{file}:{lines[-1]}" if lines else str(file)
