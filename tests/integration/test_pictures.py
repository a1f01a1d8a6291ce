"""Runs on records with pictures: through a vision wrapper and a tekken tokenizer, from files to a model that saw them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from moe_train import config
from moe_train.commands.adapters import merge_into
from moe_train.commands.chat import Chat
from moe_train.commands.compare_adapters import diff
from moe_train.commands.evaluate import evaluate_model
from moe_train.commands.export import ExportOptions, export
from moe_train.commands.generate import GenerationRequest, Sampling, generate
from moe_train.commands.prompt_file import read_prompt_file
from moe_train.commands.show import rows_of_run
from moe_train.commands.show_page import page
from moe_train.commands.text_generator import ChatSettings
from moe_train.commands.train import train
from moe_train.commands.verify import verify
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.media_batch import media_batch
from moe_train.data.check.check import check_data
from moe_train.data.check.settings import CheckSettings
from moe_train.data.check.sources import CheckedSource
from moe_train.data.records.media_parts import PICTURES
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.run import loop
from moe_train.run.inputs import open_inputs
from moe_train.run.resolve import resolve
from moe_train.train.objectives.choose import objective_of, objective_of_run
from tests.commands.wrapper import TEXT, TOWER, save_wrapper
from tests.data.hugging_face import small_tekken
from tests.random_parameters import random_parameters
from tests.run_dir import lines
from tests.tiny import ONE

IMAGE = {"image_patch_size": 2, "max_image_size": 8, "spatial_merge_size": 2}
MODEL = TEXT.model_copy(update={"vocab_size": 1280})
COLOURS = {"red": (250, 10, 10), "blue": (10, 10, 250)}


def save_picture(file: Path, colour: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(-10, 10, (4 + seed % 3, 7, 3)) + COLOURS[colour]
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file)


def save_records(folder: Path, count: int = 8) -> Path:
    """Records that ask for the colour of a picture, in three spellings."""
    (folder / "pictures").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for i in range(count):
        name = list(COLOURS)[i % 2]
        file = f"pictures/{i}.png"
        save_picture(folder / file, name, i)
        answer = {"role": "assistant", "content": name}
        parts: list[dict[str, Any]] = [{"type": "text", "text": "Colour?"}, {"type": "image", "image": file}]
        if i % 3 == 1:
            parts[1] = {"type": "image_url", "image_url": {"url": file}}
        if i % 3 < 2:
            records.append({"messages": [{"role": "user", "content": parts}, answer]})
        else:
            records.append({"messages": [{"role": "user", "content": "Colour?<image>"}, answer], "images": [file]})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def written(folder: Path, **changes: Any) -> config.Config:
    """A config for a run on the wrapper and the records in `folder`."""
    record = config.ChatRecord(name="chat")
    source = config.FileSource(name="files", files=(str(folder / "data" / "records.jsonl"),), record=record)
    tokenizer = config.MistralTokenizer(name="mistral", path=str(folder / "tekken.json"))
    sections: dict[str, Any] = {
        "name": "run",
        "run_dir": str(folder / "run"),
        "init_from": str(folder / "base"),
        "vision": config.Vision(patches_per_row=32),
        "data": config.Data(tokenizer=tokenizer, train=(source,), cache_dir=str(folder / "cache")),
        "mesh": config.Mesh(data=2, context=2, tensor=2),
        "train": config.Train(steps=100, batch_size=4, microbatches=2, seq_len=32),
        "optimizer": config.AdamW(name="adamw", learning_rate=2e-2),
        "loss": config.Loss(),
    }
    return config.Config(**sections | changes)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wrapper, a tokenizer and records."""
    folder = tmp_path_factory.mktemp("pictures")
    with jax.set_mesh(ONE):
        save_wrapper(folder / "base", random_parameters(MODEL), model=MODEL)
    small_tekken(folder, "v7", vocab=280, image=IMAGE)
    shutil.copyfile(folder / "tekken.json", folder / "base" / "tekken.json")
    save_records(folder / "data")
    return folder


@pytest.fixture(scope="module")
def trained(ready: Path) -> Path:
    assert train(written(ready)) == loop.FINISHED
    return ready / "run"


