"""Every file of configs/ loads, says what it is for, and fits together: sizes, mesh, shapes; and it is what `plan` recommends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_train import config
from moe_train.commands.inspect import abstract_parameters, inspect
from moe_train.config.yaml_file import dump, load_config
from moe_train.evaluate.suites.load import SuiteOptions, load_suites
from moe_train.machine.mesh import mesh_sizes
from moe_train.plan.choice import model_choice
from moe_train.plan.search import model_all_choices, ranked
from moe_train.plan.topology import parse_topology

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# The published sizes of what the fine-tuning recipes start from: (model, parameters in all, of them active).
MIXTRAL = config.Model.model_validate_json(
    """{"family": "mixtral", "vocab_size": 32000, "model_dim": 4096, "num_layers": 32, "rope": {"name": "default", "theta": 1e6},
    "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128},
    "ffn": {"name": "moe", "ffn_dim": 14336, "num_experts": 8, "experts_per_token": 2}}"""
)
MISTRAL = config.Model.model_validate_json(
    """{"family": "mistral", "vocab_size": 32768, "model_dim": 4096, "num_layers": 32, "rope": {"name": "default", "theta": 1e6},
    "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}, "ffn": {"name": "dense", "ffn_dim": 14336}}"""
)
SMOLLM2 = config.Model.model_validate_json(
    """{"family": "mixtral", "vocab_size": 49152, "model_dim": 576, "num_layers": 30, "rope": {"name": "default", "theta": 1e5},
    "attention": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}, "tie_embeddings": true, "max_seq_len": 8192,
    "ffn": {"name": "moe", "ffn_dim": 1536, "num_experts": 4, "experts_per_token": 2}}"""
)
SMALL4 = config.Model.model_validate_json(
    """{"family": "mistral4", "vocab_size": 131072, "model_dim": 4096, "num_layers": 36, "norm_eps": 1e-6, "max_seq_len": 1048576,
    "rope": {"name": "yarn", "theta": 1e4, "factor": 128.0, "original_max_seq_len": 8192},
    "attention": {"name": "mla", "num_heads": 32, "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "query_scaling": {"beta": 0.1, "original_max_seq_len": 8192}},
    "ffn": {"name": "moe", "ffn_dim": 2048, "num_experts": 128, "experts_per_token": 4, "num_shared_experts": 1}}"""
)
MINISTRAL3 = config.Model.model_validate_json(
    """{"family": "ministral3", "vocab_size": 131072, "model_dim": 4096, "num_layers": 34, "max_seq_len": 262144,
    "rope": {"name": "yarn", "theta": 1e6, "factor": 16.0, "original_max_seq_len": 16384},
    "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "query_scaling": {"beta": 0.1, "original_max_seq_len": 16384}}, "ffn": {"name": "dense", "ffn_dim": 14336}}"""
)
MINISTRAL3_3B = config.Model.model_validate_json(
    """{"family": "ministral3", "vocab_size": 131072, "model_dim": 3072, "num_layers": 26, "max_seq_len": 262144,
    "rope": {"name": "yarn", "theta": 1e6, "factor": 16.0, "original_max_seq_len": 16384}, "tie_embeddings": true,
    "attention": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128,
        "query_scaling": {"beta": 0.1, "original_max_seq_len": 16384}}, "ffn": {"name": "dense", "ffn_dim": 9216}}"""
)
PIXTRAL = config.VisionEncoder(
    tower_dim=1024,
    ffn_dim=4096,
    num_layers=24,
    num_heads=16,
    patch_size=14,
    max_image_size=1540,
    merge_size=2,
    projector_norm=True,
)
"""The tower of Small 3.1 and of Ministral 3."""
PUBLISHED = {
    "mixtral_8x7b": (MIXTRAL, 46.70e9, 12.88e9),
    "mistral_7b": (MISTRAL, 7.248e9, 7.248e9),
    "mistral_small4": (SMALL4, 118.97e9, 6.63e9),
    "ministral3_8b": (MINISTRAL3, 8.49e9, 8.49e9),
    "ministral3_3b": (MINISTRAL3_3B, 3.43e9, 3.43e9),
}


