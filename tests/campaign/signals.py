"""Signals to a run and to other commands: each ends within seconds, says so, and the same command continues."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.trial_run import SAVE_STEPS, Lost, Process, Workplace, finish, last_step

STOPS = (signal.SIGTERM, signal.SIGINT)
OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGALRM)
LIMIT_SECONDS = 5.0
"""A process must have ended so soon after a signal."""
PHASES = ("import", "start", "compile", "step", "save", "held-out loss")
Trial = tuple[str, str, Callable[[Workplace, random.Random], str]]


def trials() -> Iterator[Trial]:
    """Yield (kind, name, function) for every signal and phase."""
    for number in STOPS:
        for phase in PHASES:
            yield "TERM or INT to a run", f"{number.name} while: {phase}", _signal_trial(number, phase)
        for command in ("export", "verify", "evaluate"):
            yield "TERM or INT to another command", f"{number.name} to {command}", _command_trial(number, command)
    for number in OTHERS:
        yield "HUP, USR1, USR2, QUIT, ALRM to a run", number.name, _signal_trial(number, "step")


def _signal_trial(number: signal.Signals, phase: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        run_dir = workplace.new_folder(f"signal-{number.name}-{phase.replace(' ', '-')}")
        reference = workplace.reference()
        env = {}
        if phase == "compile":  # nothing is compiled yet
            env["MOE_TRAIN_COMPILE_CACHE"] = str(workplace.new_folder("empty-cache"))
        process = workplace.start(run_dir, env=env)
        _await_phase(process, run_dir, phase, rng)
        seconds = _end(process, number)
        ended = process.wait()
        if number in STOPS and phase != "import":
            ended.require(75)
            if number.name not in ended.stderr:
                raise Lost(f"no line names {number.name}: {ended.stderr[-300:]}")
        elif ended.code not in (75, -number, 128 + number, 130):
            ended.require(75)
        finish(workplace, run_dir, reference)
        shutil.rmtree(run_dir)
        return f"exit code {ended.code} after {seconds:.1f} s at step {last_step(run_dir) if run_dir.exists() else '-'}"

    return run


def _await_phase(process: Process, run_dir: Path, phase: str, rng: random.Random) -> None:
    match phase:
        case "import":
            time.sleep(rng.uniform(0.05, 1.0))
        case "start":
            process.wait_until(lambda: run_dir.exists() or "parameters" in process.stderr())
        case "compile":
            process.wait_until(lambda: "self-test" in process.stderr())
            time.sleep(rng.uniform(0.3, 1.5))
        case "step":
            aim = rng.randint(1, 50)
            process.wait_until(lambda: last_step(run_dir) >= aim)
        case "save":
            aim = SAVE_STEPS * rng.randint(1, 9)
            process.wait_until(lambda: any((run_dir / "checkpoints").glob(f"{aim}*")))
        case _:
            process.wait_until(lambda: last_step(run_dir) == 20)


def _end(process: Process, number: int) -> float:
    """Send a signal and return after how many seconds the process has ended. Raises Lost if it takes too long."""
    if not process.runs():
        raise Lost(f"ended before the signal: {process.stderr()[-300:]}")
    start = time.monotonic()
    process.send(number)
    while process.runs():
        if time.monotonic() - start > LIMIT_SECONDS:
            process.send(signal.SIGKILL)
            raise Lost(f"still running {LIMIT_SECONDS:g} s after the signal: {process.stderr()[-300:]}")
        time.sleep(0.01)
    return time.monotonic() - start


def _command_trial(number: signal.Signals, command: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        reference = workplace.reference()
        out = workplace.new_folder(f"{command}-{number.name}")
        log = out.with_name(f"{out.name}.log")
        arguments = {
            "export": ["export", str(reference), str(out)],
            "verify": ["verify", str(exported(workplace))],
            "evaluate": ["evaluate", str(reference), "--data", str(workplace.folder / "eval.jsonl")],
        }[command]
        process = workplace.command(arguments, log)
        time.sleep(rng.uniform(1.0, 3.5))
        if process.runs():
            seconds = _end(process, number)
            ended = process.wait()
            if "Traceback" in ended.stderr or ended.code not in (-number, 128 + number, 130, 75):
                raise Lost(f"exit code {ended.code}: {ended.stderr[-300:]}")
        else:
            seconds = 0.0
            process.wait().require(0)
        if command == "export" and out.exists():
            # An export appears complete or not at all; the signal came while the process was ending.
            workplace.command(["verify", str(out)], log).wait().require(0)
            shutil.rmtree(out)
        workplace.command(arguments, log).wait().require(0)
        return f"ended after {seconds:.1f} s"

    return run


def exported(workplace: Workplace) -> Path:
    """Return an export of the undisturbed run, made once."""
    path = workplace.folder / "export"
    if not (path / "export_proof.json").exists():
        shutil.rmtree(path, ignore_errors=True)
        workplace.command(["export", str(workplace.reference()), str(path)], workplace.folder / "export.log").wait().require(0)
    return path
