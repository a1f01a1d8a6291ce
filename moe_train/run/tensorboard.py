"""TensorBoard events of a run: scalars in groups, and pictures and histograms of what has a value per layer and expert."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_train.machine.png import load_colors, png_of
from moe_train.run.metric_names import grouped, layer_values, scalars

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
"""The folder of a run that holds its events."""
PICTURES = 200
"""Number of pictures and histograms of a whole run at most; TensorBoard reads all of them into memory."""
_PIXELS = 512
"""Width and height of a load map in pixels at most, unless it has more layers or experts."""


class EventWriter:
    """Write the metrics of a run as TensorBoard events.

    Events past `start_step`, left by a process that died after its last checkpoint, are hidden.

    Args:
        run_dir: the folder of the run.
        start_step: the step that the run continues after.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, run_dir: Path, start_step: int, total_steps: int) -> None:
        # Imported here, since a run may do without it.
        from tensorboardX import SummaryWriter

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # the loop already reports non-finite values
        _report_failed_events()
        folder = str(run_dir / TENSORBOARD_FOLDER)
        self._writer: Any = SummaryWriter(folder, purge_step=start_step + 1, flush_secs=30)
        self._picture_steps = max(1, total_steps // PICTURES)

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step.

        Args:
            kind: train, eval or suite.
            step: the step.
            metrics: metrics by name; a list has one entry per router, each a number or a list over experts.
        """
        if _events_failed.is_set():
            return
        for name, value in scalars(kind, metrics):
            self._writer.add_scalar(name, value, step)
        if kind != "train" or step % self._picture_steps:
            return
        for name, value in metrics.items():
            values = layer_values(value) if isinstance(value, list) else None
            if values is None or not np.isfinite(values).all():
                continue
            self._writer.add_histogram(f"{grouped(kind, name)}/distribution", values.ravel(), step)
            if values.ndim == 2:
                self._write_picture(f"{grouped(kind, name)}/map", values, step)

    def _write_picture(self, tag: str, load_LE: np.ndarray, step: int) -> None:
        """Write a map of loads: a row for each sparse layer, a column for each expert; white is even, blue idle, red busy."""
        from tensorboardX.proto.summary_pb2 import Summary

        layers, experts = load_LE.shape
        # Large enough to be seen: TensorBoard does not enlarge pictures.
        colors = load_colors(load_LE).repeat(max(1, _PIXELS // layers), 0).repeat(max(1, _PIXELS // experts), 1)
        height, width, _ = colors.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png_of(colors))
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def close(self) -> None:
        """Write what is left; a disk that is full is a warning, since the training itself has succeeded."""
        if _events_failed.is_set():
            return
        try:
            self._writer.close()
        except OSError as error:
            log.warning("the last TensorBoard events could not be written: %s", error)


_events_failed = threading.Event()
"""Set when TensorBoard's thread could not write."""


@functools.cache
def _report_failed_events() -> None:
    """Print one line instead of a traceback if TensorBoard's thread cannot write, as on a full disk; training continues."""
    usual_hook = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        """Report an exception that ended a thread."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboardX.")):
            usual_hook(failure)
        elif not _events_failed.is_set():
            _events_failed.set()
            log.warning("TensorBoard events are no longer written: %s", failure.exc_value)

    threading.excepthook = hook
