"""Signals, and the votes of processes."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time

import pytest

from moe_train import config
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.run import attempt, loop
from moe_train.run.stopping import StopRequested, Votes, signals, vote
from moe_train.run.writer import Writer
from tests.run_dir import events, lines, losses, steps_in


def test_interrupted_and_started_again(tmp_path, finished, small_run, monkeypatch, capsys):
    """Ctrl-C after step 3, in this process: the evaluation is left out and made up for; the handlers are as before afterwards."""
    write, before = Writer.train, signal.getsignal(signal.SIGINT)

    def interrupt(writer: Writer, step: int, figures: dict) -> None:
        write(writer, step, figures)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Writer, "train", interrupt)
    run = small_run(tmp_path)
    assert train(run) == loop.UNFINISHED
    assert signal.getsignal(signal.SIGINT) is before
    assert events(tmp_path)[-1]["reason"] == "SIGINT" and steps_in(tmp_path)[-1] == events(tmp_path)[-1]["step"] == 3
    assert train(run) == loop.FINISHED
    assert losses(tmp_path) == losses(finished)
    held_out = [[(line["step"], line["loss"]) for line in lines(path, "eval")] for path in (tmp_path, finished)]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 3
    assert "continuing after step 3" in capsys.readouterr().err


@pytest.fixture
def usual_interrupt():
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect(usual_interrupt):
    with signals() as asked:
        asked.starting = None
        assert asked.reason is None
        signal.raise_signal(signal.SIGINT)
        assert asked.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_before_the_first_step_ends_the_start(tmp_path, small_run, monkeypatch, capfd):
    def interrupt(*_):
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(attempt, "run_self_tests", interrupt)
        assert train(small_run(tmp_path)) == loop.UNFINISHED
    said = capfd.readouterr().err
    assert "moe-train: SIGTERM received; waiting for testing the kernels, for 4 s at most; nothing is lost" in said
    assert "moe-train: stopped before the first step (SIGTERM); start again to continue" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(small_run(tmp_path, train__steps=2)) == loop.FINISHED


def test_a_signal_in_a_callback_of_the_garbage_collector_ends_the_start():
    """Python drops what is raised there."""

    def interrupt(*_):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StopRequested), signals():
        gc.callbacks.append(interrupt)
        gc.collect()
        time.sleep(5)


BUSY = """
import hashlib
from moe_train.run.stopping import signals
with signals() as asked:
    asked.starting = "compiling the step"
    print("ready", flush=True)
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)  # C code, in which no handler of Python runs
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_in_c_code_ends_within_seconds(number):
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(number)
    assert process.stderr.readline() == (
        f"moe-train: {number.name} received; waiting for compiling the step, for 4 s at most; nothing is lost\n"
    )
    assert time.monotonic() - start < 2
    assert process.wait(20) == loop.UNFINISHED and time.monotonic() - start < 8
    assert process.stderr.read() == "moe-train: ended while compiling the step; start again to continue\n"


@pytest.mark.parametrize("wishes", [(False, False), (True, False), (False, True)])
def test_a_vote_counts_each_wish_alone(wishes):
    voted = vote(wishes, make_mesh(config.Mesh(data=2, fsdp=2, tensor=2)))
    assert tuple(map(bool, voted)) == wishes


def test_votes_of_two_steps_are_joined():
    assert Votes(stop=True).combined_with(Votes(save=True)) == Votes(stop=True, save=True)
    assert Votes().combined_with(Votes()) == Votes(stop=False, save=False)
