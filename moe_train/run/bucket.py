"""A run whose folder is in a bucket: it works in a folder of this machine, and a thread copies what is complete to the bucket.

In the bucket a checkpoint counts once `complete/STEP.json` exists, which lists its files, is written last and removed first; so a
reader never takes a part of a checkpoint for one. Records are copied after the checkpoints that they mention. A run that starts on
a machine without its folder, or with an older one, first fetches the records and the checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moe_train import config
from moe_train.checkpoint.metadata import CHECKPOINTS_FOLDER, steps_on_disk
from moe_train.data.prepared.bucket import fault, open_files
from moe_train.machine.agreement import exchange

log = logging.getLogger(__name__)

COMPLETE_FOLDER = "complete"
"""Folder in the bucket of the objects that make checkpoints count."""
SYNC_SECONDS = 10.0
"""Seconds between two looks at what is new."""
COPY_SECONDS = 6 * 3600.0
"""Seconds that processes wait for the first one to fetch a run, or to copy its end."""
SIGN_FILE = ".first_process"
"""File of the working folder by which the other processes know that they see the folder of the first."""
SIGN_SECONDS = 10.0
"""Seconds after which a shared file system shows a file that another host has written."""
WORK_VARIABLE = "MOE_TRAIN_WORK_DIR"
"""Variable that names the folder in which runs of buckets work on this machine."""
_NOT_COPIED = frozenset({CHECKPOINTS_FOLDER, COMPLETE_FOLDER, "compile", ".lock", SIGN_FILE})
"""Entries of a run's folder that are not records: checkpoints are copied on their own, compiled programs belong to a machine."""


def is_url(run_dir: str) -> bool:
    """Return whether a run_dir is in a bucket."""
    return "://" in run_dir


def working_folder(run_dir: str) -> Path:
    """Return the folder of this machine in which a run works: `run_dir` itself, or for a URL a folder in the user's cache."""
    if not is_url(run_dir):
        return Path(run_dir)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train" / "runs"
    name = run_dir.rstrip("/").rpartition("/")[2]
    digest = hashlib.sha256(run_dir.rstrip("/").encode()).hexdigest()[:12]
    return Path(os.environ.get(WORK_VARIABLE) or cache) / f"{name}-{digest}"


@contextlib.contextmanager
def in_working_folder(run: config.Run) -> Iterator[config.Run]:
    """Yield the run with a folder of this machine; for a run in a bucket, copy what is new to it while the block runs.

    Several processes work in the folder of the first one, which fetches and copies for all; so all of them must see it.

    Raises:
        ValueError: the URL cannot be opened, or a process does not see the folder of the first one.
        OSError: the bucket cannot be read, or what the run has made cannot be copied at its end. It stays in the folder then, and
            the next start on this machine copies it.
        ConnectionError: another process of the job does not answer.
    """
    if not is_url(run.run_dir):
        yield run
        return
    folder = working_folder(run.run_dir)
    local_run = run.model_copy(update={"run_dir": str(folder)})
    if jax.process_index() == 0:
        print(f"run_dir {run.run_dir}: the run works in {folder}, from where it is copied", file=sys.stderr)
        copy = BucketCopy(run.run_dir, folder)
        copy.fetch()
        _require_shared(run.run_dir, folder)
        with copy.copying():
            yield local_run
    else:
        _require_shared(run.run_dir, folder)
        yield local_run
    # The first process ends a job; the others would end before its last copy.
    exchange("", f"on the end of the copy to {run.run_dir}", COPY_SECONDS)


