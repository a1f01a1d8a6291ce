"""Three tasks within the reach of a model of 135M parameters, for `arithmetic_gate.py`: problems, and the suites that ask them.

A hash of each question decides whether it is trained on or asked, so that the division never changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

CITIES = """Rome Oslo Paris Lima Cairo Tokyo Delhi Madrid Lisbon Vienna Dublin Athens Berlin Prague Warsaw Quito Hanoi Accra Dakar
Tunis Seoul Havana Ankara Baku Bern Doha Kyiv Minsk Riga Sofia Tbilisi Zagreb Bogota Nairobi Manila Jakarta Bangkok Boston Denver
Dallas Austin Miami Seattle Chicago Detroit Houston Memphis Atlanta Phoenix Toronto""".split()
DAYS = ("today", "tomorrow", "on Monday", "on Friday", "next week")


class Task(NamedTuple):
    """A task: its items, and what its suite states beside their file."""

    name: str
    items: list[dict[str, Any]]
    suite: dict[str, Any]


def tasks() -> list[Task]:
    """Return the tasks: additions in the answer format of GSM8K, calls of a tool as JSON, and short answers."""
    additions = []
    for first in range(2, 100):
        for second in range(2, 100):
            answer = f"{first} + {second} = {first + second}\n#### {first + second}"
            additions.append({"question": f"What is {first} + {second}?", "answer": answer})
    calls = []
    for city in CITIES:
        for day in DAYS:
            call = json.dumps({"name": "get_weather", "arguments": {"city": city, "day": day}})
            calls.append({"question": f"Call the tool for the weather in {city} {day}.", "answer": call})
    parities = []
    for number in range(10, 1000):
        parities.append({"question": f"Is {number} even or odd?", "answer": "odd" if number % 2 else "even"})
    schema = {"type": "object", "required": ["name", "arguments"]}
    return [
        Task("arithmetic", additions, {"grader": {"name": "number", "after": "####"}, "generation": {"max_tokens": 24}}),
        Task(
            "calls",
            [{**item, "schema": schema} for item in calls],
            {"grader": {"name": "json_schema"}, "generation": {"max_tokens": 48}},
        ),
        Task("parity", parities, {"grader": {"name": "exact"}, "generation": {"max_tokens": 4}}),
    ]


def write_tasks(folder: Path, names: list[str], items: int) -> list[Path]:
    """Write `train.jsonl` with records of tasks, and for each a suite that asks `items` others; returns the suites' files."""
    train: list[str] = []
    suites = []
    for task in tasks():
        if task.name not in names:
            continue
        asked: list[str] = []
        trained: list[str] = []
        for item in task.items:
            if int(_digest(item["question"]), 16) % 10 == 0:
                asked.append(json.dumps(item))
            else:
                trained.append(json.dumps({"question": item["question"], "answer": item["answer"]}))
        # In the order of their hashes, so that the first ones are a sample of all; as many records of each task.
        trained.sort(key=_digest)
        train += trained if len(names) == 1 else trained[:200]
        _write(folder / f"{task.name}.jsonl", sorted(asked, key=_digest)[:items])
        suite = {"name": task.name, "items": f"{task.name}.jsonl", "batch_size": 32, **task.suite}
        file = folder / f"{task.name}.yaml"
        file.write_text(json.dumps(suite), encoding="utf-8")
        suites.append(file)
    _write(folder / "train.jsonl", sorted(train, key=_digest))
    return suites


def write_harness_tasks(folder: Path, items: int) -> list[str]:
    """Write two tasks for lm-evaluation-harness over the first additions, by likelihood and by text; returns their names."""
    folder.mkdir()
    lines = (folder.parent / "arithmetic.jsonl").read_text(encoding="utf-8").splitlines()[:items]
    records = []
    for line in lines:
        question = json.loads(line)["question"]
        total = int(json.loads(line)["answer"].rpartition(" ")[2])
        records.append(json.dumps({"question": question, "choices": [f" {total}", f" {total + 10}", f" {total - 1}"]}))
    _write(folder / "items.jsonl", records)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {
        "task": "likelier",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    for task in (choice, text):
        (folder / f"{task['task']}.yaml").write_text(json.dumps({**data, **task}), encoding="utf-8")
    return ["likelier", "written"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
