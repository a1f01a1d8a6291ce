"""Tokens per second of generation, ours and transformers' `generate` with its cache, in turn, with the ratio pair by pair.

    python tests/benchmarks/generation.py [--workload S | --model DIR] [--batches 1 8 32] [--pairs 3] [--cores 0]

Each turn is a process of its own that takes prompts of 64 tokens and generates 128 more, greedily, several times, and reports
its fastest time for each batch. Of transformers' implementations of experts, the fastest for each batch counts. A workload has
random weights; DIR is a model in Hugging Face's format. Ratios above 1 are in our favour. Needs the extra `judges`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PROMPT_TOKENS = 64
NEW_TOKENS = 128
REPEATS = 3
EXPERTS = ("eager", "grouped_mm")


def fastest(run: Callable[[], object]) -> float:
    """Return tokens per second and sequence of the fastest of some runs, after one that compiles or warms up."""
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return NEW_TOKENS / min(seconds[1:])


def prompts(vocab_size: int, batch: int) -> list[list[int]]:
    """Return random prompts."""
    return np.random.default_rng(0).integers(3, vocab_size, (batch, PROMPT_TOKENS)).tolist()


def ours(arguments: argparse.Namespace) -> dict[int, float]:
    """Measure our generation."""
    import jax

    from moe_train.checkpoint.model_dir import open_model
    from moe_train.config import Mesh, yaml_file
    from moe_train.evaluate.generation.generator import Generator
    from moe_train.evaluate.generation.sampling import Sampling
    from moe_train.machine.compile_cache import use_compile_cache
    from moe_train.machine.mesh import make_mesh
    from moe_train.model.parameters import combine
    from moe_train.model.transformer import init_model

    use_compile_cache()
    if arguments.model is None:
        model = yaml_file.load_config(HERE / f"workload_{arguments.workload}.yaml").model
        assert model is not None
        mesh = make_mesh(Mesh(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            transformer = jax.jit(lambda: init_model(0, model))()
    else:
        opened = open_model(arguments.model)
        model, mesh = opened.model, opened.mesh
        with jax.set_mesh(mesh):
            transformer = combine(*opened.load())
    with jax.set_mesh(mesh):
        generator = Generator(transformer, model, mesh, release=True)
        return {
            batch: batch * fastest(lambda b=batch: generator.generate(prompts(model.vocab_size, b), Sampling(NEW_TOKENS)))
            for batch in arguments.batches
        }


def theirs(arguments: argparse.Namespace) -> dict[int, float]:
    """Measure transformers' generation with the implementation of experts that is named, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

    from moe_train.config import yaml_file

    torch.manual_seed(0)
    model: Any
    if arguments.model is None:
        m: Any = yaml_file.load_config(HERE / f"workload_{arguments.workload}.yaml").model
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=m.vocab_size,
                hidden_size=m.model_dim,
                intermediate_size=m.ffn.ffn_dim,
                num_hidden_layers=m.num_layers,
                num_attention_heads=m.attention.num_heads,
                num_key_value_heads=m.attention.num_kv_heads,
                head_dim=m.attention.head_dim,
                num_local_experts=m.ffn.num_experts,
                num_experts_per_tok=m.ffn.experts_per_token,
                max_position_embeddings=512,
                sliding_window=None,
                attn_implementation="sdpa",
            )
        )
        model.set_experts_implementation(arguments.experts)
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(batch: int) -> None:
        tokens = torch.tensor(prompts(model.config.vocab_size, batch))
        with torch.no_grad():
            y = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True
            )
        assert y.shape[1] == PROMPT_TOKENS + NEW_TOKENS

    return {batch: batch * fastest(lambda b=batch: generate(b)) for batch in arguments.batches}


def measure(side: str, experts: str, cores: str) -> dict[str, float]:
    """Run one turn in a process of its own."""
    threads = str(len(cores.split(",")))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--experts", experts]
    done = subprocess.run(["taskset", "-c", cores, *command], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments: argparse.Namespace) -> None:
    """Take turns, and print the tokens per second and the median of the ratios for each batch."""
    implementations = EXPERTS if arguments.model is None else ("eager",)
    ratios: dict[int, list[float]] = {batch: [] for batch in arguments.batches}
    for _ in range(arguments.pairs):
        own = measure("ours", "eager", arguments.cores)
        peers = [measure("theirs", experts, arguments.cores) for experts in implementations]
        for batch in arguments.batches:
            peer = max(result[str(batch)] for result in peers)
            ratios[batch].append(own[str(batch)] / peer)
            print(f"batch {batch}: {own[str(batch)]:,.1f} : {peer:,.1f} tokens/s, {ratios[batch][-1]:.2f}", flush=True)
    print(json.dumps({"median ratio": {batch: round(statistics.median(values), 2) for batch, values in ratios.items()}}))


def main() -> None:
    """Read the arguments, and measure one side or compare both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", default="S")
    parser.add_argument("--model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cores", default="0")
    parser.add_argument("--side", choices=("ours", "theirs"))
    parser.add_argument("--experts", default="eager")
    arguments = parser.parse_args()
    match arguments.side:
        case "ours":
            print(json.dumps(ours(arguments)))
        case "theirs":
            print(json.dumps(theirs(arguments)))
        case _:
            compare(arguments)


if __name__ == "__main__":
    main()
