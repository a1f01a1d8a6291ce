"""Signals, and the votes of processes."""

from __future__ import annotations

import signal

import pytest

from moe_train import config
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.run import loop
from moe_train.run.stopping import Votes, signals, vote
from moe_train.run.writer import Writer
from tests.run_dir import events, losses, steps_in


def test_interrupted_and_started_again(tmp_path, finished, small_run, monkeypatch, capsys):
    """Ctrl-C during step 3, in this process; the handlers are as before afterwards."""
    write, before = Writer.train, signal.getsignal(signal.SIGINT)

    def interrupt(writer: Writer, step: int, figures: dict) -> None:
        write(writer, step, figures)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Writer, "train", interrupt)
    run = small_run(tmp_path)
    assert train(run) == loop.UNFINISHED
    assert signal.getsignal(signal.SIGINT) is before
    assert events(tmp_path)[-1]["reason"] == "SIGINT" and steps_in(tmp_path)[-1] == events(tmp_path)[-1]["step"] == 4
    assert train(run) == loop.FINISHED
    assert losses(tmp_path) == losses(finished)
    assert "continuing after step 4" in capsys.readouterr().err


@pytest.fixture
def usual_interrupt():
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect(usual_interrupt):
    with signals() as asked:
        assert asked.reason is None
        signal.raise_signal(signal.SIGINT)
        assert asked.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("wishes", [(False, False), (True, False), (False, True)])
def test_a_vote_counts_each_wish_alone(wishes):
    voted = vote(wishes, make_mesh(config.Mesh(data=2, fsdp=2, tensor=2)))
    assert tuple(map(bool, voted)) == wishes


def test_votes_of_two_steps_are_joined():
    assert Votes(stop=True).combined_with(Votes(save=True)) == Votes(stop=True, save=True)
    assert Votes().combined_with(Votes()) == Votes(stop=False, save=False)
