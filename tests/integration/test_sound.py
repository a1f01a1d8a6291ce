"""Runs on records with sound: through an audio wrapper and a tekken tokenizer, from files to a model that heard them."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from moe_train import config
from moe_train.commands.adapters import merge_into
from moe_train.commands.chat import Chat
from moe_train.commands.evaluate import evaluate_model
from moe_train.commands.evaluate_suite import evaluate_suites
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
from moe_train.data.records.media_parts import PICTURES, SOUND
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.run import loop
from moe_train.run.resolve import resolve
from moe_train.train.state import partition
from tests.commands.audio_wrapper import AUDIO, MODEL, save_audio_wrapper, tone, wav
from tests.data.hugging_face import small_tekken
from tests.random_parameters import random_parameters
from tests.run_dir import lines
from tests.tiny import ONE

TONES = {"low": 300.0, "high": 3000.0}
"""Words that are spoken as tones."""


def save_clip(file: Path, word: str, seed: int) -> None:
    file.write_bytes(wav(tone(TONES[word], 0.2 + 0.07 * (seed % 4), seed)))


def save_records(folder: Path, count: int = 8) -> Path:
    """Records that ask what a clip says, in three spellings, and transcriptions."""
    (folder / "clips").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for i in range(count):
        word = list(TONES)[i % 2]
        file = f"clips/{i}.wav"
        save_clip(folder / file, word, i)
        answer = {"role": "assistant", "content": word}
        parts: list[dict[str, Any]] = [{"type": "audio", "audio": file}, {"type": "text", "text": "Which?"}]
        if i % 3 == 0:
            data = base64.b64encode((folder / file).read_bytes()).decode()
            parts[0] = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        if i % 3 < 2:
            records.append({"messages": [{"role": "user", "content": parts}, answer]})
        else:
            records.append({"messages": [{"role": "user", "content": "<audio>Which?"}, answer], "audios": [file]})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    spoken = [{"audio": f"clips/{i}.wav", "text": list(TONES)[i % 2], "language": "en"} for i in range(count)]
    (folder / "transcripts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in spoken))
    return path


def written(folder: Path, **changes: Any) -> config.Config:
    """A config for a run on the wrapper and the records in `folder`."""
    sources = (
        config.FileSource(name="files", files=(str(folder / "data" / "records.jsonl"),), record=config.ChatRecord(name="chat")),
        config.FileSource(
            name="files",
            files=(str(folder / "data" / "transcripts.jsonl"),),
            record=config.TranscriptionRecord(name="transcription"),
        ),
    )
    tokenizer = config.MistralTokenizer(name="mistral", path=str(folder / "tekken.json"))
    sections: dict[str, Any] = {
        "name": "run",
        "run_dir": str(folder / "run"),
        "init_from": str(folder / "base"),
        "audio": config.Audio(chunks_per_row=4),
        "data": config.Data(tokenizer=tokenizer, train=sources, cache_dir=str(folder / "cache")),
        "mesh": config.Mesh(data=2, context=2, tensor=2),
        "train": config.Train(steps=100, batch_size=4, seq_len=48),
        "optimizer": config.AdamW(name="adamw", learning_rate=2e-2),
        "loss": config.Loss(),
    }
    return config.Config(**sections | changes)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wrapper, a tokenizer and records."""
    folder = tmp_path_factory.mktemp("sound")
    with jax.set_mesh(ONE):
        save_audio_wrapper(folder / "base", random_parameters(MODEL))
    small_tekken(folder, "v7", vocab=280, audio=AUDIO)
    shutil.copyfile(folder / "tekken.json", folder / "base" / "tekken.json")
    save_records(folder / "data")
    return folder


@pytest.fixture(scope="module")
def trained(ready: Path) -> Path:
    assert train(written(ready)) == loop.FINISHED
    return ready / "run"


def test_a_run_learns_what_is_in_sound(trained: Path) -> None:
    losses = [line["cross_entropy"] for line in lines(trained) if "cross_entropy" in line]
    # An answer has at most five tokens, of which the first could only be guessed without the sound: ln(2) / 5 on average.
    assert losses[-1] < 0.5 * np.log(2) / 5


