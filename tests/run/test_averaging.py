"""Averages of a run's weights, against numpy on its checkpoints; they are read as a run of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_train import config
from moe_train.checkpoint import model_dir
from moe_train.checkpoint.load_params import load_params
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import init_model
from moe_train.run import loop
from tests.run_dir import steps_in


def weights_of(run: config.Config, folder: Path, step: int) -> dict[str, np.ndarray]:
    assert run.model is not None
    with jax.set_mesh(make_mesh(run.mesh)):
        _, shapes = parameters(jax.eval_shape(lambda: init_model(0, run.model, run.compute)))
        return {path: np.asarray(x) for path, x in load_params(folder, shapes, step).params.items()}


def test_exponential_average_and_resume(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 10, "average": {"name": "ema", "decay": 0.75}}
    run = small_run(run_dir, **settings)
    assert train(run) == loop.FINISHED
    assert steps_in(run_dir / "average") == [1, 2, 3, 4, 5, 6]
    average = weights_of(run, run_dir / "average", 1)
    for step in range(2, 7):
        now = weights_of(run, run_dir, step)
        average = {path: 0.75 * average[path] + 0.25 * now[path] for path in average}
    for path, x in weights_of(run, run_dir / "average", 6).items():
        np.testing.assert_allclose(x, average[path], rtol=1e-5, atol=1e-7)
    # It opens like any run, with a tokenizer of its own.
    assert model_dir.open_model(run_dir / "average").tokenizer.files[0].is_relative_to(run_dir / "average")
    # Continued from step 4, the average is the same, bit for bit; later averages are done again.
    for step in (5, 6):
        shutil.rmtree(run_dir / "checkpoints" / str(step))
    undisturbed = weights_of(run, run_dir / "average", 6)
    assert train(run) == loop.FINISHED
    for path, x in weights_of(run, run_dir / "average", 6).items():
        np.testing.assert_array_equal(x, undisturbed[path])


def test_mean_of_the_last_checkpoints(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # Evaluated at the end alone, so that no best checkpoint comes in between.
    settings = {"checkpoint__keep_last": 2, "evaluation__every_steps": 100}
    run = small_run(run_dir, **settings, average={"name": "last_k", "count": 3})
    assert train(run) == loop.FINISHED
    kept = [weights_of(run, run_dir, 4), weights_of(run, run_dir, 6)]
    four, six = (weights_of(run, run_dir / "average", step) for step in (4, 6))
    for path, mean in six.items():
        # The average after step 4 is the mean of 2 and 4.
        second = 2 * four[path] - kept[0][path]
        np.testing.assert_allclose(mean, (second + kept[0][path] + kept[1][path]) / 3, rtol=1e-4, atol=1e-6)


def test_what_is_refused(small_run: Callable[..., config.Config], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"average.count 4 needs checkpoint.keep_last 3 or more, not 2"):
        small_run(tmp_path, checkpoint__keep_last=2, average={"name": "last_k", "count": 4})
    run = small_run(tmp_path / "run", average={"name": "ema"})
    tree = json.loads(run.model_dump_json())
    tree["compute"]["param_dtype"] = "bfloat16"
    tree["optimizer"]["rounding"] = "stochastic"
    with pytest.raises(ValueError, match=r"average.name ema needs weights in float32"):
        train(config.Config.model_validate_json(json.dumps(tree)))
    assert not (tmp_path / "run").exists()
