"""Values of the wrong type are one line with their key, wherever they stand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from moe_train.commands.convert import TRAINERS
from moe_train.config.conversion import values
from moe_train.config.conversion.draft import Draft
from tests.config.conversion import test_axolotl, test_llama_factory, test_mistral_finetune, test_trl

SAMPLES = {
    "axolotl": test_axolotl.QLORA,
    "llama-factory": test_llama_factory.LORA,
    "mistral-finetune": test_mistral_finetune.LORA,
    "trl": test_trl.LORA
    + "datasets: [{path: a/b, data_files: [c.jsonl]}]\nloss_weights: [1.0]\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n",
}


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (values.as_number, "1e-4", 1e-4),
        (values.as_number, 3, 3.0),
        (values.as_text, "a", "a"),
        (values.as_mapping, None, {}),
        (values.as_mapping, {1: 2}, {"1": 2}),
        (values.as_mappings, [{"a": 1}, None], [{"a": 1}, {}]),
        (values.as_names, "a, b,,c", ["a", "b", "c"]),
        (values.as_names, ["a", 1, None], ["a", "1"]),
        (values.as_files, "./a,b.jsonl", ["a,b.jsonl"]),
        (values.as_files, ["./a", "b"], ["a", "b"]),
    ],
)
def test_what_is_read(read: Callable[[str, Any], Any], value: Any, expected: Any) -> None:
    assert read("key", value) == expected


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (values.as_number, [1], "key has to be a number"),
        (values.as_number, True, "key has to be a number"),
        (values.as_number, "fast", "key has to be a number"),
        (values.as_text, 1, "key has to be a text"),
        (values.as_mapping, "a", "key has to be a mapping"),
        (values.as_mappings, {"a": 1}, "key has to be a list"),
        (values.as_mappings, [{}, 1], "key.1 has to be a mapping"),
        (values.as_names, [["a"]], "key has to be a list of names"),
        (values.as_names, 3, "key has to be a list of names"),
    ],
)
def test_what_is_refused(read: Callable[[str, Any], Any], value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        read("key", value)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.parametrize("trainer", SAMPLES)
def test_a_value_of_another_type_is_an_error_of_one_line_or_is_converted(trainer: str) -> None:
    sample = yaml.safe_load(SAMPLES[trainer])
    for path in places(sample):
        for value in (None, 3, True, "x", [], [[1]], {"a": 1}, [{"a": 1}]):
            tree = copy.deepcopy(sample)
            parent = tree
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            draft = Draft(tree)
            # Anything else, such as a TypeError, is what a user would see as a traceback.
            with contextlib.suppress(ValueError):
                TRAINERS[trainer](draft, 1)
                draft.finish()
