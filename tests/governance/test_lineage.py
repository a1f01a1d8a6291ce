"""What a model was made from is read from the records of its run, up to the checkpoint and no further."""

from __future__ import annotations

from moe_train.checkpoint.metadata import CheckpointMetadata
from moe_train.governance.lineage import HeldOut, training_of
from tests.governance.lineages import SET, lineage_of, run_of, write_records

ABOUT = CheckpointMetadata({}, 0, "data", None)


def test_records_up_to_the_checkpoint_count(tmp_path):
    training = lineage_of(tmp_path).training
    assert training.held_out == (HeldOut(0, 5.0), HeldOut(2, 3.5), HeldOut(3, 3.75))
    assert training.data == (SET,) and training.data_hash == SET.hash
    assert [session["step"] for session in training.sessions] == [0, 2]
    assert training.seconds == 1.5 * 3600


def test_a_run_that_was_killed_states_no_time(tmp_path):
    write_records(tmp_path, [("start", 0, "10:00:00"), ("resume", 2, "12:00:00"), ("stop", 3, "12:30:00")])
    assert training_of(tmp_path, run_of(), ABOUT, 3).seconds is None


def test_a_checkpoint_after_which_the_run_went_on_states_no_time(tmp_path):
    assert lineage_of(tmp_path).training.seconds is not None
    assert training_of(tmp_path, run_of(), ABOUT, 2).seconds is None


def test_records_that_are_gone_or_damaged_are_left_out_and_damaged_ones_are_named(tmp_path, caplog):
    training = training_of(tmp_path, run_of(), ABOUT, 3)
    assert (training.data, training.held_out, training.sessions, training.seconds) == ((), (), (), None)
    assert not caplog.records
    write_records(tmp_path, [("start", 0, "10:00:00")])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind"')  # as a kill leaves the last line
    (tmp_path / "run.json").write_text('{"events": [{"event": "start"}]}')
    (tmp_path / "manifest.json").write_text('{"sets": [{}]}')
    training = training_of(tmp_path, run_of(), ABOUT, 3)
    assert [measured.step for measured in training.held_out] == [0, 2, 3]
    assert (training.data, training.sessions, training.seconds) == ((), (), None)
    for name in ("metrics.jsonl:6", "run.json", "manifest.json"):
        assert f"{tmp_path / name} is damaged" in caplog.text
