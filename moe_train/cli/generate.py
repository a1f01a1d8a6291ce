"""The commands that generate: generate and chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_train.cli.arguments import MODELS, AsJson, ChatTemplate, ModelDir, Step, help_examples
from moe_train.cli.terminal import print_json, progress_line

if TYPE_CHECKING:
    from moe_train.commands.chat import Chat
    from moe_train.commands.generate import GeneratedText, GenerationRequest, Sampling
    from moe_train.commands.text_generator import ChatSettings

generate_commands = typer.Typer()

MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate for each prompt.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Draw from the k most likely tokens only.")]
TopP = Annotated[float, typer.Option(help="Draw from the fewest tokens whose probabilities sum to this.")]
MinP = Annotated[float, typer.Option(help="Draw from tokens at least this fraction as likely as the most likely one.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Divide positive logits of tokens that occur already by this, and multiply negative ones.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Random seed of sampling.")]
System = Annotated[str | None, typer.Option(help="System message to put before each conversation.")]
Tools = Annotated[Path | None, typer.Option(help="JSON file with a list of tools that the model is told of.")]
ReasoningEffort = Annotated[str | None, typer.Option(metavar="EFFORT", help="How long the model may think, such as none or high.")]


@generate_commands.command(
    "generate",
    rich_help_panel=MODELS,
    epilog=help_examples(
        'moe-train generate runs/quickstart/pretrain --prompt "The list type"',
        'moe-train generate runs/quickstart/export_hf --chat --prompt "What does json.dumps do?" --temperature 0.7 --seed 1',
        "moe-train generate runs/quickstart/lora --chat --prompt-file questions.jsonl --n 4 --temperature 1 --out out.jsonl",
    ),
)
def generate_command(
    directory: ModelDir,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to continue; may be repeated.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File of records with messages (and tools), or with prompt, such as JSON lines.")
    ] = None,
    max_tokens: MaxTokens = 64,
    count: Annotated[int, typer.Option("--n", min=1, help="Number of continuations of each prompt.")] = 1,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends a continuation; may be repeated.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat each prompt as a user message, rendered by the chat template.")
    ] = False,
    chat_template: ChatTemplate = None,
    system: System = None,
    tools: Tools = None,
    reasoning_effort: ReasoningEffort = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", help="File with a JSON schema that every continuation fits (extra `schema`).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New file for the continuations as JSON lines, which are not printed then.")
    ] = None,
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts with a run or a model.

    JSON has the tokens of each continuation, their log-probabilities, and why it stopped.
    """
    from moe_train.commands.at_step import at_step
    from moe_train.commands.generate import GenerationRequest, Sampling
    from moe_train.commands.prompt_file import read_prompt_file, read_schema_file
    from moe_train.machine.compile_cache import use_compile_cache
    from moe_train.machine.files import write_text

    if bool(prompt) == (prompt_file is not None):
        raise typer.BadParameter("state --prompt TEXT, once or more, or --prompt-file FILE")
    settings = _chat_settings(chat_template, reasoning_effort, system, tools)
    if not chat:
        _check_text_options(settings, tools)
    if count > 1 and temperature == 0:
        raise typer.BadParameter(f"--n {count} at temperature 0 would give the same text {count} times; set --temperature")
    prompts: list[Any] = list(prompt or read_prompt_file(prompt_file or Path()))
    json_schema = None if schema is None else read_schema_file(schema)
    sampling = Sampling(max_tokens, (), temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = GenerationRequest(prompts, sampling, tuple(stop or ()), count, json_schema, settings if chat else None)
    if out is not None and out.exists():
        raise FileExistsError(f"--out {out} exists; name a new file, or remove it")
    directory = at_step(directory, step)
    use_compile_cache()
    if len(prompts) * count == 1 and sys.stdout.isatty() and not as_json and out is None:
        _print_stream(directory, request)
        return
    continuations = _generate(directory, request)
    results = [_result(request, generated) for generated in continuations]
    if out is not None:
        write_text(out, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))
    if as_json:
        print_json(results)
    elif out is None:
        _print_texts(request, continuations)


def _chat_settings(template: str | None, effort: str | None, system: str | None, tools: Path | None) -> ChatSettings:
    """Return how conversations are rendered."""
    from moe_train.commands.prompt_file import read_tools_file
    from moe_train.commands.text_generator import ChatSettings

    return ChatSettings(template, effort, system, () if tools is None else read_tools_file(tools))


def _check_text_options(settings: ChatSettings, tools: Path | None) -> None:
    """Raise ValueError for an option of conversations that is given without --chat."""
    options = {
        "--chat-template": settings.template,
        "--reasoning-effort": settings.reasoning_effort,
        "--system": settings.system,
        "--tools": tools,
    }
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} has no effect on text to continue; add --chat, or leave it out")


