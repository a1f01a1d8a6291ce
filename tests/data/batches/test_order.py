"""Plans kept on disk are those that are made; rows are numbered on over epochs."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_train.data.batches import order
from moe_train.data.batches.order import Order, Shuffle
from moe_train.data.batches.packing import make_plan

LENGTHS = np.random.default_rng(0).integers(0, 40, 500)


def make(cache: Path, seed: Any = (1, 0), digest: str = "a") -> Order:
    store: Any = SimpleNamespace(manifest=SimpleNamespace(hash=digest))
    return Order(store, LENGTHS, 32, "split", Shuffle(seed), cache)


def test_a_large_plan_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make(tmp_path)
    expected = [small.plan(epoch) for epoch in range(3)]
    assert not (tmp_path / "plans").exists()
    monkeypatch.setattr(order, "_KEPT", 100)
    first = make(tmp_path)
    assert [first.plan(epoch).digest for epoch in range(3)] == [plan.digest for plan in expected]
    assert len(list((tmp_path / "plans").iterdir())) == 3
    monkeypatch.setattr(order, "make_plan", lambda *_: pytest.fail("made again"))
    again = make(tmp_path)
    for epoch, plan in enumerate(expected):
        found = again.plan(epoch)
        assert found.digest == plan.digest and found[-3:] == plan[-3:] and isinstance(found.example.base, np.ndarray)
    for other in (make(tmp_path, (1, 1)), make(tmp_path, digest="b")):
        with pytest.raises(pytest.fail.Exception):
            other.plan()


@pytest.mark.parametrize("name", ["plan.npy", "sha256"])
@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "missing"])
def test_a_damaged_plan_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    monkeypatch.setattr(order, "_KEPT", 100)
    expected = make(tmp_path).plan().digest
    [file] = (tmp_path / "plans").glob(f"*/{name}")
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    file.write_bytes({"empty": b"", "cut": content[:-3], "flipped": flipped, "missing": b""}[damage])
    if damage == "missing":
        file.unlink()
    for _ in range(2):
        assert make(tmp_path).plan().digest == expected
    assert caplog.messages == [f"{file.with_name('plan.npy')} is damaged; the rows are planned again"]


def test_a_plan_that_cannot_be_kept_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make(tmp_path).plan().digest
    monkeypatch.setattr(order, "_KEPT", 100)

    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, f"No space left on device; {path} was not written")

    monkeypatch.setattr(order, "new_directory", full)
    assert make(tmp_path).plan().digest == expected
    assert "cannot be written" in caplog.text and "each process plans its rows anew" in caplog.text


def test_rows_count_on_over_epochs(tmp_path: Path) -> None:
    made = make(tmp_path)
    plans = [make_plan(LENGTHS, 32, "split", (1, 0, epoch, 0)) for epoch in range(4)]
    rows = [
        [tuple(piece) for piece in np.stack(plan[1:4], 1)[a:b].tolist()]
        for plan in plans
        for a, b in zip(plan.row_pieces, plan.row_pieces[1:], strict=False)
    ]
    wanted = [len(rows) - 1, 0, plans[0].num_rows - 1, plans[0].num_rows, len(rows) // 2]  # the last first: nothing was planned yet
    assert [[tuple(piece) for piece in made.pieces(row)] for row in wanted] == [rows[row] for row in wanted]
    assert made.end(3) == len(rows) and made.end(0) == plans[0].num_rows


@pytest.mark.parametrize("window", [1, 700, 3000, 10**6])
def test_windows_come_one_after_the_other_in_an_order_of_the_epochs_own(tmp_path: Path, window: int) -> None:
    store: Any = SimpleNamespace(manifest=SimpleNamespace(hash="a"))
    made = Order(store, LENGTHS, 32, "split", Shuffle((1, 0), window), tmp_path)
    turns = []
    for epoch in range(2):
        plan = made.plan(epoch)
        pieces = sorted(zip(plan.example.tolist(), plan.start.tolist(), plan.length.tolist(), strict=True))
        whole = make_plan(LENGTHS, 32, "split")
        assert pieces == sorted(zip(whole.example.tolist(), whole.start.tolist(), whole.length.tolist(), strict=True))
        assert (plan.num_dropped, plan.num_split) == (whole.num_dropped, whole.num_split)
        assert np.add.reduceat(plan.length, plan.row_pieces[:-1]).max() <= 32
        of = np.searchsorted(made._starts, plan.example, side="right") - 1
        turns.append([int(w) for w, before in zip(of, [-1, *of], strict=False) if w != before])
        assert len(turns[-1]) == len(set(turns[-1])), "a window is done with before the next begins"
        sizes = np.bincount(of, plan.length)
        assert window >= LENGTHS.sum() or sizes.max() <= 1.5 * window + 80
    assert turns[0] != turns[1] or len(turns[0]) == 1
