"""Make sound of digits, train a small model to write them down, and grade it: python examples/spoken_digits.py [FOLDER] [STEPS]

Each digit is a pattern of two tones that follow one another, of varying pitch, length and loudness, in noise. The model starts from
random weights, tower included, so it learns to hear from these clips alone; a real run starts from a released model
(docs/guides/sound.md).
"""

import json
import random
import sys
import wave
from pathlib import Path

import mistral_common
import numpy as np
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from safetensors.numpy import load_file, save_file

import moe_train
from moe_train.commands.evaluate_suite import evaluate_suites
from moe_train.weights.wrappers import whisper

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/spoken_digits")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 500
folder.mkdir(parents=True, exist_ok=True)
choose = random.Random(0)
noise = np.random.default_rng(0)
RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PITCHES = (400, 800, 1500, 3000)
# Every ordered pair of two pitches, of which each digit has its own.
TONES = [(first, second) for first in PITCHES for second in PITCHES if first != second]
# Chunks of 1.28 s: 128 frames of 16 bands, 64 positions of the tower, 16 tokens.
SOUND = {"sampling_rate": RATE, "frame_rate": 12.5, "chunk_length_s": 1.28,
         "audio_encoding_config": {"num_mel_bins": 16, "hop_length": 160, "window_size": 400}}  # fmt: skip
TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "num_mel_bins": 16,
         "max_source_positions": 64}  # fmt: skip


def save_tokenizer(file: Path) -> None:
    """Write a tekken.json of a few hundred tokens, cut from one that mistral-common brings, for sound of these chunks."""
    content = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    content["config"] |= {"version": "v7", "num_vocab_tokens": 280, "default_vocab_size": 1280}
    content["vocab"] = content["vocab"][:280]
    # Control tokens with the ids that they have in Voxtral.
    named = [*Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    unnamed = [f"<SPECIAL_{rank}>" for rank in range(len(named), 24)]
    for name in (*unnamed, "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]"):
        named.append({"rank": len(named), "token_str": name, "is_control": True})
    content |= {"special_tokens": named, "audio": SOUND}
    del content["image"]
    file.write_text(json.dumps(content))


def spoken(digit: int) -> np.ndarray:
    """Return the sound of a digit and a pause, from -1 to 1."""
    shift = choose.uniform(0.96, 1.04)
    loudness = choose.uniform(0.2, 0.7)
    parts = []
    for pitch in TONES[digit]:
        times = np.arange(int(choose.uniform(0.09, 0.12) * RATE)) / RATE
        parts.append(loudness * np.sin(2 * np.pi * pitch * shift * times) * np.hanning(len(times)) ** 0.25)
    return np.concatenate([*parts, np.zeros(int(choose.uniform(0.03, 0.09) * RATE))])


def save_clip(file: Path) -> str:
    """Save a clip of two to four digits, and return its words."""
    digits = [choose.randrange(10) for _ in range(choose.randint(2, 4))]
    samples = np.concatenate([np.zeros(int(choose.uniform(0, 0.08) * RATE)), *map(spoken, digits)])
    samples = np.clip(samples + noise.normal(0, 0.02, len(samples)), -1, 1)
    with wave.open(str(file), "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", "NONE"))
        writer.writeframes((samples * 32767).astype("<i2").tobytes())
    return " ".join(WORDS[digit] for digit in digits)


def save_records(name: str, count: int) -> None:
    """Write transcriptions for training, and the same clips as items of a suite."""
    (folder / name).mkdir(exist_ok=True)
    records, items = [], []
    for i in range(count):
        text = save_clip(folder / name / f"{i}.wav")
        records.append({"audio": f"{name}/{i}.wav", "text": text, "language": "en"})
        items.append({"audio": f"{name}/{i}.wav", "answer": text, "language": "en"})
    for suffix, lines in (("", records), ("_items", items)):
        (folder / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def save_base(text_model: Path, base: Path) -> None:
    """Add a random tower and projector to a text model in Hugging Face's layout."""
    base.mkdir()
    text = json.loads((text_model / "config.json").read_text())
    fields = {"architectures": ["VoxtralForConditionalGeneration"], "model_type": "voxtral", "text_config": text}
    fields |= {"audio_config": {"model_type": "voxtral_encoder", **TOWER}, "audio_token_id": 24}
    (base / "config.json").write_text(json.dumps(fields))
    [file] = text_model.glob("*.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    settings = whisper.settings_of(TOWER, text["hidden_size"])
    normal = np.random.default_rng(0).normal
    for tensor in whisper.tensors(settings):
        # Larger convolutions, so that the sound stands out beside the positions that are added to it.
        scale = (3 if "conv" in tensor.name else 1) / np.sqrt(np.prod(tensor.shape[1:]))
        values = normal(0, scale, tensor.shape) if len(tensor.shape) > 1 else np.full(tensor.shape, "norm.weight" in tensor.name)
        tensors[tensor.name] = values.astype("float32")
    tensors[whisper.POSITIONS] = whisper.Positions(settings).read()
    save_file(tensors, base / "model.safetensors")
    (base / "tekken.json").write_bytes((folder / "tekken.json").read_bytes())


save_tokenizer(folder / "tekken.json")
for name, count in (("train", 3000), ("test", 50)):
    save_records(name, count)
# A random text model, exported after a single step on a licence, and a random tower around it.
text = moe_train.load_config("examples/spoken_digits.yaml", [f"run_dir={folder}/text", f"data.tokenizer.path={folder}/tekken.json"])
moe_train.train_run(moe_train.resolve(text))
if not (folder / "base").exists():
    moe_train.export(folder / "text", folder / "text-model")
    save_base(folder / "text-model", folder / "base")

changes = [
    f"run_dir={folder}/run",
    f"init_from={folder}/base",
    "model=null",
    "audio={}",
    f"data.train=[{{name: files, files: [{folder}/train.jsonl], record: {{name: transcription, too_long: error}}}}]",
    f"data.tokenizer.path={folder}/tekken.json",
    f"data.cache_dir={folder}/cache",
    f"train.steps={steps}",
]
run = moe_train.load_config("examples/spoken_digits.yaml", changes)
moe_train.train_run(moe_train.resolve(run))

suite = {"name": "digits", "items": "test_items.jsonl", "grader": {"name": "word_error_rate"}, "generation": {"max_tokens": 40}}
(folder / "digits.yaml").write_text(json.dumps(suite))
[graded] = evaluate_suites(folder / "run", [folder / "digits.yaml"])["suites"]
print(f"word error rate {graded['word_error_rate']:.3f} on {graded['items']} clips")
