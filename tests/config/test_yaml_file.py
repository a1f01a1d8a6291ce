"""YAML and overrides -> Config: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config import Config
from moe_train.config.strict_yaml import ConfigError
from moe_train.config.yaml_file import dump, load

RUN = """\
name: tiny
run_dir: runs/tiny
model:
  family: mixtral
  vocab_size: 128
  model_dim: 16
  num_layers: 2
  attention: {num_heads: 4, num_kv_heads: 2, head_dim: 4, windows: [8]}
  ffn: {name: moe, ffn_dim: 32, num_experts: 4, experts_per_token: 2}
data:
  tokenizer: {name: huggingface, path: tokenizer}
  train:
    - {name: files, files: [a.jsonl], record: {name: text}}
    - name: files
      files: [b.jsonl]
      record: {name: chat}
      weight: 3
train:
  steps: 10
  batch_size: 8
  seq_len: 32
optimizer:
  name: adamw
  learning_rate: 1e-4
loss: {load_balance_loss_coef: 0.01, router_z_loss_coef: 0}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def faults(path: Path, *overrides: str, text: str | None = None) -> list[str]:
    """The lines of the error, without the file's folder."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value).replace(str(path), path.name).split("\n")


def edited(old: str, new: str) -> str:
    assert RUN.count(old) == 1
    return RUN.replace(old, new)


def test_core_scalars_and_types(run: Path) -> None:
    config = load(run)
    assert config.optimizer.learning_rate == 1e-4
    assert config.model is not None and config.model.attention.windows == (8,)
    assert config.data is not None and config.data.train[1].weight == 3.0
    run.write_text(edited("steps: 10", "tokens: 1e9").replace("name: tiny", "name: no"))
    config = load(run)
    assert (config.train.tokens, config.name) == (10**9, "no")


def test_one_fault(run: Path) -> None:
    assert faults(run, text=edited("seq_len: 32", 'seq_len: "32"')) == [
        'run.yaml:21: train.seq_len: has to be a whole number (value "32")'
    ]


def test_every_fault_has_its_line(run: Path) -> None:
    text = edited("steps: 10", "steps: 0").replace("weight: 3", "weigth: 3").replace("name: adamw", "name: adam")
    assert faults(run, text=text) == [
        "run.yaml:17: data.train.1.weigth: unknown key; did you mean weight? (value 3)",
        "run.yaml:19: train.steps: has to be greater than or equal to 1 (value 0)",
        'run.yaml:23: optimizer.name: one of adamw, adafactor, muon, lion (value "adam")',
    ]


def test_missing_key_is_named_where_its_section_is(run: Path) -> None:
    assert faults(run, text=edited("  batch_size: 8\n", "")) == ["run.yaml:18: train.batch_size: required, and missing"]
    assert faults(run, text=edited("  name: adamw\n", "")) == [
        "run.yaml:22: optimizer.name: required, and missing; one of adafactor, adamw, lion, muon"
    ]
    assert faults(run, text=edited(", record: {name: text}", "")) == [
        "run.yaml:13: data.train.0.record: required, and missing; a section whose name is one of chat, completion, text"
    ]


def test_a_check_across_keys_blames_a_stated_key(run: Path) -> None:
    (line,) = faults(run, "mesh.expert=3", "train.batch_size=6")
    assert line.startswith("override mesh.expert=3: mesh.expert: mesh.expert 3 does not divide num_experts 4")
    (line,) = faults(run, text=edited("num_heads: 4", "num_heads: 3"))
    assert line.startswith("run.yaml:8: model.attention.num_heads: num_heads 3 is not a multiple")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("name: adamw", "name: adamw\n  lr: 3", "here it is optimizer.learning_rate"),
        ("name: adamw", "name: lion\n  eps: 3", "lion has none; it belongs to adamw and muon"),
        ("steps: 10", "steps: 10\n  micro_batch_size: 2", "here it is train.batch_size (the sequences of a whole optimizer step"),
        ("steps: 10", "steps: 10\n  learning_rat: 2", "did you mean optimizer.learning_rate?"),
        ("steps: 10", "steps: 10\n  qqqq: 2", "train has "),
        ("run_dir:", "base_model: mistralai/Mixtral\nrun_dir:", "here it is init_from"),
        ("run_dir:", "learning_rate: 1\nrun_dir:", "did you mean optimizer.learning_rate?"),
        ("run_dir:", "lora_r: 16\nrun_dir:", "here it is lora.targets.0.rank"),
        ("run_dir:", "ici_expert_parallelism: 8\nrun_dir:", "here it is mesh.expert"),
        ("run_dir:", "sample_packing: true\nrun_dir:", "leave it out: sequences are always packed"),
        ("data:\n", "data:\n  packing: {name: best_fit}\n", "leave it out: sequences are always packed"),
        ("run_dir:", "optimiser: {}\nrun_dir:", "did you mean optimizer?"),
        ("model_dim: 16", "model_dim: 16\n  num_experts: 8", "did you mean model.ffn.num_experts?"),
        ("model_dim: 16", "model_dim: 16\n  num_experts_per_tok: 8", "here it is model.ffn.experts_per_token"),
    ],
)
def test_an_unknown_key_names_ours(run: Path, old: str, new: str, said: str) -> None:
    lines = faults(run, text=edited(old, new))
    assert [line for line in lines if f"unknown key; {said}" in line], lines


def test_overrides(run: Path) -> None:
    config = load(
        run,
        "optimizer.learning_rate=3e-4 data.train.0.weight=2 evaluation.every_steps=7 init_from=null run_dir=a=b "
        'optimizer.schedule={"name":"wsd","decay_steps":3} optimizer.schedule.warmup_steps=2 seed=1 seed=2'.split(),
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.data is not None and config.data.train[0].weight == 2
    assert (config.evaluation.every_steps, config.init_from, config.run_dir, config.seed) == (7, None, "a=b", 2)
    assert config.optimizer.schedule.model_dump() == {
        "name": "wsd",
        "warmup_steps": 2,
        "decay_steps": 3,
        "final_fraction": 0.0,
    }


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "an override is key.path=value, such as optimizer.learning_rate=1e-4"),
        ("train..steps=3", "an override is key.path=value, such as optimizer.learning_rate=1e-4"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean steps? (value 3)"),
        ("train.steps=many", 'train.steps: has to be a whole number (value "many")'),
        ("train.steps=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.train.2.weight=1", "data.train: a list of 2 items, counted from 0 (value 2)"),
        ("data.train.x.weight=1", "data.train: a list of 2 items, counted from 0 (value x)"),
        ("name.first=1", 'name: not a section, so it has no first (value "tiny")'),
        ("name=123", "name: has to be a string; quote it (value 123)"),
        ("optimizer.learning_rate=.inf", 'a number has to be finite (value ".inf")'),
    ],
)
def test_a_bad_override_is_quoted(run: Path, override: str, said: str) -> None:
    assert faults(run, override) == [f"override {override}: {said}"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: a config is sections of `key: value` (value null)"),
        ("- a\n", ':1: a config is sections of `key: value` (value ["a"])'),
        ("name: a\nname: b\n", ":2: name: stated twice; first in line 1"),
        ("train:\n  steps: 1\n  steps: 1\n", ":3: train.steps: stated twice; first in line 2"),
        ("1: a\n", ":1: a key is a name (value 1)"),
        ("? [a]\n: b\n", ":1: a key is a name (value a list or section)"),
        ("a: &x 1\nb: *x\n", ":1: not valid YAML: anchors and aliases are not read; write the value out"),
        ("b: *x\n", ":1: not valid YAML: anchors and aliases are not read; write the value out"),
        ("a: 1\nb: !!python/name:os.system x\n", ":2: b: tags (tag:yaml.org,2002:python/name:os.system) are not read"),
        ("a: {b: !include other.yaml}\n", ":1: a.b: tags (!include) are not read"),
        ("a: .nan\n", ':1: a: a number has to be finite (value ".nan")'),
        ("a: 1e999\n", ':1: a: a number has to be finite (value "1e999")'),
        ("a: " + "9" * 5000, ":1: a: too large a number"),
        ("a: [1\nb: 2\n", ":2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n---\nb: 1\n", ":2: not valid YAML: but found another document"),
        ("a:\n\t- 1\n", ":2: not valid YAML: found character '\\t' that cannot start any token"),
        ("a: \x00\n", ":1: not valid YAML: "),
        ("[" * 20_000, ":1: not valid YAML: "),
    ],
)
def test_yaml_that_is_refused(run: Path, text: str, said: str) -> None:
    (line,) = faults(run, text=text)
    assert line.startswith(f"run.yaml{said}")


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such config file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder, not a config file"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 9\)"):
        load(tmp_path / "latin.yaml")


words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(
    [
        "no",
        "on",
        "1e-4",
        "1_000",
        "null",
        "~",
        "0x1f",
        "0o7",
        "1:30",
        "2026-11-21",
        "=",
        "<<",
        "- a",
        "a: b",
        "# a",
        " a ",
        ".inf",
        "+1",
    ]
)
positive_floats = st.floats(min_value=0, exclude_min=True, max_value=1e300)


@settings(max_examples=60, deadline=None)
@given(run_dir=words, path=words, files=st.lists(words, min_size=1), rate=positive_floats, eps=positive_floats)
def test_dump_loads_back(
    tmp_path_factory: pytest.TempPathFactory, run_dir: str, path: str, files: list[str], rate: float, eps: float
) -> None:
    tree = yaml.safe_load(RUN)
    tree["run_dir"], tree["data"]["tokenizer"]["path"], tree["data"]["train"][0]["files"] = run_dir, path, files
    tree["optimizer"] |= {"learning_rate": rate, "eps": eps}
    config = Config.model_validate_json(json.dumps(tree))
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config
    assert yaml.safe_load(dump(config))["run_dir"] == run_dir  # a reader of YAML 1.1 sees the same


def test_dump_states_every_default(run: Path) -> None:
    stated = yaml.safe_load(dump(load(run)))
    assert stated["optimizer"]["eps"] == 1e-8
    assert stated["checkpoint"]["every_minutes"] == 30.0
    assert list(stated) == list(Config.model_fields)
