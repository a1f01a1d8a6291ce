"""A run that is logged to a tracker in two processes, the second of which continues after step 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.run.trackers.trackers import Trackers, _is_installed, check_trackers, tracked_runs

LOGGED = {"loss": 2.5, "router_entropy": [0.25, 0.75], "load": [[0.75, 0.25]]}
SETTINGS = {"optimizer.learning_rate": 0.01, "config_sha256": "c" * 64, "data_sha256": "d" * 64, "code_sha256": "e" * 64}


def log_twice(run_dir: Path, section: config.Tracker) -> str:
    """Log steps 1 to 3, and 3 to 5 after a resume; return the identity of the run."""
    if not _is_installed(section.name):
        pytest.skip(f"{section.name} is not installed: the extra {section.name}")
    check_trackers([section])
    identity = ""
    for steps, is_new, is_finished in ((range(1, 4), True, False), (range(3, 6), False, True)):
        tracked = tracked_runs([section], run_dir, "tiny", SETTINGS, is_new)
        identity = tracked[section.name].id
        trackers = Trackers(tracked)
        for step in steps:
            trackers.write("train", step, {**LOGGED, "loss": 10.0 / step})
        trackers.write("eval", steps[-1], {"loss": 1.5})
        trackers.close(is_finished)
    return identity
