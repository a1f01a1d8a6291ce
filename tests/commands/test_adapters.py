"""Adapters compared, merged and scaled: norms against numpy's, files against the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.cli import main
from moe_train.commands import adapters, compare_adapters, write_and_prove
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.model.paths import ParameterPath
from moe_train.weights import peft, texts
from tests.commands.runs import MODEL, ONE
from tests.random_parameters import random_parameters

LORA = config.Lora(
    targets=(
        config.LoraTarget(modules=("attention.o_proj", "head"), rank=2, alpha=3.0),
        config.LoraTarget(modules=("ffn.*",), rank=3, alpha=2.0),
    )
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: HuggingFace) -> Callable[[str], Path]:
    """`base`, a model with its tokenizer, and PEFT adapters of it: `one`, `two`, and `full` with modules trained in full."""
    folder = tmp_path_factory.mktemp("files")
    with jax.set_mesh(ONE):
        weights = {path: x for path, x in random_parameters(MODEL, lora=LORA, scale=0.3).items() if ".lora_" not in path}
        write_and_prove.export_model(
            weights, MODEL, folder / "base", write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(small_tokenizer))
        )
        full = LORA.model_copy(update={"train": ("ffn.router", "final_norm")})
        for name, seed, lora in (("one", 1, LORA), ("two", 2, LORA), ("full", 3, full)):
            trained = {
                path: x
                for path, x in random_parameters(MODEL, lora=lora, scale=0.3, seed=seed).items()
                if ParameterPath.parse(path).is_trained(lora)
            }
            peft.export_adapter(trained, MODEL, lora, folder / name, base_model=str(folder / "base"))
    return lambda name: folder / name


def tensors(directory: Path) -> dict[str, np.ndarray]:
    (file,) = directory.glob("*.safetensors")
    return {name: x.astype(np.float64) for name, x in safetensors.numpy.load_file(file).items()}


def deltas(directory: Path) -> dict[str, np.ndarray]:
    """Name of a weight -> what the adapter adds to it, (out, in): ten lines that know PEFT's files alone."""
    settings, found, there = json.loads((directory / "adapter_config.json").read_text()), {}, tensors(directory)
    for name, a in there.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = settings["alpha_pattern"].get(stem.split(".")[-1], settings["lora_alpha"])
            found[f"{stem}.weight"] = alpha / len(a) * there[name.replace("lora_A", "lora_B")] @ a
    return found


def place(name: str) -> tuple[int | None, str, int | None]:
    parts = name.split(".")
    ours = {"o_proj": "attention.o_proj", "w1": "ffn.gate_proj", "w2": "ffn.down_proj", "w3": "ffn.up_proj", "lm_head": "head"}
    expert = int(parts[5]) if "experts" in parts else None
    return int(parts[2]) if "layers" in parts else None, ours[parts[-2]], expert


