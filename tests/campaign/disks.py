"""Disks that are full: one line, the last checkpoint intact, and the same command continues once there is space."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator

from tests.campaign.trial_run import Lost, Workplace, finish

KIND = "full disk"
Trial = tuple[str, str, Callable[[Workplace, random.Random], str]]


def trials() -> Iterator[Trial]:
    """Yield (kind, name, function) for disks of several sizes."""
    for kibibytes in (64, 256, 700, 1200):
        yield KIND, f"tmpfs of {kibibytes} KiB for the run folder", _tmpfs_trial(kibibytes)
    for size in (100, 3_000, 40_000, 120_000):
        yield KIND, f"no file larger than {size} bytes (RLIMIT_FSIZE)", _limit_trial(size)


def can_mount() -> bool:
    """Return whether this user may mount a file system in a namespace of its own."""
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0


def _tmpfs_trial(kibibytes: int) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        if not can_mount():
            return "not possible here: no mounts"
        run_dir = workplace.new_folder(f"tmpfs-{kibibytes}") / "run"
        outside = run_dir.parent
        run_dir.mkdir(parents=True)
        # The files of the small disk are copied out before it goes with its namespace.
        mount = f'mount -t tmpfs -o size={kibibytes}k none "{run_dir}"'
        mounted = f'{mount} && "$@"; code=$?; cp -a "{run_dir}" "{outside}/after"; exit $code'
        process = workplace.start(run_dir, prefix=("unshare", "-rm", "bash", "-c", mounted, "bash"))
        ended = process.wait().require(0, 1)
        if ended.code == 1 and "No space left" not in ended.stderr:
            raise Lost(f"no line says that the disk is full: {ended.stderr[-300:]}")
        _require_one_line(ended.stderr)
        shutil.rmtree(run_dir)
        (outside / "after").rename(run_dir)
        finish(workplace, run_dir, workplace.reference())
        shutil.rmtree(outside)
        return f"exit code {ended.code}: {ended.stderr.splitlines()[-1][:200]}"

    return run


def _limit_trial(size: int) -> Callable[[Workplace, random.Random], str]:
    def run(workplace: Workplace, rng: random.Random) -> str:
        run_dir = workplace.new_folder(f"limit-{size}")
        reference = workplace.reference()
        ended = workplace.start(run_dir, prefix=("prlimit", f"--fsize={size}:unlimited")).wait().require(0, 1)
        _require_one_line(ended.stderr)
        finish(workplace, run_dir, reference)
        shutil.rmtree(run_dir, ignore_errors=True)
        return f"exit code {ended.code}: {ended.stderr.splitlines()[-1][:200]}"

    return run


def _require_one_line(stderr: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("moe-train: ")]
    if len(errors) > 2 or len(stderr.splitlines()) > 40:
        raise Lost(f"{len(stderr.splitlines())} lines on stderr: {stderr[:300]}")