def model_of(path: Path, run: config.Config) -> config.Model:
    if run.model is not None:
        return run.model
    if path.stem == "quickstart_lora":
        pretrained = load_config(path.with_name("quickstart_pretrain.yaml")).model
        assert pretrained is not None
        return pretrained
    if path.stem.startswith("smollm2_"):
        return SMOLLM2
    return PUBLISHED["_".join(path.stem.split("_")[:2])][0]


def vision_of(run: config.Config) -> config.Vision | None:
    """The section on pictures with the sizes that `init_from` would state."""
    return None if run.vision is None else run.vision.model_copy(update={"encoder": PIXTRAL})


ON_ACCELERATORS = [path for path in CONFIGS if not path.stem.startswith(("quickstart", "smollm2", "tool_dialogue"))]
MOST = 1.4
"""Largest ratio of a recipe's predicted step to that of `plan`'s best choice."""


def test_there_are_recipes() -> None:
    stems = {path.stem for path in CONFIGS}
    assert {"quickstart_pretrain", "quickstart_lora"} <= stems
    for size in ("mixtral_8x7b", "mistral_7b"):
        for kind in ("pretrain_v5p", "lora_h100x8", "lora_v5e", "full_finetune"):
            assert any(stem.startswith(f"{size}_{kind}") for stem in stems), (size, kind)
    assert {"mistral_small4_lora_h100x8", "mistral_small4_lora_v5p", "mistral_small4_qlora_h100x2"} <= stems
    assert {"ministral3_8b_lora_h100x8", "ministral3_3b_documents_lora_h100x1"} <= stems


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_says_what_it_is_for(path: Path) -> None:
    header = re.match(r"(?:#.*\n)+\n", path.read_text())
    assert header is not None
    for line in ("# Hardware: ", "# Time: ", "# Command: "):
        assert line in header[0]
    assert f"configs/{path.name}" in header[0] or "launch/quickstart.sh" in header[0]
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_fits_together(path: Path, tmp_path: Path) -> None:
    run = load_config(path)
    model = model_of(path, run)
    config.check_model(run, model)
    resolved = run.model_copy(update={"model": model, "mesh": mesh_sizes(run.mesh, 8), "vision": vision_of(run)})
    shapes = abstract_parameters(config.run_of(resolved))
    adapters = [name for name in shapes if ".lora_" in name]
    assert bool(adapters) == (run.lora is not None)
    for name, x in shapes.items():
        x.sharding.shard_shape(x.shape)  # raises where a dim does not divide over its axes
        wanted = "float32" if name in adapters else "uint8" if name.endswith(".codes") else run.compute.param_dtype
        assert str(x.dtype) == wanted, name
    (tmp_path / "resolved.yaml").write_text(dump(run))
    assert load_config(tmp_path / "resolved.yaml") == run


@pytest.mark.parametrize("stem", [path.stem for path in ON_ACCELERATORS])
def test_sizes_are_the_published_ones(stem: str) -> None:
    path = next(path for path in CONFIGS if path.stem == stem)
    run = load_config(path)
    model, total, active = PUBLISHED["_".join(stem.split("_")[:2])]
    loss = run.loss if run.lora is None else config.Loss(load_balance_loss_coef=0.0, router_z_loss_coef=0.0)
    report = inspect(
        run.model_copy(update={"model": model_of(path, run), "lora": None, "init_from": None, "loss": loss, "vision": None})
    )
    assert model_of(path, run) == model
    assert report.totals["total_parameters"] == pytest.approx(total, rel=1e-3)
    assert report.totals["active_parameters"] == pytest.approx(active, rel=1e-3)
    devices = 1
    for size in run.mesh.model_dump().values():
        devices *= size
    assert re.search(rf"\b{devices} (H100|chips)", path.read_text())


