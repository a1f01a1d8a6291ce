"""A small run as YAML and as the tree of its values, and what becomes of it when keys change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moe_train.config import Config
from moe_train.config.strict_yaml import ConfigError, parse_yaml
from moe_train.config.yaml_file import load_config

YAML = """\
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
    - {name: files, files: [a.jsonl], record: {name: text}, weight: 1}
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
TREE, _ = parse_yaml(YAML, "tiny.yaml")
SIGMOID = {"name": "sigmoid"}
DENSE = {"name": "dense", "ffn_dim": 32}


def edited(old: str, new: str) -> str:
    """The YAML with a text that it contains once replaced."""
    assert YAML.count(old) == 1
    return YAML.replace(old, new)


def faults(path: Path, *overrides: str, text: str | None = None) -> list[str]:
    """Load the file, with `text` as its content where given, and return the lines of the error, without the file's folder."""
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value).replace(str(path), path.name).split("\n")


def config_with(**changes: Any) -> Config:
    """The config with dotted keys set; a value of `...` removes the key."""
    tree = json.loads(json.dumps(TREE))
    for dotted, value in changes.items():
        *above, key = dotted.split(".")
        section = tree
        for part in above:
            section = section.setdefault(part, {})
        if value is ...:
            del section[key]
        else:
            section[key] = value
    return Config.model_validate_json(json.dumps(tree))


def refusal(**changes: Any) -> str:
    """The error of a config that must not be accepted."""
    with pytest.raises(ValidationError) as error:
        config_with(**changes)
    return str(error.value)
