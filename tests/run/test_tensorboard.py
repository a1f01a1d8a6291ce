"""Events of a run: groups, pictures and histograms, and what happens if they cannot be written."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from moe_train.machine.png import load_colors
from moe_train.run import tensorboard

LOAD = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]
METRICS = {"loss": 2.5, "grad_norm": 1.0, "mfu": None, "router_entropy": [0.25, 0.5, 0.75], "load": LOAD}


def values_of(folder: Path) -> Iterator[tuple[int, Any]]:
    """(step, value) of the records of an event file: length (8 bytes), its checksum (4), the message, its checksum (4)."""
    for file in sorted((folder / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            yield from ((event.step, value) for value in event.summary.value)
            content = content[16 + length :]


def write(folder: Path, steps: range, total: int) -> dict[tuple[str, int], Any]:
    events = tensorboard.EventWriter(folder, 0, total)
    for step in steps:
        events.write("train", step, METRICS)
    events.write("eval", steps[-1], {"loss": 2.25})
    events.write("suite", steps[-1], {"kpi": 0.5})
    events.close()
    return {(value.tag, step): value for step, value in values_of(folder)}


def test_scalars_pictures_and_histograms_in_groups(tmp_path: Path) -> None:
    values = write(tmp_path, range(1, 3), 4)
    scalars = {tag: value.simple_value for (tag, step), value in values.items() if step == 2 and value.HasField("simple_value")}
    assert scalars == {
        **{"loss/train": 2.5, "optimizer/grad_norm": 1.0, "held_out/loss": 2.25, "suites/kpi": 0.5},
        **{"router/entropy": 0.5, "router/entropy/min": 0.25, "router/entropy/max": 0.75},
        **{"router/load/min": 0.0, "router/load/max": 2.0},
    }
    histogram = values["router/load/distribution", 1].histo
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (6, 0.0, 2.0, 6.0)
    image = values["router/load/map", 2].image
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (image.height, image.width, 3)
    cells = pixels[:: image.height // 3, :: image.width // 2][:3, :2]
    np.testing.assert_array_equal(cells, load_colors(2 * np.array(LOAD)))


def test_a_long_run_has_few_pictures(tmp_path: Path) -> None:
    values = write(tmp_path, range(1, 21), 5 * tensorboard.PICTURES)
    assert [step for tag, step in values if tag == "router/load/map"] == [5, 10, 15, 20]
    assert len([step for tag, step in values if tag == "loss/train"]) == 20


def test_events_that_cannot_be_written_are_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tensorboard, "_events_failed", threading.Event())
    events = tensorboard.EventWriter(tmp_path, 0, 4)
    event_writer = events._writer.file_writer.event_writer

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(event_writer._ev_writer, "write_event", fail)
    for step in (1, 2):
        events.write("train", step, {"loss": 1.0})
        event_writer._worker.join(5)
    events.close()
    assert caplog.text.count("TensorBoard events are no longer written: [Errno 28] No space left on device") == 1
