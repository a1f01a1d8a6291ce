"""External models: the layout of a path, and tensors that are not those of the architecture."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from moe_train.commands import write_and_prove as write
from moe_train.weights import external
from tests.random_parameters import abstract, random_parameters
from tests.tiny import MIXTRAL, ONE


def test_a_model_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    with jax.set_mesh(ONE):
        write.export(random_parameters(MIXTRAL), MIXTRAL, tmp_path / "out", dtype="float32")
        file = tmp_path / "out/config.json"
        settings = json.loads(file.read_text())
        for change, message in (
            ({"intermediate_size": 10}, "of shape"),
            ({"num_hidden_layers": 3}, "which this architecture has not"),
        ):
            file.write_text(json.dumps(settings | change))
            with pytest.raises(ValueError, match=message):
                external.load_parameters(tmp_path / "out", abstract(MIXTRAL))
        file.write_text(json.dumps(settings))
        wider = MIXTRAL.model_copy(update={"model_dim": 16})
        with pytest.raises(ValueError, match=r"gives .*\(24, 8\)"):
            external.load_parameters(tmp_path / "out", abstract(wider))
