"""Events of a run: groups, pictures and histograms, and what happens if they cannot be written."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe_train.machine.png import load_colors
from moe_train.run import tensorboard

LOAD = [[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]
METRICS = {"loss": 2.5, "grad_norm": 1.0, "mfu": None, "router_entropy": [0.25, 0.5, 0.75], "load": LOAD}


def events_of(file: Path) -> Iterator[Event]:
    """Events of the records of a file: length (8 bytes), its checksum (4), the message, its checksum (4)."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def values_of(folder: Path) -> Iterator[tuple[int, Any]]:
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in events_of(file):
            yield from ((event.step, value) for value in event.summary.value)


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
    """Of more metrics at a step than the ten that tensorboardX's own queue holds: a run waited for ever for that queue."""
    many = {f"metric_{i}": 1.0 for i in range(30)}
    events = tensorboard.EventWriter(tmp_path, 0, 4)
    events.write("train", 1, many)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events._file, "write_event", fail)
    for step in (2, 3):
        events.write("train", step, many)
    events.close()
    assert caplog.text.count("TensorBoard events are no longer written: [Errno 28] No space left on device") == 1
    assert {step for step, _ in values_of(tmp_path)} == {1}


def test_a_folder_that_cannot_be_made_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file in its place")
    events = tensorboard.EventWriter(tmp_path, 0, 4)
    events.write("train", 1, METRICS)
    events.close()
    assert caplog.text.count("TensorBoard events are no longer written") == 1


def test_events_of_a_process_that_died_are_hidden(tmp_path: Path) -> None:
    tensorboard.EventWriter(tmp_path, 6, 20).close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert SessionLog.START in [event.session_log.status for event in events_of(file) if event.step == 7]
