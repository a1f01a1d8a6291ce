"""The losses of runs as a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from moe_train.commands.loss_chart import Losses, read_losses, write_chart


def test_a_chart_has_a_line_and_a_dot_for_each_evaluation(tmp_path: Path) -> None:
    lines = [
        {"kind": "eval", "step": 0, "loss": 4.0},
        {"kind": "train", "step": 1, "loss": 3.0},
        {"kind": "train", "step": 2, "loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses = read_losses(tmp_path)
    assert losses == Losses(tmp_path.name, [(1, 3.0), (2, 2.0)], [(0, 4.0)])

    write_chart([losses, Losses("a <b>", [(0, 1.0)], [])], tmp_path / "chart.svg")
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    first, second = root.findall(f"{name}g")
    # The highest loss, at step 0, is at the top left; the lowest, at the last step, at the bottom right.
    (dot,) = first.findall(f"{name}circle")
    assert (dot.get("cx"), dot.get("cy")) == ("48.0", "36.0")
    line = first.find(f"{name}polyline")
    assert line is not None and line.get("points") == "246.0,130.0 444.0,224.0"
    assert second.find(f"{name}text").text == "a <b>: loss over steps"  # type: ignore[union-attr]
