"""The public names of the package, as a program that imports it finds them."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_train
from moe_train import config
from moe_train.train.objectives import next_token
from tests.tiny import MIXTRAL

ROOT = Path(moe_train.__file__).parents[1]
TOKENS_BT = np.random.default_rng(0).integers(0, MIXTRAL.vocab_size, (4, 13)).astype(np.int32)


def loaded_after(program: str) -> set[str]:
    """Return which of the heavy packages a program has imported when it ends."""
    heavy = ("jax", "flax", "optax", "orbax", "numpy", "datasets", "pyarrow")
    report = f"import atexit, sys\natexit.register(lambda: print({{*{heavy}}} & {{*sys.modules}}, file=sys.stderr))\n"
    script = report + program
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return eval(result.stderr.splitlines()[-1])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "check", "--help"]])
def test_help_loads_no_heavy_package(arguments: list[str]) -> None:
    program = f"import sys; sys.argv = ['moe-train', *{arguments!r}]\nfrom moe_train.cli.main import main\nmain()"
    assert loaded_after(program) == set()


def test_import_loads_no_heavy_package() -> None:
    assert loaded_after("import moe_train; from moe_train import config; moe_train.load_config; dir(moe_train)") == set()


@pytest.mark.parametrize("name", moe_train.__all__)
def test_a_public_name_is_documented(name: str) -> None:
    public = getattr(moe_train, name)
    documentation = inspect.getdoc(public) or ""
    assert documentation.strip()
    if inspect.isfunction(public):
        assert f"    {documentation}".count(f"moe_train.{name}("), "an example of its use"
    assert public is getattr(importlib.import_module(public.__module__), public.__name__)


def test_the_table_of_modules_has_exactly_the_public_names() -> None:
    assert list(moe_train._MODULES) == moe_train.__all__ and set(moe_train.__all__) <= set(dir(moe_train))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'; its names are Config"):
        moe_train.nothing  # noqa: B018


def natural_loss(model: moe_train.Transformer, tokens_BT: jax.Array) -> jax.Array:
    hidden_BTD, _ = model(tokens_BT[:, :-1])
    logprobs_BTV = jax.nn.log_softmax(model.logits(hidden_BTD))
    return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1).sum()


@pytest.mark.slow
def test_a_natural_loss_works_without_a_mesh_and_equals_the_built_in_one() -> None:
    with jax.set_mesh(None):
        model = moe_train.init_model(0, MIXTRAL)
        value, gradients = jax.jit(jax.value_and_grad(natural_loss))(model, TOKENS_BT)

        def built_in(model: moe_train.Transformer) -> jax.Array:
            hidden_BTD, _ = model(TOKENS_BT[:, :-1])
            return -moe_train.token_logprobs(hidden_BTD, model.head_weight(), jnp.asarray(TOKENS_BT[:, 1:])).logprob.sum()

        expected, expected_gradients = jax.jit(jax.value_and_grad(built_in))(model)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
        for gradient, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max())
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize("sizes", [config.Mesh(), pytest.param(config.Mesh(fsdp=2, context=2, tensor=2), marks=pytest.mark.slow)])
def test_plain_arrays_give_the_same_logits_on_each_mesh(sizes: config.Mesh) -> None:
    devices = jax.devices()[: 8 if sizes.fsdp == 2 else 1]
    with jax.set_mesh(moe_train.make_mesh(sizes, devices)):
        model = moe_train.init_model(0, MIXTRAL)
        logits = jax.jit(lambda model, tokens_BT: model.logits(model(tokens_BT)[0]))
        row = np.asarray(logits(model, TOKENS_BT[:, :12]))
        # The first eight tokens do not see the others, and a second segment does not see the first.
        positions_BT = np.tile(np.arange(12, dtype=np.int32) % 8, (4, 1))
        segments_BT = np.tile(1 + np.arange(12, dtype=np.int32) // 8, (4, 1))
        packed = jax.jit(lambda model: model.logits(model(TOKENS_BT[:, :12], positions_BT, segments_BT)[0]))(model)
    np.testing.assert_allclose(row[:, :8], np.asarray(packed)[:, :8], rtol=1e-4, atol=1e-5)
    assert np.abs(row[:, 8:] - np.asarray(packed)[:, 8:]).max() > 1e-3


def test_a_mesh_cannot_be_put_in_force_inside_jit() -> None:
    with jax.set_mesh(None), pytest.raises(ValueError, match=r"no mesh is in force inside this jit; call jax.set_mesh"):
        jax.eval_shape(lambda: moe_train.init_model(0, MIXTRAL))


def test_steps_yield_the_lines_of_the_metrics_file(small_run, tmp_path: Path) -> None:
    run = moe_train.resolve(small_run(tmp_path / "run"))
    records = list(moe_train.steps(run))
    assert [(record["kind"], record["step"]) for record in records if record["kind"] == "eval"] == [("eval", i) for i in (0, 3, 6)]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [str(record) for record in records] == [str(record) for record in _lines(tmp_path / "run" / "metrics.jsonl")]


def test_a_loop_that_is_left_early_continues_from_the_last_checkpoint(small_run, tmp_path: Path) -> None:
    run = moe_train.resolve(small_run(tmp_path / "left"))
    for record in moe_train.steps(run, next_token.next_token()):
        if record["kind"] == "train" and record["step"] == 4:
            break
    continued = [record["step"] for record in moe_train.steps(run) if record["kind"] == "train"]
    assert continued == [4, 5, 6]  # step 4 was left before it was saved
    assert "the caller stopped iterating" in (tmp_path / "left" / "run.json").read_text()


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "moe_train" / "py.typed").is_file() and '"py.typed"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_types_reach_a_caller(tmp_path: Path) -> None:
    caller = tmp_path / "caller.py"
    caller.write_text(
        "import moe_train\n"
        "run = moe_train.resolve(moe_train.load_config('a.yaml'))\n"
        "reveal_type(moe_train.load_model('m'))\n"
        "reveal_type(run.train.seq_len)\n"
        "moe_train.load_model(3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--follow-imports=silent", str(caller)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/usr/bin", "MYPYPATH": str(ROOT)})
    assert 'Revealed type is "moe_train.model.transformer.Transformer"' in result.stdout, result.stdout + result.stderr
    assert 'Revealed type is "int"' in result.stdout.replace("builtins.", "")
    assert 'has incompatible type "int"; expected "str | Path"' in result.stdout
