"""A resolved run: nothing in it is optional, and a config that leaves something open does not become one."""

from __future__ import annotations

import types
import typing

import pytest

from moe_train import config
from tests.run.tiny_config import MODEL, written


def test_no_field_is_optional() -> None:
    hints = typing.get_type_hints(config.Run)
    optional = [name for name in config.Run.model_fields if types.NoneType in typing.get_args(hints[name])]
    assert not optional and all(field.is_required() for field in config.Run.model_fields.values())


@pytest.mark.parametrize(
    ("sections", "error"), [({"init_from": "base"}, "does not state model"), ({"model": MODEL, "mesh": {"fsdp": -1}}, "axis of -1")]
)
def test_an_open_config_is_refused(sections: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        config.run_of(written(**sections))


def test_full_training_has_no_adapters_and_random_weights_no_source() -> None:
    run = config.run_of(written(model=MODEL))
    assert (run.lora, run.init_from) == (None, None)
    assert run.method == config.FullTraining() and run.initial_weights == config.RandomWeights()
