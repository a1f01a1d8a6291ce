"""Speed of a preference step with one prompt for both answers, against one for each, on pairs made from GSM8K.

    taskset -c 0 python -m tests.benchmarks.shared_prompts GSM8K_FOLDER TOKENIZER [--solved 0,1,4,8] [--rounds 5]

A prompt is so many solved problems and a question; `chosen` is its answer and `rejected` that of the next problem. The model is
workload S with two layers and random weights. Steps of both layouts take turns in one process, each on one row, which is packed as
full as it gets. Printed for each number of solved problems: tokens of a prompt and of an answer, share of the positions that is
saved, CPU seconds and pairs of a step, and how many times as many pairs a second one prompt gives in rows without padding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_train import config
from moe_train.commands.bench import random_state
from moe_train.config import yaml_file
from moe_train.data.batches.answer_batches import SHARED_POSITIONS
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.shared_prompts import share_saved
from moe_train.data.tokenizers.load import load_tokenizer
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.mesh import make_mesh, put_batch
from moe_train.run.resolve import resolve
from moe_train.train.objectives.choose import objective_of
from moe_train.train.step import compile_step
from moe_train.train.step_definition import definition_of

NUM_PAIRS = 128
SEQ_LEN = 6144
WORKLOAD = Path(__file__).parent / "workload_S.yaml"


def write_pairs(problems: list[dict[str, str]], solved: int, path: Path) -> None:
    """Write pairs whose prompts begin with `solved` other problems and their answers."""
    lines = []
    for number in range(NUM_PAIRS):
        *examples, asked, other = problems[number * (solved + 2) % 5000 :][: solved + 2]
        shown = "".join(f"Q: {example['question']}\nA: {example['answer']}\n\n" for example in examples)
        pair = {"prompt": f"{shown}Q: {asked['question']}\nA:", "chosen": asked["answer"], "rejected": other["answer"]}
        lines.append(json.dumps(pair) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


class Layout:
    """A compiled step of one layout, and a batch of it."""

    def __init__(self, written: config.Config, shared: bool, tokenizer: Tokenizer) -> None:
        assert written.data is not None and isinstance(written.objective, config.Preference)
        objective = written.objective.model_copy(update={"shared_prompt": shared})
        run = resolve(written.model_copy(update={"objective": objective}), 1)
        rows = BatchRows(run.train.batch_size, run.train.seq_len)
        batch_type = objective_of(run.objective).batch_type
        self.loader = Loader(written.data, "train", tokenizer, rows, seed=0, batch_type=batch_type)
        batch = self.loader.batch(0)
        self.pairs = int(np.sum(np.max(batch.answer_ids, axis=1)) // 2)
        self._batch = put_batch(batch, jax.sharding.get_mesh())
        self._state, structure, optimizer = random_state(run)
        self._step: Callable[..., Any] = compile_step(definition_of(run, structure, optimizer), self._state, self._batch, {})

    def seconds(self) -> float:
        """Take a step, and return its processor time."""
        begun = time.process_time()
        self._state, metrics = self._step(self._state, self._batch, {})
        jax.block_until_ready(metrics)
        return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gsm8k", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--solved", type=lambda text: [int(number) for number in text.split(",")], default=[0, 1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    problems = [json.loads(line) for line in (options.gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    section = config.HuggingFaceTokenizer(name="huggingface", path=str(options.tokenizer))
    tokenizer = load_tokenizer(section)
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])
    for solved in options.solved:
        with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
            write_pairs(problems, solved, Path(folder) / "pairs.jsonl")
            record = {"name": "preference", "too_long": "drop"}
            source = {"name": "files", "files": [f"{folder}/pairs.jsonl"], "record": record}
            sections = {
                "model.num_layers": 2,
                "model.vocab_size": tokenizer.vocab_size,
                "model.max_seq_len": SEQ_LEN,
                "objective": {"name": "preference", "loss": "simpo"},
                "train.batch_size": 1,
                "train.seq_len": SEQ_LEN,
                "data": {"train": [source], "tokenizer": section.model_dump(mode="json"), "cache_dir": f"{folder}/cache"},
            }
            written = yaml_file.load_config(WORKLOAD, [f"{key}={json.dumps(value)}" for key, value in sections.items()])
            each, one = (Layout(written, shared, tokenizer) for shared in (False, True))
            times = [(each.seconds(), one.seconds()) for _ in range(options.rounds + 1)][1:]
            store = each.loader.sources[0].store
            of_each, of_one = (statistics.median(column) for column in zip(*times, strict=True))
            shared = float(np.mean(store.values[:, SHARED_POSITIONS]))
            answer = float(np.mean(store.lengths() / 2)) - shared
            saved = share_saved([store])
            print(
                f"{solved} solved problems: prompts of {shared:.0f}, answers of {answer:.0f} tokens, "
                f"{saved:.2f} saved; "
                f"{of_each:.2f} CPU s for {each.pairs} pairs, {of_one:.2f} for {one.pairs}: "
                f"{of_each / of_one / (1 - saved):.2f} times as fast in full rows",
                flush=True,
            )


if __name__ == "__main__":
    main()
