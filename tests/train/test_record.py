from __future__ import annotations

from pathlib import Path

import pytest

from moe_train.train.record import only_one


def test_a_second_process_is_kept_out_until_the_first_has_left(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(ValueError, match="another process is training in"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass
