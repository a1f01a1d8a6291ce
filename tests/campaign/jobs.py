"""Jobs of two processes, resumes on other meshes, and the launchers that need no cluster."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.damage import half_done
from tests.campaign.trial_run import (
    HANG_SECONDS,
    ROOT,
    Ended,
    Lost,
    Process,
    Workplace,
    last_step,
    losses_of,
    require_equal,
)

MESHES = ("mesh.data=4", "mesh.fsdp=4", "mesh.expert=4", "mesh.fsdp=2 mesh.tensor=2", "mesh.context=2 mesh.expert=2")
Trial = tuple[str, str, Callable[[Workplace, random.Random], str]]


def trials() -> Iterator[Trial]:
    """Yield (kind, name, function)."""
    for mesh in MESHES:
        yield "killed, resumed on another mesh", mesh, _mesh_trial(mesh)
    for index in range(2):
        for number in (signal.SIGKILL, signal.SIGTERM):
            for repeat in range(2):
                name = f"{number.name} to process {index}, {repeat + 1}"
                yield "two processes: one gets a signal", name, _pair_signal_trial(index, number)
        yield "two processes: one does not see the newest checkpoint", f"process {index}", _blind_trial(index)
        yield "two processes: one is stopped for a minute", f"process {index}", _late_trial(index)
    yield "launchers", "again.sh: SIGKILL twice", _again_trial
    yield "launchers", "local.sh: SIGKILL of one process of two", _local_trial
    yield "launchers", "slurm.sbatch with a stand-in for srun: SIGKILL, requeued", _slurm_trial


def _mesh_trial(mesh: str) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        run_dir = half_done(workplace, f"mesh-{rng.getrandbits(32)}")
        workplace.start(run_dir, *mesh.split(), env={"JAX_NUM_CPU_DEVICES": "4"}).wait().require(0)
        found, expected = losses_of(run_dir), losses_of(workplace.reference())
        # Sums are taken in another order, so later losses are close and not equal.
        worst = 0.0
        if [line[:2] for line in found] != [line[:2] for line in expected]:
            raise Lost("other steps than those of the undisturbed run")
        for a, b in zip(found, expected, strict=True):
            if a[5] != b[5]:
                raise Lost(f"step {a[1]} has {a[5]} tokens with loss instead of {b[5]}: other data")
            worst = max(worst, abs(float(a[2]) / float(b[2]) - 1))
        if not worst < 5e-3:
            raise Lost(f"losses differ by {worst:.1e}")
        shutil.rmtree(run_dir)
        return f"the data are equal, losses within {worst:.1e}"

    return run


# --- two processes -------------------------------------------------------------------------------------------------

PAIR_MESH = ("mesh.fsdp=2",)


def _start_pair(workplace: Workplace, run_dir: Path, prefixes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())) -> list[Process]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = []
    for index in range(2):
        env = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        pair.append(workplace.start(run_dir, *PAIR_MESH, env=env, prefix=prefixes[index], log=f"log{index}"))
    return pair


def _finish_pair(workplace: Workplace, run_dir: Path, attempts: int = 5) -> list[Ended]:
    """Start both processes until they end with 0; a start that fails for a passing reason (75) is repeated, as launchers do."""
    for _ in range(attempts):
        ended = [process.wait() for process in _start_pair(workplace, run_dir)]
        if any(process.code not in (0, 75) for process in ended):
            raise Lost(f"exit codes {[process.code for process in ended]}: {ended[0].stderr[-300:]} {ended[1].stderr[-300:]}")
        if all(process.code == 0 for process in ended):
            return ended
    raise Lost(f"not finished after {attempts} starts")


def _pair_reference(workplace: Workplace) -> Path:
    path = workplace.folder / "pair"
    if not (path / "finished").exists():
        shutil.rmtree(path, ignore_errors=True)
        _finish_pair(workplace, path)
        (path / "finished").touch()
    return path


def _pair_signal_trial(index: int, number: signal.Signals) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        reference = _pair_reference(workplace)
        run_dir = workplace.new_folder(f"pair-{rng.getrandbits(32)}")
        pair = _start_pair(workplace, run_dir)
        aim = rng.randint(1, 50)
        pair[0].wait_until(lambda: last_step(run_dir) >= aim)
        pair[index].send(number)
        start = time.monotonic()
        codes = [process.wait(90).code for process in pair]
        seconds = time.monotonic() - start
        # The first process hosts JAX's service, whose loss may abort the other one (134); launchers restart after both.
        allowed = {75, -6, 134} if number == signal.SIGKILL else {75}
        if not set(codes) - {-number} <= allowed:
            raise Lost(f"exit codes {codes}")
        _finish_pair(workplace, run_dir)
        require_equal(run_dir, reference)
        shutil.rmtree(run_dir)
        return f"exit codes {codes} after {seconds:.1f} s at step {aim}"

    return run


def _late_trial(index: int) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        reference = _pair_reference(workplace)
        run_dir = workplace.new_folder(f"late-{rng.getrandbits(32)}")
        pair = _start_pair(workplace, run_dir)
        aim = rng.randint(0, 40)
        pair[0].wait_until(lambda: run_dir.exists() and last_step(run_dir) >= aim)
        pair[index].send(signal.SIGSTOP)
        time.sleep(60)
        pair[index].send(signal.SIGCONT)
        # Either they wait for each other, or a time-out of the backend ends them for a passing reason.
        codes = [process.wait().code for process in pair]
        if not set(codes) <= {0, 75}:
            raise Lost(f"exit codes {codes}: {pair[0].stderr()[-300:]} {pair[1].stderr()[-300:]}")
        if codes != [0, 0]:
            _finish_pair(workplace, run_dir)
        require_equal(run_dir, reference)
        shutil.rmtree(run_dir)
        return f"exit codes {codes} at step {aim}"

    return run


def _blind_trial(index: int) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        reference = _pair_reference(workplace)
        run_dir = workplace.new_folder(f"blind-{rng.getrandbits(32)}")
        shutil.copytree(reference, run_dir)
        shutil.rmtree(run_dir / "checkpoints" / "60")
        empty = run_dir.with_name(f"{run_dir.name}-empty")
        empty.mkdir()
        # In a namespace of its own, where an empty folder lies over the checkpoint.
        hidden = f'mount --bind "{empty}" "{run_dir}/checkpoints/55/params" && exec "$@"'
        prefixes = [(), ()]
        prefixes[index] = ("unshare", "-rm", "bash", "-c", hidden, "bash")
        start = time.monotonic()
        ended = [process.wait(120) for process in _start_pair(workplace, run_dir, (prefixes[0], prefixes[1]))]
        if [process.code for process in ended] != [0, 0]:
            raise Lost(f"exit codes {[process.code for process in ended]}: {ended[0].stderr[-400:]}")
        if "the checkpoint of step 55 is damaged" not in ended[0].stderr:
            raise Lost(f"no line names the checkpoint: {ended[0].stderr[-300:]}")
        require_equal(run_dir, reference)
        shutil.rmtree(run_dir)
        return f"continued from the checkpoint before in {time.monotonic() - start:.0f} s"

    return run


# --- launchers -----------------------------------------------------------------------------------------------------


def _launched(workplace: Workplace, run_dir: Path, command: list[str], rng: random.Random, kills: int, **env: str) -> int:
    """Run a launcher while some of the Python processes below it are killed; return its exit code."""
    with run_dir.with_name(f"{run_dir.name}.log").open("wb") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env={**workplace.env, **env}, stdout=log, stderr=log, start_new_session=True)
        for kill in range(kills):
            aim = rng.randint(20 * kill + 1, 20 * kill + 15)
            until = time.monotonic() + HANG_SECONDS
            while last_step(run_dir) < aim and launcher.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            _kill_a_descendant(launcher.pid, rng)
        try:
            return launcher.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            subprocess.run(["kill", "-9", "--", f"-{launcher.pid}"], check=False)
            raise Lost("the launcher does not end") from None


def _kill_a_descendant(session: int, rng: random.Random) -> None:
    """Kill one of the Python processes of a session that was started here."""
    listed = subprocess.run(["ps", "-o", "pid=,comm=", "-s", str(session)], capture_output=True, text=True, check=True).stdout
    pythons = [int(line.split()[0]) for line in listed.splitlines() if "python" in line.split()[1]]
    if not pythons:
        raise Lost("there is no process to kill")
    subprocess.run(["kill", "-9", str(rng.choice(pythons))], check=True)


def _again_trial(workplace: Workplace, rng: random.Random) -> str:
    run_dir = workplace.new_folder("again")
    command = ["bash", "launch/again.sh", sys.executable, "-m", "moe_train", "train", str(workplace.config), f"run_dir={run_dir}"]
    code = _launched(workplace, run_dir, command, rng, 2)
    if code:
        raise Lost(f"exit code {code}")
    require_equal(run_dir, workplace.reference())
    return "restarted twice; equal"


def _local_trial(workplace: Workplace, rng: random.Random) -> str:
    reference = _pair_reference(workplace)
    run_dir = workplace.new_folder("local")
    command = ["bash", "launch/local.sh", "2", "--", "train", str(workplace.config), f"run_dir={run_dir}", *PAIR_MESH]
    code = _launched(workplace, run_dir, command, rng, 1, PYTHON=sys.executable)
    if code:
        raise Lost(f"exit code {code}")
    require_equal(run_dir, reference)
    return "both restarted; equal"


SRUN = """#!/usr/bin/env bash
# One task on this host, as `srun` starts it.
shift  # --kill-on-bad-exit=0
SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=1 exec "$@"
"""


def _slurm_trial(workplace: Workplace, rng: random.Random) -> str:
    bin_dir = workplace.new_folder("slurm-bin")
    bin_dir.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", f'#!/bin/sh\necho "$*" >> "{bin_dir}/requeued"\n')):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    run_dir = workplace.new_folder("slurm")
    command = ["bash", "launch/slurm.sbatch", "train", str(workplace.config), f"run_dir={run_dir}"]
    path = f"{bin_dir}:{workplace.env['PATH']}"
    env = {"PATH": path, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "PYTHON": sys.executable}
    code = _launched(workplace, run_dir, command, rng, 1, **env)
    if code <= 128 or (bin_dir / "requeued").read_text() != "requeue 7\n":
        raise Lost(f"exit code {code}, and the job was not requeued")
    code = _launched(workplace, run_dir, command, rng, 0, **env, SLURM_RESTART_COUNT="1")
    if code:
        raise Lost(f"exit code {code} after the requeue")
    require_equal(run_dir, workplace.reference())
    return "requeued once; equal"
