"""A process that trains, and may kill itself: `worker.py CONFIG STEP SIGNAL OVERRIDES…`.

Each of OVERRIDES is one run: `run_dir=DIR` and more overrides, with commas between. When the figures of STEP are
written and the checkpoint of CHECKPOINT is on disk, the process sends itself SIGNAL (step 0: never). The hash of each
batch that is trained on goes to DIR/batches.txt.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from moe_train.commands.train import train
from moe_train.config import yaml_file
from moe_train.run import attempt, writer

CHECKPOINT = 5
path, step_to_die, signal_name, *runs = sys.argv[1:]
write, put = writer.Writer.train, attempt.put_batch

for overrides in runs:
    config = yaml_file.load_config(path, overrides.split(","))
    run_dir = Path(config.run_dir)

    def write_and_die(self: writer.Writer, step: int, figures: dict, run_dir: Path = run_dir) -> None:
        write(self, step, figures)
        if step == int(step_to_die):
            while not (run_dir / "checkpoints" / str(CHECKPOINT)).is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), getattr(signal, signal_name))

    def note_and_put(batch: tuple, mesh: object, run_dir: Path = run_dir) -> tuple:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "batches.txt").open("a") as file:
            file.write(hashlib.sha256(b"".join(array.tobytes() for array in batch)).hexdigest() + "\n")
        return put(batch, mesh)

    writer.Writer.train, attempt.put_batch = write_and_die, note_and_put  # type: ignore[method-assign]
    code = train(config)
    if code:
        sys.exit(code)