def test_a_trained_model_answers_about_sound_that_it_has_not_heard(trained: Path, tmp_path: Path) -> None:
    words = ["high", "low", "low", "high"]
    prompts: list[dict[str, Any]] = []
    for i, word in enumerate(words):
        save_clip(tmp_path / f"{i}.wav", word, 100 + i)
        content = [{"type": "audio", "audio": f"{i}.wav"}, {"type": "text", "text": "Which?"}]
        prompts.append({"messages": [{"role": "user", "content": content}]} if i < 2 else {"audio": f"{i}.wav", "language": "en"})
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    request = GenerationRequest(read_prompt_file(file), Sampling(8), chat=ChatSettings())
    assert [answer.text for answer in generate(trained, request)] == words
    held_out = tmp_path / "held_out.jsonl"
    records = [{"audio": f"{i}.wav", "text": word, "language": "en"} for i, word in enumerate(words)]
    held_out.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate_model(trained, [held_out])["loss"] < 0.1
    items = [{"audio": f"{i}.wav", "answer": word, "language": "en"} for i, word in enumerate(words[:3])]
    items.append({"audio": "3.wav", "answer": "low", "language": "en"})  # which it is not
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "suite.yaml").write_text("name: words\nitems: items.jsonl\ngrader: {name: word_error_rate}\n")
    (scored,) = evaluate_suites(trained, [tmp_path / "suite.yaml"])["suites"]
    assert scored["word_error_rate"] == 0.25 and scored["score"] == 0.75


def test_a_chat_hears_the_sound_that_it_is_given(trained: Path, tmp_path: Path) -> None:
    chat = Chat(trained, Sampling(8), ChatSettings())
    with pytest.raises(ValueError, match=r"there is no sound .*0\.wav"):
        chat.attach(SOUND, str(tmp_path / "0.wav"))
    with pytest.raises(ValueError, match="has no vision tower that can be computed, so it sees no pictures"):
        chat.attach(PICTURES, str(tmp_path / "0.wav"))
    for i, word in enumerate(("low", "high")):
        save_clip(tmp_path / f"{i}.wav", word, 100 + i)
        chat.attach(SOUND, str(tmp_path / f"{i}.wav"))
        assert "".join(chat.answer("Which?")) == word
        assert not chat.media
        chat.reset()


def test_exports_carry_the_tower_as_it_was(trained: Path, ready: Path, tmp_path: Path) -> None:
    record = export(trained, tmp_path / "hf")
    said = {check["name"]: check["said"] for check in record["checks"] if check["passed"]}
    assert "features of probe sound (4 tokens) are those of the tower of" in said["features"]
    before = safetensors.numpy.load_file(ready / "base" / "model.safetensors")
    after: dict[str, np.ndarray] = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        after |= safetensors.numpy.load_file(file)
    carried = [name for name in before if name.startswith(("audio_tower.", "multi_modal_projector."))]
    assert len(carried) == 24 and all(np.array_equal(before[name], after[name]) for name in carried)
    # Features are compared again with those of the record, and the files in Mistral's own layout have the same.
    export(tmp_path / "hf", tmp_path / "native", "mistral")
    for folder in ("hf", "native"):
        checks = {check.name: check.passed for check in verify(tmp_path / folder)[1]}
        assert checks["features"] and False not in checks.values()


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model's files."""
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def failed(folder: Path, **options: Any) -> dict[str, str]:
    return {check.name: check.summary for check in verify(folder, **options)[1] if check.passed is False}


SHORT = config.Train(steps=2, batch_size=8, seq_len=48)
PLAIN = config.Mesh(data=8)
"""The mesh whose program compiles fastest."""
TENSORS = ExportOptions(depth="tensors")


@pytest.mark.slow
def test_a_trained_tower_is_saved_resumed_and_exported(ready: Path, tmp_path: Path) -> None:
    audio = config.Audio(train=("audio.*",))
    first = written(ready, run_dir=str(tmp_path / "run"), train=SHORT, audio=audio, mesh=PLAIN)
    assert train(first) == loop.FINISHED
    before = tensors_of(ready / "base")
    export(tmp_path / "run", tmp_path / "hf", options=TENSORS)
    after = tensors_of(tmp_path / "hf")
    of_tower = {name for name in before if name.startswith(("audio_tower.", "multi_modal_projector."))}
    assert {name for name in of_tower if np.array_equal(before[name], after[name])} == {"audio_tower.embed_positions.weight"}
    for origin in ({"run": tmp_path / "run"}, {"base": ready / "base"}):
        assert not failed(tmp_path / "hf", depth="tensors", **origin)
    # Mistral's own layout and back is exact, though nothing in it is the base's: it has no positions.
    export(tmp_path / "run", tmp_path / "native", "mistral", options=TENSORS)
    assert not failed(tmp_path / "native", run=tmp_path / "run", depth="tensors")
    export(tmp_path / "native", tmp_path / "again", options=TENSORS)
    again = tensors_of(tmp_path / "again")
    assert all(np.array_equal(after[name], again[name]) for name in of_tower if "positions" not in name)
    # A further run on the first has its tower; the run goes on from its own.
    second = written(ready, run_dir=str(tmp_path / "second"), init_from=str(tmp_path / "run"), train=SHORT, mesh=PLAIN)
    assert train(second) == loop.FINISHED
    export(tmp_path / "second", tmp_path / "of_second", options=TENSORS)
    assert all(np.array_equal(after[name], tensors_of(tmp_path / "of_second")[name]) for name in of_tower)
    assert train(first.model_copy(update={"train": SHORT.model_copy(update={"steps": 3})})) == loop.FINISHED


