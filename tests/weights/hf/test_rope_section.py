"""Rotary positions in both spellings; what contradicts itself, or is no number, is refused."""

from __future__ import annotations

from typing import Any

import pytest

from moe_train.weights.hf.rope_section import read_rope, rope_section

YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5, **YARN}},
        {
            "rope_theta": 5,
            "rope_scaling": {"type": "yarn", **YARN},
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 5, **YARN},
        },
    ],
)
def test_both_spellings_are_read(fields: dict[str, Any]) -> None:
    rope, scaling = read_rope(fields, rope_section(fields))
    wanted = {"name": "yarn", "theta": 5.0, "factor": 4.0, "mscale": 0.0, "mscale_all_dim": 0.0, "original_max_seq_len": 16}
    assert (rope, scaling) == (wanted, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5}, "rope_type is 'linear'; supported: default, yarn"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 5}},
            "factor is 2.0 in rope_scaling and None in rope_parameters; remove one",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "yarn", **YARN, "factor": 8.0}},
            "factor is 4.0 in rope_scaling and 8.0 in rope_parameters",
        ),
        (
            {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "yarn", **YARN, "rope_theta": 5}},
            "rope_theta is None in rope_scaling and 5 in rope_parameters",
        ),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'; it has to be a number"),
        ({"rope_theta": True}, "rope_theta is True; it has to be a number"),
        (
            {"rope_theta": 5, "rope_parameters": {"rope_type": "yarn", **YARN, "factor": "4"}},
            "factor is '4'; it has to be a number",
        ),
        ({"rope_parameters": 4}, "rope_parameters is 4; it has to be an object"),
    ],
)
def test_what_contradicts_itself_or_is_no_number_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rope(fields, rope_section(fields))
