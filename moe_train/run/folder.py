"""The folder of a run: a lock that admits one process at a time, and a copy of what the run was started with."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import jax

from moe_train import config
from moe_train.checkpoint.runs import TOKENIZER_FOLDER
from moe_train.config import yaml_file
from moe_train.data.tokenizers.load import load_tokenizer, tokenizer_at
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.machine.files import new_directory, write_text
from moe_train.run.averaging import AVERAGE_FOLDER
from moe_train.run.inputs import RunInputs
from moe_train.weights.texts import Texts, write_texts
from moe_train.weights.together import require_shared

log = logging.getLogger(__name__)


class RunFolder:
    """Context manager that locks the folder of a run for this job while the block runs.

    Entering does not create a folder that does not exist yet; only `write` does.

    Raises:
        ValueError: the path is a file, or another job on this machine trains in the folder.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise ValueError(f"run_dir {path} is a file; state a directory")
        self.path = path
        self._lock = contextlib.ExitStack()
        self._is_locked = False

    def __enter__(self) -> RunFolder:
        if self.path.exists():
            self._enter_lock()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def _enter_lock(self) -> None:
        if jax.process_index() == 0 and not self._is_locked:
            self._lock.enter_context(only_one(self.path))
            self._is_locked = True

    def write(self, run: config.Run, inputs: RunInputs) -> None:
        """Make the folder and write the config, the manifest of the data and a copy of the tokenizer into it."""
        if jax.process_index() == 0:
            # A new folder could not be locked on entry, so it is locked as soon as it exists.
            self.path.mkdir(parents=True, exist_ok=True)
            self._enter_lock()
            write_text(self.path / "config.yaml", yaml_file.dump(run.to_config()))
            write_text(self.path / "manifest.json", inputs.train.manifest)
            _keep_tokenizer(self.path / TOKENIZER_FOLDER, inputs.tokenizer)
            if not isinstance(run.average, config.NoAverage):
                (self.path / AVERAGE_FOLDER).mkdir(exist_ok=True)
                _keep_tokenizer(self.path / AVERAGE_FOLDER / TOKENIZER_FOLDER, inputs.tokenizer)
        # After the folder exists: every process checks that it sees the one that the first process made.
        require_shared(self.path)


def _keep_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's files into `folder`, so that the run can be moved and exported even if the original files disappear.

    A copy that is not the tokenizer, such as a damaged one, is renamed and replaced, with a warning.
    """
    if folder.exists() and not _is_copy(folder, tokenizer):
        renamed = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        folder.rename(renamed)
        log.warning("%s is not the tokenizer of this run; it was renamed to %s, and copied again", folder, renamed.name)
    if not folder.exists():
        with new_directory(folder) as unfinished:
            write_texts(unfinished, Texts(tokenizer))
            generation_config = tokenizer.files[0].parent / "generation_config.json"
            if generation_config.is_file():  # it names the tokens that end a generation
                shutil.copyfile(generation_config, unfinished / generation_config.name)


def _is_copy(folder: Path, tokenizer: Tokenizer) -> bool:
    """Return whether a folder holds the files of a tokenizer."""
    try:
        return load_tokenizer(tokenizer_at(folder)).identity == tokenizer.identity
    except (OSError, ValueError):  # whatever is damaged, the copy is made again
        return False


@contextlib.contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Keep other jobs on this machine out of `run_dir` while the block runs.

    Only an advisory file lock is held, so it is released with the process, however the process ends.

    Args:
        run_dir: an existing folder.

    Raises:
        ValueError: another process holds the lock.
    """
    # The lock is on the file, not in it, so a file that a killed process left behind locks nobody out.
    with (run_dir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"run_dir {run_dir} is in use by another process that trains in it; wait until it ends, or choose another run_dir"
            ) from None
        yield