@pytest.mark.slow
def test_adapters_of_the_tower_are_trained_resumed_merged_and_exported(ready: Path, tmp_path: Path) -> None:
    modules = ("attention.*", "audio.tower.layers.*_proj", "audio.tower.second_conv")
    lora = config.Lora(
        targets=(config.LoraTarget(modules=modules, rank=2, alpha=4.0),),
        train=("audio.projector.*", "audio.tower.*norm"),
        dropout=0.1,
    )
    written_run = written(ready, run_dir=str(tmp_path / "run"), train=SHORT, lora=lora)
    assert train(written_run) == loop.FINISHED
    assert train(written_run.model_copy(update={"train": SHORT.model_copy(update={"steps": 3})})) == loop.FINISHED
    for name, layout in (("hf", "hf"), ("native", "mistral")):
        export(tmp_path / "run", tmp_path / name, layout, merge=True, options=TENSORS)  # type: ignore[arg-type]
        assert not failed(tmp_path / name, run=tmp_path / "run", depth="tensors")
        assert not failed(tmp_path / name, base=ready / "base", depth="tensors")
    with pytest.raises(ValueError, match=r"audio.tower.second_conv has an adapter.*--merge"):
        export(tmp_path / "run", tmp_path / "adapter", "peft")
    # The adapter of a run is merged as an export of it is.
    record = merge_into(ready / "base", tmp_path / "run", tmp_path / "merged")
    assert not [check for check in record["checks"] if check["passed"] is False]
    exported, merged = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "merged")
    assert exported.keys() == merged.keys() and all(np.array_equal(exported[name], merged[name]) for name in merged)
    assert not failed(tmp_path / "merged", base=ready / "base", adapter=tmp_path / "run", depth="tensors")
    more = written(ready, run_dir=str(tmp_path / "more"), train=SHORT, lora=config.Lora(init_from=str(tmp_path / "run")))
    assert train(more) == loop.FINISHED


def test_patterns_of_the_tower_have_to_have_an_effect(ready: Path) -> None:
    targets = (config.LoraTarget(modules=("attention.*",), rank=2, alpha=4.0),)
    with pytest.raises(ValueError, match=r"audio.train: pattern 'vision.projector.\*' names no module.*audio.projector"):
        written(ready, audio=config.Audio(train=("vision.projector.*",)))
    with pytest.raises(ValueError, match=r"audio.train has no effect with a section lora"):
        written(ready, audio=config.Audio(train=("audio.projector.*",)), lora=config.Lora(targets=targets))
    with pytest.raises(ValueError, match=r"no section audio.*add audio: \{\}"):
        written(ready, audio=None, lora=config.Lora(targets=targets, train=("audio.projector.*",)))
    with pytest.raises(ValueError, match=r"no section vision.*add vision: \{\}"):
        written(ready, lora=config.Lora(targets=targets, train=("vision.projector.*",)))
    for wrong in ("audio.projektor", "audio.tower"):  # positions are never trained
        with pytest.raises(ValueError, match=rf"'{wrong}' names no module; there are audio.projector.in_proj"):
            resolve(written(ready, audio=config.Audio(train=(wrong,))), 8)
    run = resolve(written(ready, audio=config.Audio(train=("audio.*",))), 8)
    with jax.set_mesh(ONE):
        _, shapes = parameters(abstract_model(run.model, run.compute, None, run.encoder))
        _, frozen = partition(shapes, None, run.trained_tower)
    assert frozen.keys() == {"audio.tower.positions"}