def _require_shared(run_dir: str, folder: Path) -> None:
    """Raise ValueError in all processes if one of them does not see the working folder of the first.

    The first process calls this when the folder is as it should be, and the others return after that.
    """
    if jax.process_count() == 1:
        return
    sign = folder / SIGN_FILE
    text = ""
    if jax.process_index() == 0:
        text = secrets.token_hex(16)
        folder.mkdir(parents=True, exist_ok=True)
        sign.write_text(text)
    expected = exchange(text, f"on the working folder of {run_dir}", COPY_SECONDS)[0]
    deadline = time.monotonic() + SIGN_SECONDS
    while not (is_seen := sign.is_file() and sign.read_text() == expected) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers = [json.loads(answer) for answer in exchange(json.dumps(is_seen), f"on the working folder of {run_dir}")]
    if not all(answers):
        raise ValueError(
            f"run_dir {run_dir} is in a bucket, and process {answers.index(False)} of {len(answers)} does not see {folder}, where "
            f"the first process works; let {WORK_VARIABLE} name a folder that all hosts see, or mount the bucket with gcsfuse or "
            "mountpoint-s3 and state its folder as run_dir"
        )


class BucketCopy:
    """The copy of a run's folder in a bucket.

    Args:
        url: URL of the run in any file system of fsspec, such as gs://bucket/runs/a.
        folder: the folder of this machine in which the run works.

    Raises:
        ValueError, OSError: the bucket cannot be opened; the message is one line.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._folder = folder
        self._files, root = open_files(url)
        self._root = root.rstrip("/")
        self._copied: dict[str, tuple[int, int]] = {}  # record -> (size, mtime_ns) of what was copied last
        self._complete: set[int] = set()
        self._stopping = threading.Event()
        self._has_warned = False

    def fetch(self) -> None:
        """Fetch the run from the bucket if that has a newer checkpoint than this machine, or if this machine has none.

        What this machine has and the bucket lacks, after a kill before it was copied, is kept and copied.
        """
        with self._explained():
            self._complete = self._steps_in_bucket()
            newest_there = max(self._complete, default=0)
            here = set(steps_on_disk(self._folder / CHECKPOINTS_FOLDER))
            for step in {int(name) for name in self._names(CHECKPOINTS_FOLDER) if name.isdecimal()} - self._complete - here:
                # What a killed process had begun to copy, or to remove.
                self._files.rm(self._object(f"{CHECKPOINTS_FOLDER}/{step}"), recursive=True)
            if newest_there <= max(here, default=0):
                return
            # An older state of the same run: what came after it is in the bucket.
            shutil.rmtree(self._folder, ignore_errors=True)
            for name in self._records_in_bucket():
                self._get(name, self._folder / name)
            # All of them: an older one may be the best, and is there if the newest is damaged.
            for step in sorted(self._complete):
                self._fetch_checkpoint(step)

    def _fetch_checkpoint(self, step: int) -> None:
        """Fetch a checkpoint, which appears in the folder completely or not at all."""
        final = self._folder / CHECKPOINTS_FOLDER / str(step)
        unfinished = final.with_name(f"{step}.orbax-checkpoint-tmp-fetched")
        for name, size in self._listing(step).items():
            target = unfinished / name
            self._get(f"{CHECKPOINTS_FOLDER}/{step}/{name}", target)
            if target.stat().st_size != size:
                raise OSError(f"{name} of the checkpoint of step {step} has {target.stat().st_size} bytes instead of {size}")
        os.replace(unfinished, final)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Copy what is new every few seconds while the block runs, and the rest at its end.

        Raises:
            OSError: the rest cannot be copied, unless the block has failed itself; then that is a warning.
        """
        thread = threading.Thread(target=self._copy_until_stopped, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._stopping.set()
            thread.join()
            self._copy_or_warn()
            raise
        self._stopping.set()
        thread.join()
        with self._explained():
            self.copy()

    def _copy_until_stopped(self) -> None:
        while not self._stopping.wait(SYNC_SECONDS):
            self._copy_or_warn()

    def _copy_or_warn(self) -> None:
        """Copy what is new; if the bucket does not answer, say so once and try again later."""
        try:
            self.copy()
            self._has_warned = False
        except Exception as error:  # each file system has its own exceptions
            if not self._has_warned:
                self._has_warned = True
                log.warning("%s; the run goes on in %s, and what is new is copied later", fault(self._url, error), self._folder)

    def copy(self) -> None:
        """Copy new checkpoints, then records that have changed, and remove checkpoints that the run has removed."""
        here = set(steps_on_disk(self._folder / CHECKPOINTS_FOLDER))
        for step in sorted(here - self._complete):
            try:
                self._copy_checkpoint(step)
            except FileNotFoundError:
                # The run may remove a checkpoint meanwhile; anything else that is missing is a fault.
                if step in steps_on_disk(self._folder / CHECKPOINTS_FOLDER):
                    raise
        for path in sorted(self._records_here()):
            try:
                self._copy_record(path)
            except FileNotFoundError:
                if path.exists():
                    raise
        for step in sorted(self._complete - here) if here else ():
            self._remove_checkpoint(step)

    def _copy_checkpoint(self, step: int) -> None:
        """Copy the files of a checkpoint, and then the object that makes it count."""
        checkpoint = self._folder / CHECKPOINTS_FOLDER / str(step)
        listing = {}
        for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            name = path.relative_to(checkpoint).as_posix()
            self._put(path, f"{CHECKPOINTS_FOLDER}/{step}/{name}")
            listing[name] = path.stat().st_size
        if not steps_on_disk(checkpoint.parent).count(step):  # removed in between, so the list may lack files
            return
        marker = self._object(f"{COMPLETE_FOLDER}/{step}.json")
        self._make_folder_of(marker)
        self._files.pipe_file(marker, json.dumps(listing).encode())
        self._complete.add(step)

    def _remove_checkpoint(self, step: int) -> None:
        self._files.rm_file(self._object(f"{COMPLETE_FOLDER}/{step}.json"))
        self._complete.discard(step)
        self._files.rm(self._object(f"{CHECKPOINTS_FOLDER}/{step}"), recursive=True)

    def _copy_record(self, path: Path) -> None:
        """Copy a record if it has changed since it was copied last."""
        name = path.relative_to(self._folder).as_posix()
        status = path.stat()
        state = (status.st_size, status.st_mtime_ns)
        if self._copied.get(name) != state:
            # An object is replaced at once or not at all.
            self._put(path, name)
            self._copied[name] = state

    def _records_here(self) -> Iterator[Path]:
        """Yield the files of the run's folder that are not of its checkpoints."""
        if not self._folder.is_dir():
            return
        for entry in self._folder.iterdir():
            if entry.name in _NOT_COPIED or ".unfinished-" in entry.name:
                continue
            yield from (path for path in ([entry] if entry.is_file() else entry.rglob("*")) if path.is_file())

    def _records_in_bucket(self) -> list[str]:
        names = [path[len(self._root) + 1 :] for path in self._files.find(self._root)]
        return [name for name in names if name.partition("/")[0] not in _NOT_COPIED]

    def _steps_in_bucket(self) -> set[int]:
        """Return the steps of the checkpoints in the bucket that are complete."""
        self._files.invalidate_cache()
        return {int(name.removesuffix(".json")) for name in self._names(COMPLETE_FOLDER) if name.removesuffix(".json").isdecimal()}

    def _names(self, folder: str) -> list[str]:
        """Return the names in a folder of the bucket; none if there is no such folder."""
        try:
            return [path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._object(folder), detail=False)]
        except FileNotFoundError:
            return []

    def _listing(self, step: int) -> dict[str, int]:
        listing: Any = json.loads(self._files.cat_file(self._object(f"{COMPLETE_FOLDER}/{step}.json")))
        if not isinstance(listing, dict):
            raise OSError(f"the list of the files of step {step} is damaged")
        return listing

    def _object(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, path: Path, name: str) -> None:
        target = self._object(name)
        self._make_folder_of(target)
        self._files.put_file(str(path), target)

    def _make_folder_of(self, target: str) -> None:
        # An object store has no folders.
        if not self._files.async_impl:
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)

    def _get(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(self._object(name), str(path))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the errors of the file system into one line with a remedy."""
        try:
            yield
        except Exception as error:  # each file system has its own exceptions
            raise fault(self._url, error) from error
