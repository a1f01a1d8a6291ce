"""Safetensors files: written as the library reads them, and damaged ones refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_train.weights import on_disk, safetensors_files
from moe_train.weights.safetensors_files import TensorSpec

ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "norm": np.ones(5, np.float32),
}


def write(directory: Path, max_shard_bytes: int = 10**9) -> list[Path]:
    directory.mkdir(exist_ok=True)
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    return safetensors_files.write_shards(directory, specs, lambda spec: ARRAYS[spec.name], max_shard_bytes)


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (100, 2), (1, 3)])
def test_the_library_reads_what_is_written(tmp_path: Path, limit: int, files: int) -> None:
    *shards, index = write(tmp_path, limit)
    assert len(shards) == files
    found = {}
    for shard in shards:
        assert (int.from_bytes(shard.read_bytes()[:8], "little") + 8) % 8 == 0
        found |= safetensors.numpy.load_file(shard)
        with safetensors.safe_open(shard, "numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert json.loads(index.read_text())["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    tensors = safetensors_files.open_model_tensors(tmp_path)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
        assert tensors[name].dtype == array.dtype and np.array_equal(tensors[name].read(), array)
    assert np.array_equal(tensors["a"].read((1, slice(1, 3))), ARRAYS["a"][1, 1:3])


@pytest.mark.parametrize("process", [0, 1])
def test_parts_of_a_tensor_are_written_one_after_the_other(process: int, tmp_path: Path) -> None:
    """Of two processes each writes one file, but both ask for every part in the same order."""
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in ARRAYS.items()]
    asked: list[str] = []

    def values(spec: TensorSpec) -> safetensors_files.TensorValues:
        def parts() -> Iterator[np.ndarray]:
            for row in ARRAYS[spec.name]:
                asked.append(spec.name)
                yield row

        return parts() if spec.name == "a" else ARRAYS[spec.name]

    share = safetensors_files.WriterShare(process, 2)
    *shards, _ = safetensors_files.write_shards(tmp_path, specs, values, max_shard_bytes=100, share=share)
    assert asked == ["a", "a"]
    own = safetensors.numpy.load_file(shards[process])
    assert np.array_equal(own["b" if process else "a"], ARRAYS["b" if process else "a"])


def test_hashes_see_a_change_of_one_value_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one")
    write(tmp_path / "shards", 1)
    before = on_disk.hash_tensors(safetensors_files.open_model_tensors(tmp_path / "one"))
    assert before == on_disk.hash_tensors(safetensors_files.open_model_tensors(tmp_path / "shards"))
    changed = ARRAYS["b"].copy()
    changed[1, 2] = 7
    monkeypatch.setitem(ARRAYS, "b", changed)
    write(tmp_path / "changed")
    after = on_disk.hash_tensors(safetensors_files.open_model_tensors(tmp_path / "changed"))
    assert {name for name in before if before[name] != after[name]} == {"b"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_a_truncated_file_is_refused_in_one_line(tmp_path: Path, data: st.DataObject) -> None:
    file, _ = write(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match=r"^[^\n]*model-00001-of-00001\.safetensors is truncated[^\n]*$"):
        safetensors_files.open_model_tensors(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_header_is_refused_in_one_line_or_still_true(tmp_path: Path, data: st.DataObject) -> None:
    file, _ = write(tmp_path)
    whole = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(whole)
    try:
        tensors = safetensors_files.open_model_tensors(tmp_path)
    except ValueError as error:
        assert "\n" not in str(error) and str(tmp_path) in str(error)
    else:  # a changed shape or dtype of the same size is seen by the table of names
        assert set(tensors) == set(ARRAYS)
        assert all(tensors[name].read().nbytes == ARRAYS[name].nbytes for name in ARRAYS)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "", "..", 3])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: object) -> None:
    write(tmp_path)
    (tmp_path / safetensors_files.INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="shards must be plain names"):
        safetensors_files.open_model_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / safetensors_files.INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*is not an index[^\n]*$"):
        safetensors_files.open_model_tensors(tmp_path)


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path: Path) -> None:
    *shards, index = write(tmp_path, 1)
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"disagree about more \(1 tensor"):
        safetensors_files.open_model_tensors(tmp_path)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name} is missing"):
        safetensors_files.open_model_tensors(tmp_path)


def test_a_directory_without_weights_and_a_quantised_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        safetensors_files.open_model_tensors(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"has shards of a model, but not their index model\.safetensors\.index\.json"):
        safetensors_files.open_model_tensors(tmp_path)
    safetensors.numpy.save_file({"w": np.ones((2, 2), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="w has dtype I8; supported"):
        safetensors_files.open_model_tensors(tmp_path)


def test_a_failed_write_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.safetensors'"):

        def full(spec: TensorSpec) -> np.ndarray:
            raise OSError(28, "No space left on device")

        safetensors_files.write_safetensors(tmp_path / "model.safetensors", [TensorSpec("a", (1,), np.dtype(np.float32))], full)


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "adapter_model.bin", "consolidated.00.pth"]
)
def test_a_pickle_is_refused_with_what_converts_it(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x80\x02")
    for open_files in (
        lambda: safetensors_files.open_model_tensors(tmp_path),
        lambda: safetensors_files.open_model_tensors(tmp_path, "consolidated"),
        lambda: safetensors_files.open_safetensors(tmp_path / "adapter_model.safetensors"),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(file)} is a pickle, a format that is not read.*convert it: .*save"):
            open_files()