def test_a_run_learns_what_is_in_pictures(trained: Path) -> None:
    losses = [line["cross_entropy"] for line in lines(trained) if "cross_entropy" in line]
    # An answer has at most five tokens, of which the first could only be guessed without the picture: ln(2) / 5 on average.
    assert losses[-1] < 0.5 * np.log(2) / 5


def test_a_trained_model_answers_about_pictures_that_it_has_not_seen(trained: Path, tmp_path: Path) -> None:
    names = ["blue", "red", "red"]
    prompts = []
    for i, name in enumerate(names):
        save_picture(tmp_path / f"{i}.png", name, 100 + i)
        content = [{"type": "text", "text": "Colour?"}, {"type": "image", "image": f"{i}.png"}]
        prompts.append({"messages": [{"role": "user", "content": content}]})
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    request = GenerationRequest(read_prompt_file(file), Sampling(8), chat=ChatSettings())
    assert [answer.text for answer in generate(trained, request)] == names
    for record, name in zip(prompts, names, strict=True):
        record["messages"].append({"role": "assistant", "content": name})
    file.write_text("".join(json.dumps(record) + "\n" for record in prompts))
    assert evaluate_model(trained, [file])["loss"] < 0.1


def test_exports_carry_the_tower_as_it_was(trained: Path, ready: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "hf", options=ExportOptions(depth="tensors"))
    before = safetensors.numpy.load_file(ready / "base" / "model.safetensors")
    after = tensors_of(tmp_path / "hf")
    assert all(np.array_equal(before[name], after[name].astype(np.float32)) for name in TOWER)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model's files."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def failed(folder: Path, **options: Any) -> dict[str, str]:
    return {check.name: check.summary for check in verify(folder, **options)[1] if check.passed is False}


SHORT = config.Train(steps=2, batch_size=8, seq_len=32)
PLAIN = config.Mesh(data=8)
"""The mesh whose program compiles fastest."""
TENSORS = ExportOptions(depth="tensors")


@pytest.mark.slow
def test_a_trained_projector_and_tower_are_saved_resumed_and_exported(ready: Path, tmp_path: Path) -> None:
    vision = config.Vision(patches_per_row=32, train=("vision.projector.*", "vision.tower.layers.ffn.*"))
    first = written(ready, run_dir=str(tmp_path / "run"), train=SHORT, vision=vision, mesh=PLAIN)
    assert train(first) == loop.FINISHED
    before = tensors_of(ready / "base")
    export(tmp_path / "run", tmp_path / "hf", options=TENSORS)
    after = tensors_of(tmp_path / "hf")
    moved = {name for name in TOWER if not np.array_equal(before[name], after[name])}
    assert moved == {name for name in TOWER if "projector" in name or "feed_forward" in name}
    for origin in ({"run": tmp_path / "run"}, {"base": ready / "base"}):
        assert not failed(tmp_path / "hf", depth="tensors", **origin)
    # Mistral's own layout and back is exact.
    export(tmp_path / "run", tmp_path / "native", "mistral", options=TENSORS)
    assert not failed(tmp_path / "native", run=tmp_path / "run", depth="tensors")
    export(tmp_path / "native", tmp_path / "again", options=TENSORS)
    assert all(np.array_equal(after[name], x) for name, x in tensors_of(tmp_path / "again").items())
    # A further run on the first has its tower, which it carries when it is frozen again.
    second = written(ready, run_dir=str(tmp_path / "second"), init_from=str(tmp_path / "run"), train=SHORT, mesh=PLAIN)
    assert train(second) == loop.FINISHED
    export(tmp_path / "second", tmp_path / "of_second", options=TENSORS)
    assert all(np.array_equal(after[name], tensors_of(tmp_path / "of_second")[name]) for name in TOWER)
    # The run goes on from its own tower; a damaged file of the export is found.
    longer = first.model_copy(update={"train": SHORT.model_copy(update={"steps": 3})})
    assert train(longer) == loop.FINISHED
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    after["multi_modal_projector.linear_1.weight"][0, 0] += 1
    safetensors.numpy.save_file(after, file, {"format": "pt"})
    assert "tensors" in failed(tmp_path / "hf", run=tmp_path / "run", depth="tensors")


