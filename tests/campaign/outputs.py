"""What a run writes beside its checkpoints, and settings that change what a step does, under kills."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.kills import kill_once
from tests.campaign.trial_run import STEPS, Lost, Workplace, finish

GUARD = "train.spike_guard={window: 8, factor: 4.0, action: roll_back, max_events: 50}"
LOW = ("compute.param_dtype=bfloat16", "optimizer.learning_rate=1e-3")
VARIANTS = {
    "capacity with drops": ("train.capacity_factor=1.0", "train.max_drop_rate=0.9"),
    "microbatches, balance over the step": ("train.microbatches=4", "loss.balance_over=step"),
    "float32 masters": (*LOW, "optimizer.rounding=float32_master"),
    "stochastic rounding": (*LOW, "optimizer.rounding=stochastic"),
    "spike guard, rolling back": (GUARD, "optimizer.learning_rate=0.1"),
    "Muon": ("optimizer={name: muon, learning_rate: 0.02, adamw_learning_rate: 0.004}",),
}
Trial = tuple[str, str, Callable[[Workplace, random.Random], str]]


def trials() -> Iterator[Trial]:
    """Yield (kind, name, function)."""
    for name, overrides in VARIANTS.items():
        yield "SIGKILL with other settings", name, _variant_trial(name, overrides)
    yield "TensorBoard and plots after a SIGKILL", "events and curves of every step once", _tensorboard


def _variant_trial(name: str, overrides: tuple[str, ...]) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        slug = name.replace(" ", "-").replace(",", "")
        reference = workplace.reference(f"whole-{slug}", *overrides)
        run_dir = workplace.new_folder(slug)
        moment = kill_once(workplace.start(run_dir, *overrides), run_dir, rng, STEPS)
        finish(workplace, run_dir, reference, *overrides)
        last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-2])
        shutil.rmtree(run_dir)
        counts = {key: last[key] for key in ("spikes", "skipped", "dropped") if key in last}
        return f"{moment}; equal; {counts}"

    return run


def _tensorboard(workplace: Workplace, rng: random.Random) -> str:
    run_dir = workplace.new_folder("tensorboard")
    kill_once(workplace.start(run_dir), run_dir, rng, STEPS)
    finish(workplace, run_dir, workplace.reference())
    steps = [step for name, step in scalars(run_dir / "tensorboard") if name == "loss/train"]
    if sorted(set(steps)) != list(range(1, STEPS + 1)):
        raise Lost(f"TensorBoard has the losses of steps {sorted(set(steps))}")
    picture = run_dir / "plot.png"
    workplace.command(["plot", str(run_dir), "--out", str(picture)], run_dir.with_name("plot.log")).wait().require(0)
    if picture.stat().st_size < 10_000:
        raise Lost("the plot is empty")
    shutil.rmtree(run_dir)
    return "every step has an event"


def scalars(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, step) of every scalar of a folder of TensorBoard events: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        at = 0
        while at + 12 <= len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            if at + 16 + size > len(content):
                break  # the process was killed while it wrote this record
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                yield value.tag, event.step