@pytest.mark.parametrize("path", ON_ACCELERATORS, ids=lambda path: path.stem)
def test_it_is_what_plan_recommends_or_says_why_not(path: Path) -> None:
    """By the model alone: nothing is compiled. `-s` prints the ratios."""
    header = path.read_text().split("\n\n")[0]
    slice_shape = re.search(r"TPU (\w+), .*topology ([\dx]+)", header)
    topology = parse_topology(f"{slice_shape[1]}:{slice_shape[2]}" if slice_shape else path.stem.split("_")[-1])
    written = load_config(path)
    mesh = mesh_sizes(written.mesh, topology.num_devices)
    run = config.run_of(written.model_copy(update={"model": model_of(path, written), "mesh": mesh, "vision": vision_of(written)}))
    choices, _ = model_all_choices(run, topology)
    recipe = model_choice(run, topology)
    best = ranked(choices)[0]
    ratio = recipe.time.step / best.time.step
    print(f"{path.stem} on {topology.name}: {recipe.time.step:.2f} s a step, {ratio:.2f} of plan's best choice")
    assert recipe.fits and ratio < MOST
    if "# Plan: recommends this mesh" in header:
        assert best.run.mesh == recipe.run.mesh
    if compiled := re.search(r"takes ([\d.]+) of [\d.]+ GiB", header):
        assert recipe.memory.total / 2**30 == pytest.approx(float(compiled[1]), rel=0.1), "memory in the header"
    # With pictures only the model of the plan is at hand.
    assert slice_shape or "according to the compiler" in header or "documents" in path.stem
    stated = re.search(r"# Plan: .* needs (\d+)% less time", header)
    if stated is None:
        assert ratio < 1.02, f"{path.name}: state `# Plan: CHOICE needs {1 - 1 / ratio:.0%} less time …` and why it was not taken"
    else:
        assert float(stated[1]) == pytest.approx(100 * (1 - 1 / ratio), abs=1)
    hours = 1e9 / (run.train.batch_size * run.train.seq_len) * recipe.time.step / 3600
    readme = (path.parents[1] / "README.md").read_text(encoding="utf-8")
    for row in re.findall(rf"^\| .*`{path.stem}`.* \| ([\d.]+) \|$", readme, re.M):
        assert float(row) == pytest.approx(hours, abs=0.06), "hours for a billion tokens in README.md"


SUITES = Path(__file__).parents[2] / "configs/suites"


def test_suites_read_local_data(tmp_path: Path) -> None:
    """The suites of GSM8K and MMLU read files in the form that these sets are published in."""
    (tmp_path / "gsm8k").mkdir()
    lines = "".join(f'{{"question": "1 + {i}?", "answer": "1 + {i} = {i + 1}\\n#### {i + 1}"}}\n' for i in range(6))
    for split in ("train", "test"):
        (tmp_path / f"gsm8k/{split}.jsonl").write_text(lines)
        folder = tmp_path / "mmlu" / split.replace("train", "dev")
        folder.mkdir(parents=True)
        rows = "".join(f"How much is {i}?,4,{i},5,6,1\n" for i in range(10, 15))
        head = "question,choice0,choice1,choice2,choice3,answer\n"
        (folder / f"high_school_maths_{folder.name}.csv").write_text(head + rows)
    gsm8k, mmlu = load_suites([SUITES], SuiteOptions(data=tmp_path))
    assert gsm8k.grade is not None and gsm8k.grade(gsm8k.items[2], "1 + 2 = 3\n#### 3") == 1
    assert mmlu.items[0].answers == ("10",) and mmlu.items[0].category == "high school maths" and len(mmlu.examples) == 5


def test_the_suites_on_forgetting() -> None:
    suites = {loaded.suite.name: loaded for loaded in load_suites([SUITES / "forgetting"])}
    assert {name: len(loaded.items) >= 8 for name, loaded in suites.items()} == dict.fromkeys(
        ("formats", "general", "refusals"), True
    )
    for item in suites["formats"].items:  # each item's own answer has its form
        grade = suites["formats"].grade
        assert grade is not None and grade(item, item.answers[0]) == 1
