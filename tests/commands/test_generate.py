"""Text from a model directory."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.generate import generate_text
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.evaluate.generate import GenerationOptions, generate_tokens
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model


def test_a_model_directory_completes_text_and_answers_a_user(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 290, tmp_path / "tokenizer")
    with jax.set_mesh(ONE):
        structure, weights = random_model(MIXTRAL)
        write_and_prove.export_model(
            weights, MIXTRAL, tmp_path / "model", write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(tokenizer))
        )
        ids = [tokenizer.bos_id, *tokenizer.encode("the quick")]
        (new,) = generate_tokens(structure, weights, MIXTRAL, ONE, [ids], GenerationOptions(6, end_ids=(tokenizer.eos_id,)))
    (completion, other) = generate_text(tmp_path / "model", ["the quick", "a dog"], 6)
    assert completion == tokenizer.decode(ids + new)[len("the quick") :]
    (answer,) = generate_text(tmp_path / "model", ["the quick"], 6, chat=True)
    assert answer != completion and other != completion
    with pytest.raises(ValueError, match="the prompt has half a surrogate pair"):  # a byte that is no UTF-8, from a shell
        generate_text(tmp_path / "model", ["\udcff"], 6)
    effort = "{{ 'think ' if reasoning_effort == 'high' }}{{ messages[0].content }}"
    chat = {"chat": True, "chat_template": effort}
    assert generate_text(tmp_path / "model", ["the quick"], 6, **chat, reasoning_effort="high") == generate_text(
        tmp_path / "model", ["think the quick"], 6, **chat
    )
    for options, said in (({}, "has no effect on text to continue"), ({"chat": True}, "does not read it; leave it out")):
        with pytest.raises(ValueError, match=f"--reasoning-effort.* {said}"):
            generate_text(tmp_path / "model", ["the quick"], 6, **options, reasoning_effort="high")
