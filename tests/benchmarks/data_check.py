"""How fast data are checked and prepared: MB/s, beside the tokenizer library's own batch encoding, and peak memory for files of
two sizes.

    taskset -c 0 python tests/benchmarks/data_check.py --num-proc 1
    python tests/benchmarks/data_check.py --num-proc 2
    python tests/benchmarks/data_check.py --sizes 100 1000   # takes an hour

The bar: 100 MB of JSON lines checked in under a minute on two cores, and memory that does not grow with the file. Text is the
standard library's, cut anew for each record, so that there are few duplicates. Memory is of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mistral_common

from moe_train.commands.quickstart_text import gather_texts
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.tokenizers.load import tokenizer_at

SIZES = (10, 100)  # MB
V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="MB")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        gather_texts(root / "text")
        texts = [json.loads(line)["text"] for line in (root / "text" / "text_train.jsonl").open()]
        tokenizer = train_tokenizer(texts, 32_000, root / "tokenizer")
        words = " ".join(texts).split(" ")
        for kind in ("text", "chat"):
            for size in arguments.sizes:
                file = root / f"{kind}-{size}.jsonl"
                write_records(file, kind, size, words)
                for name, path in (("tokenizers", root / "tokenizer"), ("mistral-common v3", V3)):
                    for command in (checking(file, path, arguments.num_proc), preparing(file, kind, path, arguments.num_proc)):
                        wall, cpu, peak = _timed(command)
                        print(
                            f"data {command[1]:7} {kind} {size:4} MB, {name:17} {arguments.num_proc} processes: {wall:6.1f} s, "
                            f"{size / wall:5.2f} MB/s, {size / cpu:5.2f} MB per CPU second, peak {peak / 2**20:,.0f} MiB",
                            flush=True,
                        )
        sample = [json.loads(line)["text"] for line in (root / f"text-{arguments.sizes[0]}.jsonl").open()]
        begun = time.perf_counter()
        tokenizer.encode_batch(sample)
        print(
            f"tokenizers' own encode_batch, one core: {arguments.sizes[0] / (time.perf_counter() - begun):.2f} MB/s of JSON lines"
        )


def write_records(file: Path, kind: str, megabytes: int, words: list[str]) -> None:
    """Records of about 150 words a text, each put together of stretches of 10 to 60 words."""
    drawn = random.Random(0)

    def text(count: int) -> str:
        said: list[str] = []
        while len(said) < count:
            at = drawn.randrange(len(words) - 60)
            said += words[at : at + drawn.randrange(10, 60)]
        return " ".join(said[:count])

    with file.open("w") as stream:
        while stream.tell() < megabytes * 1e6:
            for _ in range(100):
                count = int(drawn.lognormvariate(4.5, 0.8)) + 3
                turns = [(text(count // 2 + 3), text(count + 3)) for _ in range(drawn.choice([1, 1, 2, 3]))]
                messages = [
                    {"role": role, "content": said}
                    for turn in turns
                    for role, said in zip(("user", "assistant"), turn, strict=True)
                ]
                record = {"text": " ".join(said for turn in turns for said in turn)} if kind == "text" else {"messages": messages}
                stream.write(json.dumps(record) + "\n")


def checking(file: Path, tokenizer: Path, num_proc: int) -> list[str]:
    """`moe-train data check` of a file."""
    return ["data", "check", str(file), "--tokenizer", str(tokenizer), "--seq-len", "2048", "--json", "--num-proc", str(num_proc)]


def preparing(file: Path, kind: str, tokenizer: Path, num_proc: int) -> list[str]:
    """`moe-train data prepare` of the same, for a run whose config is written beside it."""
    run = {
        "name": "prepared",
        "run_dir": str(file.parent / "run"),
        "model": {
            "family": "mistral",
            **{"vocab_size": 1 << 17, "model_dim": 64, "num_layers": 1, "max_seq_len": 2048},
            "attention": {"num_heads": 1, "num_kv_heads": 1, "head_dim": 64},
            "ffn": {"name": "dense", "ffn_dim": 64},
        },
        "data": {
            "tokenizer": tokenizer_at(tokenizer).model_dump(),
            "train": [{"name": "files", "files": [str(file)], "record": {"name": kind, "too_long": "drop"}}],
            "cache_dir": tempfile.mkdtemp(dir=file.parent),
            "num_proc": num_proc,
        },
        "train": {"steps": 1, "batch_size": 8, "seq_len": 2048},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    }
    config = file.with_suffix(".yaml")
    config.write_text(json.dumps(run))
    return ["data", "prepare", str(config), "--json"]


def _timed(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds, and the most bytes that all processes had at once, at the quarter second."""
    before, begun, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    arguments = [sys.executable, "-m", "moe_train", *command]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None:
            peak = max(peak, sum(_resident(pid) for pid in _session(process.pid)))
            time.sleep(0.25)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode in (0, 1), process.returncode
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def _session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
