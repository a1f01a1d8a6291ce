"""Render invoices, train a small model to read them, and grade its JSON answers: python examples/invoices.py [FOLDER] [STEPS]

The model starts from random weights, tower included, so it learns to read from these pictures alone; a real run starts from a
released model (docs/guides/pictures.md). Needs the extra `vision`.
"""

import json
import random
import sys
from pathlib import Path

import mistral_common
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file, save_file

import moe_train
from moe_train.commands.evaluate_suite import Outputs, evaluate_suites
from moe_train.weights.wrappers.towers import native_settings, tower_tensors

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/invoices")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 250
folder.mkdir(parents=True, exist_ok=True)
draw = random.Random(0)
SIDE = 4  # pixels of a patch; 2 x 2 patches are one token
VISION = {"hidden_size": 48, "num_channels": 3, "image_size": 64, "max_image_size": 64, "patch_size": SIDE, "rope_theta": 1e4,
          "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "adapter_bias": False,
          "mm_projector_id": "patch_merge", "spatial_merge_size": 2, "add_pre_mm_projector_layer_norm": True, "image_token_id": 10,
          "image_break_token_id": 12, "image_end_token_id": 13}  # fmt: skip


def save_tokenizer(file: Path) -> None:
    """Write a tekken.json of a few hundred tokens, cut from one that mistral-common brings, for pictures of this size."""
    content = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    content["config"] |= {"version": "v7", "num_vocab_tokens": 280, "default_vocab_size": 1280}
    content["vocab"] = content["vocab"][:280]
    content["image"] = {"image_patch_size": SIDE, "max_image_size": 64, "spatial_merge_size": 2}
    file.write_text(json.dumps(content))


def save_invoice(file: Path) -> dict[str, str]:
    """Render an invoice with random fields as a PNG, and return the fields."""
    fields = {"number": f"{draw.randrange(1000)}".zfill(3), "total": f"{draw.randrange(100)}.{draw.randrange(10)}".zfill(4)}
    image = Image.new("RGB", (64, 32), "white")
    pen = ImageDraw.Draw(image)
    for row, text in enumerate((f"NO   {fields['number']}", f"SUM {fields['total']}")):
        for column, letter in enumerate(text):
            pen.text((8 * column + 1, 16 * row + 2), letter, "black", ImageFont.load_default_imagefont())
    image.save(file)
    return fields


def save_records(name: str, count: int) -> None:
    """Write records for training, and the same invoices as items of a suite."""
    (folder / name).mkdir(exist_ok=True)
    records, items = [], []
    for i in range(count):
        fields = save_invoice(folder / name / f"{i}.png")
        question = {"role": "user", "content": [{"type": "image", "image": f"{name}/{i}.png"}, {"type": "text", "text": "JSON"}]}
        records.append({"messages": [question, {"role": "assistant", "content": json.dumps(fields)}]})
        schema = {"type": "object", "required": list(fields), "properties": {key: {"type": "string"} for key in fields}}
        items.append({"messages": [question], "schema": schema, "answer": json.dumps(fields)})
    for suffix, lines in (("", records), ("_items", items)):
        (folder / f"{name}{suffix}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def save_base(text_model: Path, base: Path) -> None:
    """Add a random tower and projector to a text model in Mistral's own layout."""
    base.mkdir()
    params = json.loads((text_model / "params.json").read_text()) | {"vision_encoder": VISION}
    (base / "params.json").write_text(json.dumps(params))
    tensors = load_file(text_model / "consolidated.safetensors")
    settings = native_settings(params, params["dim"])
    assert settings is not None
    normal = np.random.default_rng(0).normal
    for tensor in tower_tensors(settings):
        assert tensor.native is not None
        scale = 1 / np.sqrt(np.prod(tensor.shape[1:]))
        values = normal(0, scale, tensor.shape) if len(tensor.shape) > 1 else np.ones(tensor.shape)
        tensors[tensor.native] = values.astype("float32")
    save_file(tensors, base / "consolidated.safetensors")
    (base / "tekken.json").write_bytes((folder / "tekken.json").read_bytes())


save_tokenizer(folder / "tekken.json")
for name, count in (("train", 1500), ("test", 50)):
    save_records(name, count)
# A random text model, exported after a single step on a licence, and a random tower around it.
text = moe_train.load_config("examples/invoices.yaml", [f"run_dir={folder}/text", f"data.tokenizer.path={folder}/tekken.json"])
moe_train.train_run(moe_train.resolve(text))
if not (folder / "base").exists():
    moe_train.export(folder / "text", folder / "text-model", "mistral")
    save_base(folder / "text-model", folder / "base")

changes = [
    f"run_dir={folder}/run",
    f"init_from={folder}/base",
    "model=null",
    "vision={}",
    f"data.train=[{{name: files, files: [{folder}/train.jsonl], record: {{name: chat, too_long: error}}}}]",
    f"data.tokenizer.path={folder}/tekken.json",
    f"data.cache_dir={folder}/cache",
    f"train.steps={steps}",
]
run = moe_train.load_config("examples/invoices.yaml", changes)
moe_train.train_run(moe_train.resolve(run))

suite = {"name": "invoices", "items": "test_items.jsonl", "grader": {"name": "json_schema"}, "generation": {"max_tokens": 60}}
(folder / "invoices.yaml").write_text(json.dumps(suite))
items_file = folder / "answers.jsonl"
items_file.unlink(missing_ok=True)
evaluate_suites(folder / "run", [folder / "invoices.yaml"], outputs=Outputs(items=items_file))
# An answer is right if it is JSON of the schema with all fields as on the invoice; fields are also counted one by one.
answers = [json.loads(line) for line in items_file.read_text().splitlines()]
right = {"number": 0, "total": 0}
for answer in answers:
    [given] = answer["answers"].values()
    expected = json.loads(answer["expected"][0])
    try:
        fields = json.loads(given["text"])
    except ValueError:
        continue
    for key in right:
        right[key] += isinstance(fields, dict) and fields.get(key) == expected[key]
whole = sum(next(iter(answer["answers"].values()))["score"] for answer in answers)
shares = ", ".join(f"{key} {count / len(answers):.2f}" for key, count in right.items())
print(f"invoices read {whole / len(answers):.2f}, {shares}")