@pytest.mark.slow
def test_adapters_of_the_tower_are_trained_resumed_merged_and_exported(ready: Path, tmp_path: Path) -> None:
    lora = config.Lora(
        targets=(config.LoraTarget(modules=("attention.*", "vision.tower.*_proj"), rank=2, alpha=4.0),),
        train=("vision.projector.*",),
        dropout=0.1,
    )
    written_run = written(ready, run_dir=str(tmp_path / "run"), train=SHORT, lora=lora)
    assert train(written_run) == loop.FINISHED
    longer = written_run.model_copy(update={"train": SHORT.model_copy(update={"steps": 3})})
    assert train(longer) == loop.FINISHED
    for name, layout in (("hf", "hf"), ("native", "mistral")):
        export(tmp_path / "run", tmp_path / name, layout, merge=True)  # type: ignore[arg-type]
        assert not failed(tmp_path / name, run=tmp_path / "run", depth="tensors")
        assert not failed(tmp_path / name, base=ready / "base", depth="tensors")
    before, after = tensors_of(ready / "base"), tensors_of(tmp_path / "hf")
    same = {name for name in TOWER if np.array_equal(before[name], after[name])}
    assert same == {name for name in TOWER if "vision_tower" in name and not name.endswith(("proj.weight", "conv.weight"))}
    record = export(tmp_path / "run", tmp_path / "adapter", "peft")
    assert {check["name"]: check["passed"] for check in record["checks"]}["names"]
    assert not failed(tmp_path / "adapter", run=tmp_path / "run") and not failed(tmp_path / "adapter", base=ready / "base")
    # PEFT's files and the run itself are merged as the export of the run is.
    for name, adapter in (("of_run", tmp_path / "run"), ("of_peft", tmp_path / "adapter")):
        merged = merge_into(ready / "base", adapter, tmp_path / name)
        assert not [check for check in merged["checks"] if check["passed"] is False]
        assert all(np.array_equal(after[key], x) for key, x in tensors_of(tmp_path / name).items())
    assert not failed(tmp_path / "of_run", base=ready / "base", adapter=tmp_path / "adapter", depth="tensors")
    modules = {change.module for change in diff(tmp_path / "adapter", ready / "base").changes}
    assert {"vision.tower.patch_proj", "vision.projector.in_proj", "attention.q_proj"} <= modules
    export(tmp_path / "run", tmp_path / "gguf", "gguf", merge=True, options=TENSORS)
    with pytest.raises(ValueError, match="--format peft"):
        export(tmp_path / "run", tmp_path / "lora", "mistral-lora")
    # An adapter goes on in another run.
    more = written(ready, run_dir=str(tmp_path / "more"), train=SHORT, lora=config.Lora(init_from=str(tmp_path / "run")))
    assert train(more) == loop.FINISHED


def test_patterns_of_the_tower_have_to_have_an_effect(ready: Path) -> None:
    targets = (config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),)
    with pytest.raises(ValueError, match=r"pattern 'projector.\*' names no module.*vision.projector"):
        written(ready, vision=config.Vision(train=("projector.*",)))
    with pytest.raises(ValueError, match=r"vision.train has no effect with a section lora"):
        written(ready, vision=config.Vision(train=("vision.projector.*",)), lora=config.Lora(targets=targets))
    with pytest.raises(ValueError, match=r"no section vision.*add vision: \{\}"):
        written(ready, vision=None, lora=config.Lora(targets=targets, train=("vision.projector.*",)))
    with pytest.raises(ValueError, match=r"'vision.projektor' names no module; there are vision.projector.in_proj"):
        resolve(written(ready, vision=config.Vision(train=("vision.projektor",))), 8)


def test_a_chat_sees_the_picture_that_it_is_shown(trained: Path, tmp_path: Path) -> None:
    chat = Chat(trained, Sampling(8), ChatSettings())
    with pytest.raises(ValueError, match=r"there is no picture .*0\.png"):
        chat.attach(PICTURES, str(tmp_path / "0.png"))
    for i, name in enumerate(("blue", "red")):
        save_picture(tmp_path / f"{i}.png", name, 100 + i)
        chat.attach(PICTURES, str(tmp_path / f"{i}.png"))
        assert "".join(chat.answer("Colour?")) == name
        assert not chat.media
        chat.reset()


