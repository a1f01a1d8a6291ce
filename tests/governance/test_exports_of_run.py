"""A run remembers its exports; a damaged line or a folder that cannot be written to stops nothing."""

from __future__ import annotations

from moe_train.governance.exports_of_run import EXPORTS_FILE, ExportEntry, exports_of_run, note_export

ENTRY = ExportEntry("2026-11-03T10:00:00+00:00", "/models/tuned", "hf", 3, "a" * 64, ("moe-train", "export"))


def test_entries_are_read_in_order_and_damaged_ones_are_named(tmp_path, caplog):
    assert exports_of_run(tmp_path) == []
    note_export(tmp_path, ENTRY)
    with (tmp_path / EXPORTS_FILE).open("a") as file:
        file.write('{"time": \n{"unknown": 1}\n')
    later = ENTRY._replace(step=4)
    note_export(tmp_path, later)
    assert exports_of_run(tmp_path) == [ENTRY, later]
    assert f"{tmp_path / EXPORTS_FILE}:2 is damaged" in caplog.text and f"{tmp_path / EXPORTS_FILE}:3 is damaged" in caplog.text


def test_a_folder_that_is_gone_gives_a_warning(tmp_path, caplog):
    note_export(tmp_path / "gone", ENTRY)
    assert "does not list this export" in caplog.text
