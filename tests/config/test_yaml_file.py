"""YAML and overrides to a Config and back: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config import Config
from moe_train.config.strict_yaml import ConfigError
from moe_train.config.yaml_file import dump, load_config
from tests.config.tiny import YAML, edited, faults


def test_core_scalars_and_types(run: Path) -> None:
    config = load_config(run)
    assert config.optimizer.learning_rate == 1e-4
    assert config.model is not None and config.model.attention.windows == (8,)
    assert config.data is not None and config.data.train[1].weight == 3.0
    run.write_text(edited("steps: 10", "tokens: 1e9").replace("name: tiny", "name: no"))
    config = load_config(run)
    assert (config.train.tokens, config.name) == (10**9, "no")


def test_overrides(run: Path) -> None:
    config = load_config(
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
        ("train.steps", "an override has the form key.path=value, such as optimizer.learning_rate=1e-4"),
        ("train..steps=3", "an override has the form key.path=value, such as optimizer.learning_rate=1e-4"),
        ("train.stepz=3", "train.stepz: unknown key; did you mean steps? (value 3)"),
        ("train.steps=many", 'train.steps: has to be a whole number (value "many")'),
        ("train.steps=[1", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.train.2.weight=1", "data.train: this list has 2 items, counted from 0 (value 2)"),
        ("data.train.x.weight=1", "data.train: this list has 2 items, counted from 0 (value x)"),
        ("name.first=1", 'name: this is not a section, so it has no key first (value "tiny")'),
        ("name=123", "name: has to be a string; quote it (value 123)"),
        ("optimizer.learning_rate=.inf", 'a number must be finite (value ".inf")'),
    ],
)
def test_a_bad_override_is_quoted(run: Path, override: str, said: str) -> None:
    assert faults(run, override) == [f"override {override}: {said}"]


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such config file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="is a folder, not a config file"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("name: run\n")
    with pytest.raises(FileNotFoundError, match=r"is a folder; state its config, .*/config\.yaml"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 9\)"):
        load_config(tmp_path / "latin.yaml")


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
    tree = yaml.safe_load(YAML)
    tree["run_dir"], tree["data"]["tokenizer"]["path"], tree["data"]["train"][0]["files"] = run_dir, path, files
    tree["optimizer"] |= {"learning_rate": rate, "eps": eps}
    config = Config.model_validate_json(json.dumps(tree))
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load_config(file) == config
    assert yaml.safe_load(dump(config))["run_dir"] == run_dir  # a reader of YAML 1.1 sees the same


def test_dump_states_every_default(run: Path) -> None:
    stated = yaml.safe_load(dump(load_config(run)))
    assert stated["optimizer"]["eps"] == 1e-8
    assert stated["checkpoint"]["every_minutes"] == 30.0
    assert list(stated) == list(Config.model_fields)
