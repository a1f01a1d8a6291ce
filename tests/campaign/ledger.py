"""What a campaign has tried so far: one JSON line per trial in a file, so that it can be stopped and continued, and a table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one trial."""

    kind: str
    """The row of the table."""
    name: str
    """Unique within the kind; a trial whose name is known is not tried again."""
    tried: int
    survived: int
    seconds: float
    detail: str
    """What happened, for a reader of the file."""


class Ledger:
    """The results of a campaign, read from a file and appended to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: list[Result] = []
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            self.results.append(Result(**json.loads(line)))

    def has(self, kind: str, name: str) -> bool:
        """Return whether the trial was made before."""
        return any(result.kind == kind and result.name == name for result in self.results)

    def add(self, result: Result) -> None:
        """Append a result, so that a campaign that is killed has lost none."""
        self.results.append(result)
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(result)) + "\n")

    def forget_lost(self) -> None:
        """Remove the trials that were not survived, so that they are made again after a fix."""
        lost = self.lost()
        self.results = [result for result in self.results if result not in lost]
        self._path.write_text("".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in self.results))

    def tried(self, kind: str) -> int:
        """Return how often faults of a kind were tried."""
        return sum(result.tried for result in self.results if result.kind == kind)

    def lost(self) -> list[Result]:
        """Return the trials with a fault that was not survived."""
        return [result for result in self.results if result.survived < result.tried]

    def table(self) -> str:
        """Return the table in Markdown: one row per kind, in the order of the first trial."""
        rows = ["| fault | tried | survived | lost |", "|---|---|---|---|"]
        kinds = list(dict.fromkeys(result.kind for result in self.results))
        for kind in kinds:
            tried = self.tried(kind)
            survived = sum(result.survived for result in self.results if result.kind == kind)
            rows.append(f"| {kind} | {tried} | {survived} | {tried - survived} |")
        tried = sum(result.tried for result in self.results)
        survived = sum(result.survived for result in self.results)
        rows.append(f"| all | {tried} | {survived} | {tried - survived} |")
        return "\n".join(rows)
