"""How many tokens an agent's conversation takes, as an example for each turn and as the examples that training makes of it; and how
long a chat template takes to render all of its prefixes.

    python -m tests.benchmarks.trajectories

The last column of the first table is what a single example would take, which up to v11 leaves out the end of a call as it is
generated (`moe_train.data.chat.mistral_trajectory`).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.trajectories import agent
from tests.data.hugging_face import DATA, FILES, TEKKEN, V3, small_tekken, write


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        _print_tokens(Path(directory))
        _print_seconds(Path(directory))


def _print_tokens(directory: Path) -> None:
    files = {"v3": DATA / FILES["v3"], "v7": DATA / FILES["v7"], "v3 (tekken)": TEKKEN}
    files["v13"] = small_tekken(directory, "v13")
    print("| tokenizer | calls | an example for each turn | as trained on | as one example |")
    print("|---|---|---|---|---|")
    for version, file in files.items():
        tokenizer = Mistral(file)
        for num_calls in (5, 20, 40):
            made = examples(agent(num_calls), None, tokenizer)
            sizes = [len(example.tokens) for example in made]
            separate = sum(example.merged.separate_tokens for example in made if example.merged)
            merged = f"{sum(sizes):,} ({separate / sum(sizes):.2f}x fewer)"
            print(f"| {version} | {num_calls} | {separate:,} | {merged} | {max(sizes):,} ({separate / max(sizes):.2f}x) |")


def _print_seconds(directory: Path) -> None:
    write(directory, V3)
    hugging_face, mistral = HuggingFace(directory), Mistral(V3)
    examples(agent(1), hugging_face.chat_template, hugging_face)  # starts the process that renders
    print("\n| calls | chat template, s | mistral-common, s |\n|---|---|---|")
    for num_calls in (20, 40, 80, 160):
        start = time.perf_counter()
        examples(agent(num_calls), hugging_face.chat_template, hugging_face)
        rendered = time.perf_counter()
        examples(agent(num_calls), None, mistral)
        print(f"| {num_calls} | {rendered - start:.2f} | {time.perf_counter() - rendered:.2f} |")


if __name__ == "__main__":
    main()