def check(found: compare_adapters.Comparison, changes: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> None:
    wanted = {place(name): (np.linalg.norm(x), np.linalg.norm(base[name])) for name, x in changes.items()}
    assert {(m.layer, m.module, m.expert): (m.delta, m.weight) for m in found.changes} == {
        key: pytest.approx(value, rel=1e-5) for key, value in wanted.items()
    }
    assert [m.relative for m in found.changes] == sorted((m.relative for m in found.changes), reverse=True)


def test_norms_are_those_of_the_whole_deltas(files: Callable[[str], Path]) -> None:
    one, two, base = deltas(files("one")), deltas(files("two")), tensors(files("base"))
    found = compare_adapters.diff(files("one"))
    check(found, one, base)
    together = lambda x: np.sqrt(sum(np.sum(x[f"model.layers.1.block_sparse_moe.experts.3.w{i}.weight"] ** 2) for i in (1, 2, 3)))  # noqa: E731
    assert np.shape(found.experts()) == (2, 4) and found.experts()[1][3] == pytest.approx(together(one) / together(base), rel=1e-5)
    check(compare_adapters.diff(files("one"), against=files("two")), {name: one[name] - two[name] for name in one}, base)
    assert max(m.relative for m in compare_adapters.diff(files("one"), against=files("one")).changes) < 1e-6


def test_what_was_trained_in_full_counts_as_well(files: Callable[[str], Path]) -> None:
    there, base = tensors(files("full")), tensors(files("base"))
    moved = {(m.layer, m.module): m for m in compare_adapters.diff(files("full")).changes}
    change = there["base_model.model.model.layers.1.mlp.gate.weight"] - base["model.layers.1.block_sparse_moe.gate.weight"]
    assert moved[1, "ffn.router"].delta == pytest.approx(np.linalg.norm(change), rel=1e-5)
    assert moved[None, "final_norm"].weight == pytest.approx(np.linalg.norm(base["model.norm.weight"]), rel=1e-5)


def test_merged_is_the_base_with_the_deltas(files: Callable[[str], Path], tmp_path: Path) -> None:
    before = tensors(files("base"))
    adapters.merge_into(files("base"), files("one"), tmp_path / "merged")
    after, changes = tensors(tmp_path / "merged"), deltas(files("one"))
    assert before.keys() == after.keys()
    for name, x in after.items():
        np.testing.assert_allclose(x, before[name] + changes.get(name, 0), rtol=1e-6, atol=1e-6, err_msg=name)
    adapters.merge_into(files("base"), files("full"), tmp_path / "full")
    assert np.array_equal(
        tensors(tmp_path / "full")["model.norm.weight"], tensors(files("full"))["base_model.model.model.norm.weight"]
    )
    assert (tmp_path / "merged/tokenizer.json").is_file()
    with pytest.raises(FileExistsError):
        adapters.merge_into(files("base"), files("one"), tmp_path / "merged")


def test_scaled_does_as_much_more(files: Callable[[str], Path], tmp_path: Path) -> None:
    adapters.scale(files("one"), 0.25, tmp_path / "quarter")
    before, after = deltas(files("one")), deltas(tmp_path / "quarter")
    for name, x in before.items():
        np.testing.assert_allclose(after[name], 0.25 * x, rtol=1e-12)
    file = "adapter_model.safetensors"
    assert (tmp_path / "quarter" / file).read_bytes() == (files("one") / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("scale", "one", "0", "OUT"), "FACTOR 0.0 is not a positive number"),
        (("scale", "full", "2", "OUT"), "which have no scale; merge the adapter instead"),
        (("scale", "base", "2", "OUT"), "adapter_config.json is missing"),
        (("merge", "base", "base", "OUT"), "has no adapter: looked for adapter_config.json (PEFT), lora.safetensors"),
        (("merge", "base", "other", "OUT"), "does not hold the model that its config describes"),
        (("diff", "moved"), "names nowhere/base as its base model, which does not exist here; state its path with --base"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: tuple[str, ...], message: str, files: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    settings = json.loads((files("one") / "adapter_config.json").read_text())
    for name, change in (("other", {}), ("moved", {"base_model_name_or_path": "nowhere/base"})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        found = safetensors.numpy.load_file(files("one") / "adapter_model.safetensors")
        if name == "other":  # of a narrower model
            found = {n: np.ascontiguousarray(x[:, :8]) if "lora_A" in n else x for n, x in found.items()}
        safetensors.numpy.save_file(found, folder / "adapter_model.safetensors")
    paths = {"OUT": tmp_path / "out", **{name: tmp_path / name for name in ("other", "moved")}}
    paths |= {name: files(name) for name in ("one", "full", "base")}
    with pytest.raises(SystemExit) as stopped:
        main.main(["adapters", arguments[0], *(str(paths.get(a, a)) for a in arguments[1:])])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1
    assert sorted(x.name for x in tmp_path.iterdir()) == ["moved", "other"]


def test_the_command_shows_tables_or_json(files: Callable[[str], Path], capsys: Any) -> None:
    for options in ((), ("--json",)):
        with pytest.raises(SystemExit) as stopped:
            main.main(["adapters", "diff", str(files("one")), *options])
        assert not stopped.value.code
        said = capsys.readouterr().out
        if options:
            answer = json.loads(said)
            assert len(answer["moved"]) == 2 * (1 + 3 * 4) + 1 and np.shape(answer["experts"]) == (2, 4)
        else:
            assert "ffn.gate_proj" in said and "relative change of each expert" in said