def _text_of(request: GenerationRequest, index: int) -> str | None:
    """Return the text of a prompt; None for a conversation."""
    prompt = request.prompts[index]
    return prompt if isinstance(prompt, str) else prompt.text


def _result(request: GenerationRequest, generated: GeneratedText) -> dict[str, Any]:
    """Return a continuation as a JSON object."""
    prompt = request.prompts[generated.prompt]
    result: dict[str, Any] = {}
    if isinstance(prompt, str):
        result["prompt"] = prompt
    else:
        result["location"] = prompt.location
        if prompt.id is not None:
            result["id"] = prompt.id
    result["completion"] = generated.text
    result["stop"] = generated.stop
    result["tokens"] = generated.tokens
    result["logprobs"] = [round(logprob, 6) for logprob in generated.logprobs]
    return result


def _print_texts(request: GenerationRequest, continuations: Sequence[GeneratedText]) -> None:
    """Print each prompt with its continuation."""
    # A text that is continued follows its prompt without a break, an answer is a turn of its own.
    separator = "" if request.chat is None else "\n"
    texts = []
    for generated in continuations:
        prompt = request.prompts[generated.prompt]
        heading = _text_of(request, generated.prompt)
        if heading is None and not isinstance(prompt, str):
            heading = prompt.location
        texts.append(f"{heading}{separator}{generated.text}")
    print("\n\n".join(texts))


def _generate(directory: Path, request: GenerationRequest) -> list[GeneratedText]:
    from moe_train.commands.generate import generate

    with progress_line("generating"):
        return generate(directory, request)


def _print_stream(directory: Path, request: GenerationRequest) -> None:
    """Print the continuation of a single prompt as it is generated."""
    from moe_train.commands.chat import BLOCK_TOKENS
    from moe_train.commands.generate import stream

    parts = stream(directory, request, BLOCK_TOKENS)
    print(_text_of(request, 0) or "", end="\n" if request.chat else "", flush=True)
    for part in parts:
        print(part.text, end="", flush=True)
    print()


@generate_commands.command(
    "chat",
    rich_help_panel=MODELS,
    epilog=help_examples(
        "moe-train chat runs/quickstart/export_hf",
        'moe-train chat runs/tuned@best --system "Answer briefly." --temperature 0.7',
    ),
)
def chat_command(
    directory: ModelDir,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each answer.")] = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    chat_template: ChatTemplate = None,
    system: System = None,
    tools: Tools = None,
    reasoning_effort: ReasoningEffort = None,
    step: Step = None,
) -> None:
    """Talk to a run or a model in the terminal, or through a pipe: a question per line.

    /image FILE shows a picture with the next question, /audio FILE plays sound with it, /reset begins a new conversation,
    /messages prints it as JSON, and /exit ends the command.
    """
    from moe_train.commands.at_step import at_step
    from moe_train.commands.generate import Sampling
    from moe_train.machine.compile_cache import use_compile_cache

    settings = _chat_settings(chat_template, reasoning_effort, system, tools)
    sampling = Sampling(max_tokens, (), temperature, top_k, top_p, min_p, repetition_penalty, seed)
    use_compile_cache()
    _converse(at_step(directory, step), sampling, settings)


_FILE_COMMANDS = ("/image", "/audio")
"""Commands that add a file to the next question."""


def _converse(directory: Path, sampling: Sampling, settings: ChatSettings) -> None:
    """Answer lines of the standard input until it ends, or until /exit."""
    from moe_train.commands.chat import Chat

    conversation = Chat(directory, sampling, settings)
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        match line.strip():
            case "/exit":
                return
            case "" if not line:  # the end of the input; an empty line has its newline
                return
            case "":
                continue
            case "/reset":
                conversation.reset()
            case "/messages":
                print_json(conversation.messages)
            case command if command.startswith("/") and command.split()[0] not in _FILE_COMMANDS:
                print(
                    f"moe-train: {command.split()[0]}: no such command; use /image FILE, /audio FILE, /reset, /messages or /exit",
                    file=sys.stderr,
                )
            case question:
                try:
                    _answer_line(conversation, question)
                except ValueError as error:
                    # The conversation stays as it was. Through a pipe nobody could correct the question.
                    if not is_terminal:
                        raise
                    print(f"moe-train: {error}", file=sys.stderr)


def _answer_line(conversation: Chat, line: str) -> None:
    """Attach the file that a line /image FILE or /audio FILE names, or print the answer to a question."""
    command = line.split()[0]
    if command in _FILE_COMMANDS:
        from moe_train.data.records.media_parts import PICTURES, SOUND

        file = line.removeprefix(command).strip()
        if not file:
            raise ValueError(f"{command} names no file; write {command} FILE")
        conversation.attach(PICTURES if command == "/image" else SOUND, file)
        return
    for piece in conversation.answer(line):
        print(piece, end="", flush=True)
    print(flush=True)
