"""The token that pads batches for transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.data.tokenizers.padding import padding_id

NAMES = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "<pad>"}


def tokenizer(control: dict[int, str], template: str | None = None) -> Any:
    return SimpleNamespace(
        files=(Path("tokenizer.json"),),
        bos_id=1,
        eos_id=2,
        end_ids=(2,),
        control_ids=frozenset(control),
        chat_template=template,
        decode=lambda ids, keep_special: control[ids[0]],
    )


def test_a_token_that_nothing_writes() -> None:
    assert padding_id(tokenizer(NAMES)) == 4
    assert padding_id(tokenizer(NAMES, "{{ '<pad>' }}")) == 0
    assert padding_id(tokenizer({1: "<s>", 9: "<SPECIAL_20>"} | {2: "</s>"})) == 9


def test_no_token_is_left() -> None:
    with pytest.raises(ValueError, match="has no token for padding, such as <pad> or <unk>"):
        padding_id(tokenizer({1: "<s>", 2: "</s>", 3: "[INST]"}))
