"""Tokens per CPU second of generation, ours and transformers' `generate` with its cache, in turn, and the ratio pair by pair.

    python tests/benchmarks/generation.py [--workload S | --model DIR] [--batches 1 8 32] [--pairs 3] [--cores 0]
    python tests/benchmarks/generation.py --model DIR --gguf FILE --llama-server BINARY [--batches 1 8] [--pairs 3] [--cores 0]

Each turn is a process of its own that takes prompts of 64 tokens and generates 128 more, greedily, several times, and reports
its fastest time for each batch: CPU seconds of the whole process, which other work on the machine moves less than the clock.
Of transformers' implementations of experts, the fastest for each batch counts. A workload has random weights; DIR is a model in
Hugging Face's format. Ratios above 1 are in our favour. Needs the extra `judges`.

With --llama-server the peer is llama.cpp instead: FILE is the same model as GGUF with float32 weights, whose caches are float32
too, and a batch is as many requests at once.
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
    """Return tokens per CPU second and sequence of the fastest of some runs, after one that compiles or warms up."""
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)
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


def llama_cpp(arguments: argparse.Namespace) -> dict[int, float]:
    """Measure llama.cpp's server, whose process has a slot for each request of a batch."""
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    from moe_train.checkpoint.model_dir import open_model

    vocab_size = open_model(arguments.model).model.vocab_size
    port = 20000 + os.getpid() % 10000
    rates = {}
    for batch in arguments.batches:
        size = batch * (PROMPT_TOKENS + NEW_TOKENS + 8)
        command = [arguments.llama_server, "-m", arguments.gguf, "--port", str(port), "-np", str(batch), "-c", str(size)]
        command += ["-t", str(len(os.sched_getaffinity(0))), "-ctk", "f32", "-ctv", "f32", "-fa", "off", "-dev", "none"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def post(prompt: list[int]) -> int:
            body = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/completion", json.dumps(body).encode())
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)["tokens_predicted"]

        try:
            _await_server(f"http://127.0.0.1:{port}/health")
            seconds = []
            with ThreadPoolExecutor(batch) as threads:
                for _ in range(1 + REPEATS):
                    begin = _cpu_seconds(server.pid)
                    assert list(threads.map(post, prompts(vocab_size, batch))) == [NEW_TOKENS] * batch
                    seconds.append(_cpu_seconds(server.pid) - begin)
            rates[batch] = batch * NEW_TOKENS / min(seconds[1:])
        finally:
            server.kill()
            server.wait()
    return rates


def _await_server(url: str) -> None:
    """Wait until a server answers."""
    import urllib.error
    import urllib.request

    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _cpu_seconds(process: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    peer_side = "theirs" if arguments.llama_server is None else "llama_cpp"
    ratios: dict[int, list[float]] = {batch: [] for batch in arguments.batches}
    for _ in range(arguments.pairs):
        own = measure("ours", "eager", arguments.cores)
        peers = [measure(peer_side, experts, arguments.cores) for experts in implementations]
        for batch in arguments.batches:
            peer = max(result[str(batch)] for result in peers)
            ratios[batch].append(own[str(batch)] / peer)
            print(f"batch {batch}: {own[str(batch)]:,.1f} : {peer:,.1f} tokens per CPU second, {ratios[batch][-1]:.2f}", flush=True)
    print(json.dumps({"median ratio": {batch: round(statistics.median(values), 2) for batch, values in ratios.items()}}))


def main() -> None:
    """Read the arguments, and measure one side or compare both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", default="S")
    parser.add_argument("--model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--cores", default="0")
    parser.add_argument("--gguf")
    parser.add_argument("--llama-server")
    parser.add_argument("--side", choices=("ours", "theirs", "llama_cpp"))
    parser.add_argument("--experts", default="eager")
    arguments = parser.parse_args()
    match arguments.side:
        case "ours":
            print(json.dumps(ours(arguments)))
        case "theirs":
            print(json.dumps(theirs(arguments)))
        case "llama_cpp":
            print(json.dumps(llama_cpp(arguments)))
        case _:
            compare(arguments)


if __name__ == "__main__":
    main()
