"""Features that are computed once give the losses of those computed in every step, and are never those of another tower."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.checkpoint.identity import base_origin
from moe_train.commands.prepare import prepare
from moe_train.commands.train import train
from moe_train.model.parameters import combine_some, parameters
from moe_train.model.tower_flops import flops_of_run
from moe_train.model.transformer import abstract_model
from moe_train.run import loop
from moe_train.run.inputs import RunInputs, open_inputs
from moe_train.run.resolve import resolve
from moe_train.run.tower_features import add_features
from moe_train.train.objectives.choose import objective_of_run
from moe_train.train.objectives.next_token import media_of
from moe_train.weights import external
from tests.commands.wrapper import save_wrapper
from tests.data.hugging_face import small_tekken
from tests.integration.test_pictures import IMAGE, MODEL, save_records, written
from tests.meshes import mesh_of
from tests.random_parameters import random_parameters
from tests.run_dir import lines
from tests.tiny import ONE

SHORT = config.Train(steps=2, batch_size=8, seq_len=32)
PLAIN = config.Mesh(data=8)
MESH = mesh_of(PLAIN)
COMPUTED = config.Vision(patches_per_row=32)
LORA = config.Lora(targets=(config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),))


def stored(**changes: Any) -> config.Vision:
    features = config.StoredFeatures(name="stored", **changes)
    return config.Vision(patches_per_row=32, features=features)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wrapper, a tokenizer and records, two of which have the same picture."""
    folder = tmp_path_factory.mktemp("features")
    with jax.set_mesh(ONE):
        save_wrapper(folder / "base", random_parameters(MODEL), model=MODEL)
    small_tekken(folder, "v7", vocab=280, image=IMAGE)
    shutil.copyfile(folder / "tekken.json", folder / "base" / "tekken.json")
    file = save_records(folder / "data")
    shutil.copyfile(folder / "data/pictures/0.png", folder / "data/pictures/6.png")
    assert len(file.read_text().splitlines()) == 8
    return folder


def losses(run_dir: Path) -> list[float]:
    return [line["cross_entropy"] for line in lines(run_dir) if "cross_entropy" in line]


def opened(run: config.Run) -> RunInputs:
    inputs = open_inputs(run, objective_of_run(run))
    assert run.init_from is not None
    add_features(run, inputs, base_origin(run.init_from), MESH, lambda line: None)
    return inputs


def test_features_of_a_batch_are_those_that_the_tower_computes(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common: dict[str, Any] = {"train": SHORT, "mesh": PLAIN}
    with pytest.raises(ValueError, match=r"features of 7 files take [\d,]+ bytes, and features.max_gib"):
        prepare(written(ready, vision=stored(max_gib=1e-7), **common), with_features=True)
    with pytest.raises(ValueError, match="--features has no effect"):
        prepare(written(ready, **common), with_features=True)
    assert not list((ready / "cache").rglob("features-*"))
    capsys.readouterr()
    sets = prepare(written(ready, vision=stored(), **common), with_features=True)["sets"]
    [folder] = Path(sets[0]["path"]).glob("features-*")
    about = json.loads((folder / "about.json").read_text())
    assert f"storing the features of 7 files of {ready}" in (said := capsys.readouterr().err)
    assert f"{about['features']['bytes']:,} bytes" in said and (about["width"], about["dtype"]) == (MODEL.model_dim, "float32")
    with jax.set_mesh(MESH):
        computed, run = (resolve(written(ready, vision=vision, **common), 8) for vision in (COMPUTED, stored()))
        structure, shapes = parameters(abstract_model(run.model, run.compute, None, run.encoder))
        weights = external.load_external_parameters(ready / "base", {x: like for x, like in shapes.items() if "vision." in x})
        compute = jax.jit(lambda media: combine_some(structure, weights).media_features(media.placed()))
        batches = open_inputs(computed, objective_of_run(computed)).train, opened(run).train
        for step in range(2):
            with_pictures, with_features = (loader.batch(step) for loader in batches)
            assert all(np.array_equal(x, y) for x, y in zip(with_pictures[:6], with_features[:6], strict=True))
            pictures = media_of(with_pictures)
            assert pictures is not None
            features = np.asarray(compute(pictures))
            for row, index in enumerate(with_features.feature_index):
                used = index[index >= 0]
                assert len(used) and np.allclose(with_features.features[row, used], features[row, used], rtol=1e-5, atol=1e-6)


def test_features_of_another_tower_are_refused_in_a_named_set(ready: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(ready / "base", other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["multi_modal_projector.linear_2.weight"] *= 2
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    first = written(ready, vision=stored(), train=SHORT, mesh=PLAIN)
    path = prepare(first, with_features=True)["sets"][0]["path"]
    assert first.data is not None
    named = config.PreparedSource(name="prepared", path=path, too_long="error")
    data = first.data.model_copy(update={"train": (named,)})
    with jax.set_mesh(MESH):
        assert opened(resolve(first.model_copy(update={"data": data}), 8)).train.batch(0).features.any()
        with pytest.raises(
            ValueError, match=r"holds features of another tower or projector than init_from gives.*remove the folder"
        ):
            opened(resolve(first.model_copy(update={"data": data, "init_from": str(other)}), 8))


@pytest.mark.slow
def test_losses_are_those_of_a_tower_in_the_step(ready: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"train": SHORT, "lora": LORA, "mesh": config.Mesh(data=2, context=2, tensor=2)}
    for name, vision in (("computed", COMPUTED), ("stored", stored())):
        assert train(written(ready, run_dir=str(tmp_path / name), vision=vision, **common)) == loop.FINISHED
    first, second = losses(tmp_path / "computed"), losses(tmp_path / "stored")
    # The second step comes after an update, which AdamW scales to the size of the learning rate.
    assert len(first) == 2 and np.allclose(first, second, rtol=2e-5)
    other = tmp_path / "other"
    shutil.copytree(ready / "base", other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["vision_tower.ln_pre.weight"] *= 2
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    longer = common | {"train": SHORT.model_copy(update={"steps": 3})}
    with pytest.raises(ValueError, match=r"tower and projector in .* have changed"):
        train(written(ready, run_dir=str(tmp_path / "stored"), init_from=str(other), vision=stored(), **longer))
    assert train(written(ready, run_dir=str(tmp_path / "stored"), vision=stored(), **longer)) == loop.FINISHED


def test_a_step_has_no_tower(ready: Path) -> None:
    computed, run = (resolve(written(ready, vision=vision), 8) for vision in (COMPUTED, stored()))
    assert run.model_encoder is None and run.encoder is not None
    with jax.set_mesh(ONE):
        _, shapes = parameters(abstract_model(run.model, run.compute, None, run.model_encoder))
    assert not [path for path in shapes if path.startswith("vision.")]
    assert flops_of_run(run) < flops_of_run(computed)
    suites = written(ready, vision=stored(), evaluation=config.Evaluation(suites=("suite.yaml",)))
    assert resolve(suites, 8).model_encoder == run.encoder
