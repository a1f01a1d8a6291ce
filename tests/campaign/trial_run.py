"""The run that every trial disturbs, its processes, and what is compared with the run that nobody disturbed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.config import yaml_file

ROOT = Path(__file__).parents[2]
STEPS = 60
SAVE_STEPS = 5
HANG_SECONDS = 240.0
"""Seconds after which a process counts as hanging."""


class Lost(Exception):
    """A fault was not survived."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    """Its exit code; negative for the signal that ended it."""
    stderr: str

    def require(self, *codes: int) -> Ended:
        """Raise Lost unless the exit code is one of `codes` and stderr has no traceback."""
        tail = " / ".join(self.stderr.splitlines()[-4:])
        if self.code not in codes:
            raise Lost(f"exit code {self.code} instead of {' or '.join(map(str, codes))}: {tail}")
        if "Traceback" in self.stderr:
            raise Lost(f"a traceback: {tail}")
        return self


class Process:
    """A `moe-train` process, whose stderr goes to a file.

    Args:
        arguments: those of `moe-train`.
        log: the file.
        env: the environment.
        prefix: a command that starts another one, such as `prlimit --fsize=N`.
    """

    def __init__(self, arguments: list[str], log: Path, env: Mapping[str, str], prefix: tuple[str, ...] = ()) -> None:
        self._log = log
        self._file = log.open("wb")
        command = [*prefix, sys.executable, "-m", "moe_train", *arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=dict(env), stdout=subprocess.DEVNULL, stderr=self._file, start_new_session=True
        )

    def stderr(self) -> str:
        """Return what the process has printed so far."""
        return self._log.read_text(errors="replace")

    def runs(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Send a signal to the process alone."""
        self._process.send_signal(number)

    def wait(self, seconds: float = HANG_SECONDS) -> Ended:
        """Wait for the end. Raises Lost if it does not come within `seconds`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise Lost(f"still running after {seconds:g} s: {' / '.join(self.stderr().splitlines()[-3:])}") from None
        finally:
            self._file.close()
        return Ended(code, self.stderr())

    def wait_until(self, condition: Callable[[], bool], seconds: float = HANG_SECONDS) -> bool:
        """Poll every millisecond until the condition holds; return False if the process ended or the time is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if condition():
                return True
            if not self.runs():
                return False
            time.sleep(0.001)
        return False


class Workplace:
    """A folder with a data set, a tokenizer, a config, compiled programs, and the undisturbed run.

    Args:
        folder: kept between campaigns, so that a campaign can be continued.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "run.yaml"
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "MOE_TRAIN_"))},
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "MOE_TRAIN_COMPILE_CACHE": str(self.folder / "compiled"),
            "PYTHONPATH": str(ROOT),
        }
        if not self.config.exists():
            self._write_inputs()

    def _write_inputs(self) -> None:
        rng = random.Random(0)
        words = [f"{a}{b}" for a in ("ab", "can", "de", "for", "gen", "in") for b in ("le", "ter", "ion", "al", "s")]
        texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(700)]
        for name, part in (("train", texts[:600]), ("eval", texts[600:])):
            (self.folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        shutil.rmtree(self.folder / "tokenizer", ignore_errors=True)
        train_tokenizer(texts, 300, self.folder / "tokenizer")
        text = {"name": "text"}
        tree = {
            "name": "campaign",
            "run_dir": str(self.folder / "unnamed"),
            "model": {
                "family": "mixtral",
                "vocab_size": 320,
                "model_dim": 32,
                "num_layers": 2,
                "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
                "ffn": {"name": "moe", "ffn_dim": 48, "num_experts": 4, "experts_per_token": 2},
                "max_seq_len": 64,
            },
            "data": {
                "tokenizer": {"name": "huggingface", "path": str(self.folder / "tokenizer")},
                "train": [{"name": "files", "files": [str(self.folder / "train.jsonl")], "record": text}],
                "eval": [{"name": "files", "files": [str(self.folder / "eval.jsonl")], "record": text}],
                "cache_dir": str(self.folder / "tokens"),
            },
            "train": {"steps": STEPS, "batch_size": 8, "seq_len": 64},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "schedule": {"name": "cosine", "warmup_steps": 5}},
            "loss": {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.001},
            "evaluation": {"every_steps": 20},
            "checkpoint": {"every_steps": SAVE_STEPS, "keep_last": 3},
        }
        self.config.write_text(json.dumps(tree))  # JSON is YAML
        yaml_file.load_config(self.config)

    def start(
        self, run_dir: Path, *overrides: str, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = (), log: str = "log"
    ) -> Process:
        """Start `moe-train train` in a folder, with stderr in a file beside it."""
        arguments = ["train", str(self.config), f"run_dir={run_dir}", *overrides]
        return self.command(arguments, run_dir.with_name(f"{run_dir.name}.{log}"), env, prefix)

    def command(
        self, arguments: list[str], log: Path, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> Process:
        """Start any command of `moe-train`."""
        return Process(arguments, log, {**self.env, **(env or {})}, prefix)

    def new_folder(self, name: str) -> Path:
        """Return the path of a folder that does not exist."""
        path = self.folder / "trials" / name
        path.parent.mkdir(exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        return path

    def reference(self, name: str = "whole", *overrides: str, env: Mapping[str, str] | None = None) -> Path:
        """Return the folder of an undisturbed run with these overrides, made once."""
        path = self.folder / name
        if not (path / "finished").exists():
            shutil.rmtree(path, ignore_errors=True)
            self.start(path, *overrides, env=env).wait().require(0)
            (path / "finished").touch()
        return path


def losses_of(run_dir: Path) -> list[tuple[Any, ...]]:
    """Return what metrics.jsonl says about losses and gradients, evaluations included."""
    keys = ("kind", "step", "loss", "cross_entropy", "grad_norm", "loss_tokens", "load", "skipped", "dropped")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(str(line.get(key)) for key in keys) for line in lines]


def sums_of(run_dir: Path, step: int = STEPS) -> Any:
    """Return the bit sums of all arrays of a checkpoint: weights, moments and counters."""
    return json.loads((run_dir / "checkpoints" / str(step) / "about" / "metadata").read_text())["sums"]


def last_step(run_dir: Path) -> int:
    """Return the last step in metrics.jsonl; 0 without one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0
    complete = path.read_bytes().rpartition(b"\n")[0].splitlines()
    return json.loads(complete[-1])["step"] if complete else 0


def require_equal_weights(run_dir: Path, reference: Path) -> None:
    """Raise Lost unless a run ended with the weights and moments of the reference, bit for bit."""
    if sums_of(run_dir) != sums_of(reference):
        raise Lost("the final weights or moments differ from those of the undisturbed run")


def require_equal(run_dir: Path, reference: Path) -> None:
    """Raise Lost unless a run ended with the weights, moments, losses and evaluations of the reference, bit for bit."""
    require_equal_weights(run_dir, reference)
    if losses_of(run_dir) != losses_of(reference):
        raise Lost("the losses differ from those of the undisturbed run")


def finish(workplace: Workplace, run_dir: Path, reference: Path, *overrides: str, env: Mapping[str, str] | None = None) -> Ended:
    """Start a disturbed run again, let it end, and compare it with the reference."""
    ended = workplace.start(run_dir, *overrides, env=env).wait().require(0)
    require_equal(run_dir, reference)
    return ended
