"""How many tokens an agent's conversation takes, as an example for each turn and as the examples that training makes of it.

    python -m tests.benchmarks.trajectories

The last column is what a single example would take, which up to v11 leaves out the end of a call as it is generated
(`moe_train.data.chat.mistral_trajectory`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from moe_train.data.chat.conversation_to_tokens import examples
from moe_train.data.tokenizers.mistral import Mistral
from tests.data.chat.trajectories import agent
from tests.data.hugging_face import DATA, FILES, TEKKEN, small_tekken


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = {"v3": DATA / FILES["v3"], "v7": DATA / FILES["v7"], "v3 (tekken)": TEKKEN}
        files["v13"] = small_tekken(Path(directory), "v13")
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


if __name__ == "__main__":
    main()