@pytest.mark.slow
def test_a_run_with_pictures_continues_and_notices_another_tower(trained: Path, ready: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    longer = written(ready, run_dir=str(copy), train=config.Train(steps=102, batch_size=4, microbatches=2, seq_len=32))
    assert train(longer) == loop.FINISHED and lines(copy)[-1]["step"] == 102
    base = tmp_path / "base"
    shutil.copytree(ready / "base", base)
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    tensors["vision_tower.ln_pre.weight"] *= 2
    safetensors.numpy.save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"the tower and projector in .* have changed"):
        train(longer.model_copy(update={"init_from": str(base)}))


def loader_of(run: config.Run, ready: Path, rows: BatchRows) -> Loader:
    assert run.pictures is not None
    batch_type = media_batch(run.pictures.encoder, run.pictures.patches_per_row)
    return Loader(run.training_data(), "train", Mistral(ready / "tekken.json"), rows, seed=0, batch_type=batch_type)


def test_batches_do_not_depend_on_the_number_of_processes(ready: Path) -> None:
    run = resolve(written(ready), 8)
    parts = [loader_of(run, ready, BatchRows(4, 64, process, 2)).batch(1) for process in range(2)]
    whole = loader_of(run, ready, BatchRows(4, 64)).batch(1)
    for array, *halves in zip(whole, *parts, strict=True):
        assert np.array_equal(array, np.concatenate(halves))
    assert ((whole.feature_index >= 0) == (whole.tokens == 10)).all()
    assert not (whole.loss_mask & np.isin(whole.targets, (10, 12, 13))).any()
    assert (whole.ids > 0).sum() == 4 * (whole.tokens == 10).sum()
    assert whole.ids.max() > 1  # several pictures in a row


def test_batches_have_the_smallest_room_that_fits_on_all_processes(ready: Path) -> None:
    """Rows of 8 or 16 patches: the room of a step is that of its fullest row, whichever process has it."""
    run = resolve(written(ready, vision=config.Vision(patches_per_row=32, buckets=4), mesh=PLAIN, train=SHORT), 8)
    assert run.rooms == (4, 8, 16, 32)
    batch_type = objective_of_run(run).batch_type

    def batches(process: int, count: int) -> list[Any]:
        rows = BatchRows(2, 24, process, count)
        loader = Loader(run.training_data(), "train", Mistral(ready / "tekken.json"), rows, seed=0, batch_type=batch_type)
        return [loader.batch(step) for step in range(24)]

    whole, parts = batches(0, 1), [batches(process, 2) for process in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        fullest = int((batch.ids > 0).sum(axis=1).max())
        assert batch.units.shape[1] == next(room for room in run.rooms if room >= fullest)
        assert all(np.array_equal(array, np.concatenate(both)) for array, *both in zip(batch, *halves, strict=True))
    assert len({batch.units.shape[1] for batch in whole}) > 1
    context = config.Mesh(data=1, context=4, tensor=2)
    assert resolve(written(ready, vision=config.Vision(patches_per_row=48, buckets=4), mesh=context), 8).rooms == (16, 32, 48)


@pytest.mark.slow
def test_losses_do_not_depend_on_the_room(ready: Path, tmp_path: Path) -> None:
    runs = {}
    for buckets in (1, 4):
        vision = config.Vision(patches_per_row=32, buckets=buckets)
        train_section = config.Train(steps=4, batch_size=8, seq_len=32)
        lora = config.Lora(targets=(config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),))
        run_dir = tmp_path / str(buckets)
        made = written(ready, run_dir=str(run_dir), vision=vision, mesh=PLAIN, train=train_section, lora=lora)
        assert train(made) == loop.FINISHED
        runs[buckets] = [line["cross_entropy"] for line in lines(run_dir) if "cross_entropy" in line]
    assert len(runs[1]) == 4 and np.allclose(runs[1], runs[4], rtol=1e-4)