def loader_of(run: config.Run, ready: Path, rows: BatchRows) -> Loader:
    assert isinstance(run.audio, config.RunAudio)
    batch_type = media_batch(run.audio.encoder, run.audio.chunks_per_row)
    return Loader(run.training_data(), "train", Mistral(ready / "tekken.json"), rows, seed=0, batch_type=batch_type)


def test_batches_do_not_depend_on_the_number_of_processes(ready: Path) -> None:
    run = resolve(written(ready), 8)
    parts = [loader_of(run, ready, BatchRows(4, 48, process, 2)).batch(1) for process in range(2)]
    whole = loader_of(run, ready, BatchRows(4, 48)).batch(1)
    for array, *halves in zip(whole, *parts, strict=True):
        assert np.array_equal(array, np.concatenate(halves))
    assert ((whole.feature_index >= 0) == (whole.tokens == 24)).all()
    assert not (whole.loss_mask & np.isin(whole.targets, (24, 25))).any()
    assert 4 * (whole.ids > 0).sum() == (whole.tokens == 24).sum()
    assert whole.ids.max() > 1  # several clips in a row


def test_what_training_would_get_wrong_is_refused(ready: Path) -> None:
    run = resolve(written(ready), 8)
    data = run.training_data()
    with pytest.raises(ValueError, match=r"records with sound; set audio: \{\}"):
        Loader(data, "train", Mistral(ready / "tekken.json"), BatchRows(4, 48), seed=0)
    cut = data.train[0].model_copy(update={"record": config.ChatRecord(name="chat", too_long="truncate")})
    with pytest.raises(ValueError, match="too_long truncate would cut it"):
        loader_of(run.model_copy(update={"data": data.model_copy(update={"train": (cut,)})}), ready, BatchRows(4, 48))
    with pytest.raises(ValueError, match="audio needs init_from"):
        written(ready, init_from=None, model=MODEL)
    with pytest.raises(ValueError, match="no model has both towers"):
        written(ready, vision=config.Vision())
    assert isinstance(run.audio, config.RunAudio)
    narrow = run.model_copy(update={"audio": run.audio.model_copy(update={"chunks_per_row": 1})})
    with pytest.raises(ValueError, match=r"jsonl:\d+: the sound of the record has 2 chunks, and a row has room for 1"):
        loader_of(narrow, ready, BatchRows(4, 48))


def test_a_check_names_all_sound_that_cannot_be_used(tmp_path: Path) -> None:
    file = save_records(tmp_path / "data")
    clips = tmp_path / "data" / "clips"
    (clips / "1.wav").write_bytes(wav(tone(300, 0.1), channels=2))
    (clips / "2.wav").write_bytes(wav(tone(300, 0.0)))
    (clips / "4.wav").unlink()
    (clips / "7.wav").write_bytes(wav(tone(300, 0.1), rate=7))
    tokenizer = Mistral(small_tekken(tmp_path, "v7", vocab=280, audio=AUDIO))
    result = check_data([CheckedSource((str(file),))], tokenizer, CheckSettings(seq_len=48))
    problems = {problem["where"]: problem["message"] for problem in result["problems"] if problem["rule"] == "sound"}
    reasons = {2: "2 channels", 3: "no samples", 5: "there is no sound", 8: "7 samples a second"}
    assert problems.keys() == {f"{file}:{line}" for line in reasons}
    assert all(reason in problems[f"{file}:{line}"] for line, reason in reasons.items())
    # Of 0.2 to 0.41 s, which are one or two chunks of four tokens each, and one that begins them.
    assert not [problem for problem in result["problems"] if problem["rule"] == "empty-user"]
    spoken = check_data([CheckedSource((str(tmp_path / "data" / "transcripts.jsonl"),))], tokenizer, CheckSettings(seq_len=48))
    # A clip alone is a question, so sound is all that is wrong.
    assert {problem["rule"] for problem in spoken["problems"]} == {"sound"}
    assert result["sound"] == {"clips": 4, "tokens": 28, "median_tokens": 9, "most_tokens": 9} and result["pictures"] is None


def test_a_page_plays_sound_beside_its_tokens(ready: Path) -> None:
    tokenizer = Mistral(ready / "tekken.json")
    rows = rows_of_run(written(ready), 2, tokenizer)
    shown = page(rows, tokenizer, "rows", positions=False)
    assert shown.count("<audio") == int((rows.batch.tokens == 25).sum()) > 0 and "[BEGIN_AUDIO]" in shown
