"""The command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.cli import main


def run(*arguments: str | Path) -> int:
    """The exit code of `moe-train` with the arguments."""
    with pytest.raises(SystemExit) as stop:
        main.main([*map(str, arguments)])
    return int(stop.value.code or 0)