def test_rows_have_no_more_patches_than_room(ready: Path) -> None:
    """Pictures of 8 and 16 patches in room for 16: only two small ones share a row, however short their texts are."""
    run = resolve(written(ready, vision=config.Vision(patches_per_row=16)), 8)
    loader = loader_of(run, ready, BatchRows(2, 64))
    batches = [loader.batch(step) for step in range(loader.steps())]
    assert max((batch.ids > 0).sum(axis=1).max() for batch in batches) == 16
    assert max(batch.ids.max() for batch in batches) == 2
    for segment in loader.trace(0, 0):
        assert segment.length == loader.sources[0].store.lengths()[segment.example]
    assert run.pictures is not None
    narrow = run.model_copy(update={"vision": run.pictures.model_copy(update={"patches_per_row": 4})})
    with pytest.raises(ValueError, match=r"records.jsonl:\d+: the pictures of the record have 16 patches.*room for 4"):
        loader_of(narrow, ready, BatchRows(4, 32))


def test_what_training_would_get_wrong_is_refused(ready: Path, tmp_path: Path) -> None:
    run = resolve(written(ready), 8)
    data = run.training_data()
    with pytest.raises(ValueError, match=r"records with pictures; set vision: \{\}"):
        Loader(data, "train", Mistral(ready / "tekken.json"), BatchRows(4, 32), seed=0)
    cut = data.train[0].model_copy(update={"record": config.ChatRecord(name="chat", too_long="truncate")})
    with pytest.raises(ValueError, match="too_long truncate would cut it"):
        loader_of(run.model_copy(update={"data": data.model_copy(update={"train": (cut,)})}), ready, BatchRows(4, 32))
    with pytest.raises(ValueError, match="vision needs init_from"):
        written(ready, init_from=None, model=MODEL)
    objective = objective_of(run.objective, run.pictures)
    (tmp_path / "blind.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    blind = data.train[0].model_copy(update={"files": (str(tmp_path / "blind.jsonl"),)})
    with pytest.raises(ValueError, match="vision has no effect, since no record"):
        open_inputs(run.model_copy(update={"data": data.model_copy(update={"train": (blind,)})}), objective)
    for name in ("data", "cache"):
        shutil.copytree(ready / name, tmp_path / name)
    own = written(tmp_path, init_from=str(ready / "base")).data
    assert own is not None
    changed = run.model_copy(update={"data": config.RunData(**dict(own) | {"tokenizer": data.tokenizer})})
    loader_of(changed, ready, BatchRows(4, 32))
    save_picture(tmp_path / "data" / "pictures" / "3.png", "red", 7)
    with pytest.raises(ValueError, match=r"3.png is another one than when records with the same content"):
        loader_of(changed, ready, BatchRows(4, 32))


def test_a_check_names_every_picture_that_cannot_be_used(tmp_path: Path) -> None:
    file = save_records(tmp_path / "data")
    (tmp_path / "data" / "pictures" / "2.png").write_bytes(b"no picture")
    (tmp_path / "data" / "pictures" / "4.png").unlink()
    tokenizer = Mistral(small_tekken(tmp_path, "v7", vocab=280, image=IMAGE))
    result = check_data([CheckedSource((str(file),))], tokenizer, CheckSettings(seq_len=32))
    problems = {problem["where"]: problem["message"] for problem in result["problems"] if problem["rule"] == "picture"}
    assert problems.keys() == {f"{file}:3", f"{file}:5"}
    assert "is no picture" in problems[f"{file}:3"] and "there is no picture" in problems[f"{file}:5"]
    # 7 pixels are two tokens wide; 4 of height are one row of them, 5 and 6 are two.
    assert result["pictures"] == {"pictures": 6, "tokens": 27, "median_tokens": 3, "most_tokens": 6}


def test_a_page_shows_pictures_beside_their_tokens(ready: Path) -> None:
    tokenizer = Mistral(ready / "tekken.json")
    rows = rows_of_run(written(ready), 2, tokenizer)
    shown = page(rows, tokenizer, "rows", positions=False)
    assert shown.count("<img") == int((rows.batch.tokens == 13).sum()) > 0 and "[IMG_END]" in shown
