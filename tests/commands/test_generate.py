"""Texts and answers of a model directory, through the functions and the objects of the commands that generate."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import pytest

from moe_train.commands import write_and_prove
from moe_train.commands.chat import Chat
from moe_train.commands.generate import GenerationRequest, generate, generate_text
from moe_train.commands.prompt_file import read_prompt_file
from moe_train.commands.text_generator import ChatSettings
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.records.media_parts import PICTURES, SOUND
from moe_train.data.tokenizers.tokenizer import Tokenizer
from moe_train.evaluate.generate import GenerationOptions, generate_tokens
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.weights import texts
from tests.evaluate.tiny_generator import MIXTRAL, ONE, random_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A tiny Mixtral with a tokenizer that has Mistral's chat format."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 20, 290, folder / "tokenizer")
    with jax.set_mesh(ONE):
        _, weights = random_model(MIXTRAL)
        options = write_and_prove.WriteOptions(dtype="float32", texts=texts.Texts(tokenizer))
        write_and_prove.export_model(weights, MIXTRAL, folder / "model", options)
    return folder / "model", tokenizer


def test_a_model_directory_completes_text_and_answers_a_user(model_dir: tuple[Path, Tokenizer]) -> None:
    model, tokenizer = model_dir
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode("the quick")]
    with jax.set_mesh(ONE):
        options = GenerationOptions(6, end_ids=(tokenizer.eos_id,))
        (new,) = generate_tokens(*random_model(MIXTRAL), MIXTRAL, ONE, [ids], options)
    (completion, other) = generate_text(model, ["the quick", "a dog"], 6)
    assert completion == tokenizer.decode(ids + new)[len("the quick") :]
    (answer,) = generate_text(model, ["the quick"], 6, chat=True)
    assert answer != completion and other != completion
    with pytest.raises(ValueError, match="the prompt has half a surrogate pair"):  # a byte that is no UTF-8, from a shell
        generate_text(model, ["\udcff"], 6)
    effort = "{{ 'think ' if reasoning_effort == 'high' }}{{ messages[0].content }}"
    chat = {"chat": True, "chat_template": effort}
    assert generate_text(model, ["the quick"], 6, **chat, reasoning_effort="high") == generate_text(
        model, ["think the quick"], 6, **chat
    )
    for options, said in (({}, "has no effect on text to continue"), ({"chat": True}, "does not read it; leave it out")):
        with pytest.raises(ValueError, match=f"--reasoning-effort.* {said}"):
            generate_text(model, ["the quick"], 6, **options, reasoning_effort="high")


def test_continuations_of_a_prompt_differ_and_errors_name_its_line(model_dir: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    model, _ = model_dir
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the quick"}\n{"messages": [{"role": "user", "content": "a dog"}]}\n')
    prompts = read_prompt_file(file)
    sampling = Sampling(6, temperature=1.0)
    generated = generate(model, GenerationRequest(prompts, sampling, samples=2, chat=ChatSettings(system="jump")))
    assert [one.prompt for one in generated] == [0, 0, 1, 1]
    assert generated[0].tokens != generated[1].tokens
    assert all(len(one.tokens) == len(one.logprobs) and max(one.logprobs) < 0 for one in generated)
    stop = generated[0].text[2:4]
    (stopped,) = generate(model, GenerationRequest(prompts[:1], sampling, (stop,), chat=ChatSettings(system="jump")))
    assert stopped.stop == "stop_text" and stopped.text == generated[0].text[: generated[0].text.index(stop)]
    for request, message in (
        (GenerationRequest(prompts, sampling), "prompts.jsonl:2: a conversation is answered in a chat format; add --chat"),
        (
            GenerationRequest(prompts, Sampling(255), chat=ChatSettings()),
            "prompts.jsonl:1: the prompt has .* tokens; with 255 new ones it exceeds the model's max_seq_len 256",
        ),
        (
            GenerationRequest(prompts, sampling, chat=ChatSettings("{{ messages[-1].content }}", system="jump")),
            "prompts.jsonl:1: the chat template leaves the system message out; write its text into the first user message",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, request)


def test_a_chat_remembers_its_turns_until_it_is_reset(model_dir: tuple[Path, Tokenizer]) -> None:
    model, _ = model_dir
    chat = Chat(model, Sampling(20), ChatSettings())
    first = "".join(chat.answer("the quick"))
    assert generate_text(model, ["the quick"], 20, chat=True) == [first]
    second = "".join(chat.answer("the quick"))
    assert [message["content"] for message in chat.messages] == ["the quick", first, "the quick", second]
    with pytest.raises(ValueError, match=re.escape("begin a new one with /reset, or lower --max-tokens")):
        list(chat.answer("dog " * 200))
    assert len(chat.messages) == 4
    chat.reset()
    assert "".join(chat.answer("the quick")) == first
    with pytest.raises(ValueError, match="has no vision tower that can be computed, so it sees no pictures"):
        chat.attach(PICTURES, "picture.png")
    with pytest.raises(ValueError, match="has no audio tower that can be computed, so it hears no sound"):
        chat.attach(SOUND, "clip.wav")
    with pytest.raises(ValueError, match="leaves the system message out"):
        Chat(model, Sampling(2), ChatSettings("{{ messages[-1].content }}", system="jump"))
