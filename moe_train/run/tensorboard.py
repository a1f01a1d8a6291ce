"""TensorBoard events of a run: scalars in groups, and pictures and histograms of what has a value per layer and expert."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_train.machine.png import load_colors, png_of
from moe_train.run.metric_names import grouped, layer_values, scalars

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.summary_pb2 import Summary

log = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
"""The folder of a run that holds its events."""
PICTURES = 200
"""Number of pictures and histograms of a whole run at most; TensorBoard reads all of them into memory."""
BINS = 30
"""Number of bins of a histogram."""
_PIXELS = 512
"""Width and height of a load map in pixels at most, unless it has more layers or experts."""


class EventWriter:
    """Write the metrics of a run as TensorBoard events.

    Events past `start_step`, left by a process that died after its last checkpoint, are hidden. If events cannot be written, as on
    a full disk, one line says so, and training goes on without them.

    Args:
        run_dir: the folder of the run.
        start_step: the step that the run continues after.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, run_dir: Path, start_step: int, total_steps: int) -> None:
        # Imported here, since a run may do without it.
        from tensorboardX.proto.event_pb2 import SessionLog

        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # the loop already reports non-finite values
        self._folder = run_dir / TENSORBOARD_FOLDER
        self._picture_steps = max(1, total_steps // PICTURES)
        self._has_failed = False
        self._file: EventsWriter | None = None
        self._append(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, kind: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step.

        Args:
            kind: train, eval or suite.
            step: the step.
            metrics: metrics by name; a list has one entry per router, each a number or a list over experts.
        """
        from tensorboardX import summary
        from tensorboardX.proto.summary_pb2 import Summary

        values = Summary()
        for name, value in scalars(kind, metrics):
            values.MergeFrom(summary.scalar(name, value))
        if kind == "train" and step % self._picture_steps == 0:
            for name, value in metrics.items():
                per_layer = layer_values(value) if isinstance(value, list) else None
                if per_layer is None or not np.isfinite(per_layer).all():
                    continue
                values.MergeFrom(summary.histogram(f"{grouped(kind, name)}/distribution", per_layer.ravel(), BINS))
                if per_layer.ndim == 2:
                    values.MergeFrom(_picture(f"{grouped(kind, name)}/map", per_layer))
        self._append(step, summary=values)

    def _append(self, step: int, **content: Any) -> None:
        """Write an event, from this thread: tensorboardX's own one ends at a full disk, and its queue then blocks its users."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        if self._has_failed:
            return
        try:
            if self._file is None:
                self._folder.mkdir(exist_ok=True)
                self._file = EventsWriter(str(self._folder / "events"))
            self._file.write_event(Event(wall_time=time.time(), step=step, **content))
            self._file.flush()
        except OSError as error:
            self._has_failed = True
            log.warning("TensorBoard events are no longer written: %s", error)

    def close(self) -> None:
        """Close the file; all events have been written."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            if not self._has_failed:
                log.warning("the last TensorBoard events could not be written: %s", error)


def _picture(tag: str, load_LE: np.ndarray) -> Summary:
    """Return a map of loads: a row for each sparse layer, a column for each expert; white is even, blue idle, red busy."""
    from tensorboardX.proto.summary_pb2 import Summary

    layers, experts = load_LE.shape
    # Large enough to be seen: TensorBoard does not enlarge pictures.
    colors = load_colors(load_LE).repeat(max(1, _PIXELS // layers), 0).repeat(max(1, _PIXELS // experts), 1)
    height, width, _ = colors.shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png_of(colors))
    return Summary(value=[Summary.Value(tag=tag, image=image)])
