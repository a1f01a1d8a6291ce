"""How fast batches come: packed tokens a second on one core, from text that is tokenised already.

    taskset -c 0 python -m tests.benchmarks.loader [NUM_PROC]

The bar is 1M packed tokens a second. Also timed: tokenizing, compared with the library's own batches on the same text and
cores (bar: 1.2 times as long for text and 2.5 times for chats, which are rendered too; in CPU seconds, the fastest of five
rounds, each in a process of its own; `encode_batch` of the rendered conversations, `encode_batch_fast`, which finds no
offsets, of text), opening again, and the packing plan of a million records. For a mistral-common tokenizer, which has no
batches, the peer is a loop over its own calls.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import tokenizers
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from moe_train import config
from moe_train.commands.quickstart_text import gather_texts
from moe_train.commands.train_tokenizer import train_tokenizer
from moe_train.data.batches.batch import BatchRows
from moe_train.data.batches.loader import Loader
from moe_train.data.batches.packing import make_plan
from moe_train.data.chat import sandbox
from moe_train.data.prepared.tokenize_ahead import prepare
from moe_train.data.prepared.tokenize_shard import Recipe
from moe_train.data.records.open_source import open_source
from moe_train.data.tokenizers.huggingface import HuggingFace
from moe_train.data.tokenizers.mistral import Mistral
from moe_train.data.tokenizers.tokenizer import Tokenizer
from tests.benchmarks.data_check import V3, write_records

MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
ROUNDS = 5


class Seconds(NamedTuple):
    cpu: float
    wall: float


def library(root: Path, texts: list[str], fast: bool) -> Seconds:
    """What the tokenizer library takes for the texts, a thousand at a time."""
    tokenizer = tokenizers.Tokenizer.from_file(str(root / "tokenizer" / "tokenizer.json"))
    encode_batch = tokenizer.encode_batch_fast if fast else tokenizer.encode_batch
    with timed() as taken:
        for i in range(0, len(texts), 1000):
            encode_batch(texts[i : i + 1000], add_special_tokens=False)
    return taken()


def mistral_common(file: Path, conversations: list[list[dict[str, str]]]) -> Seconds:
    """What mistral-common takes for the conversations, one after the other."""
    tokenizer = MistralTokenizer.from_file(file, mode=ValidationMode.finetuning)
    with timed() as taken:
        for messages in conversations:
            tokenizer.encode_chat_completion(ChatCompletionRequest.model_validate({"messages": messages}))
    return taken()


def ahead(source: config.FileSource, tokenizer: Tokenizer, template: str | None, root: Path, num_proc: int) -> Seconds:
    """What `data prepare` takes for the same, from the file to the prepared set; what is loaded once is loaded before."""
    few = root / "few.jsonl"
    with open(source.files[0]) as file:
        few.write_text("".join(itertools.islice(file, 5)))
    shutil.rmtree(root / "cache", ignore_errors=True)
    for one, processes in ((source.model_copy(update={"files": (str(few),)}), 1), (source, num_proc)):
        with timed() as taken:
            prepare(Recipe(one, open_source(one), tokenizer, template), root / "cache", processes)
    return taken()


def compare(name: str, ours: Callable[[], Seconds], theirs: Callable[[], Seconds]) -> None:
    """Both in turn, each time in a process of its own, since a heap that others have left holes in is slow to use. Whatever
    else the machine does makes a round slower, and never faster, so the fastest of each count."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        pairs = [(pool.apply(ours), pool.apply(theirs)) for _ in range(ROUNDS)]
    prepare_, library_ = (min(side) for side in zip(*pairs, strict=True))
    ratios = sorted(a.cpu / b.cpu for a, b in pairs)
    print(
        f"{name}: CPU s of prepare {prepare_.cpu:5.2f}, of the library {library_.cpu:5.2f}, the fastest of {ROUNDS} rounds each: "
        f"ratio {prepare_.cpu / library_.cpu:.2f}; by rounds {ratios[0]:.2f} to {ratios[-1]:.2f}, median {median(ratios):.2f}",
        flush=True,
    )


def chats(root: Path, texts: list[str], tokenizer: HuggingFace, num_proc: int) -> None:
    """Conversations of one to three turns, and the standard library's short questions and answers."""
    write_records(root / "long chats.jsonl", "chat", 6, " ".join(texts).split(" "))
    shutil.copy(root / "text" / "chat_train.jsonl", root / "short chats.jsonl")
    mistral = Mistral(V3)
    chat_record = config.ChatRecord(name="chat")
    kinds = {"by prefixes": str(tokenizer.chat_template), "by {% generation %}": MARKED}
    for name in ("long chats", "short chats"):
        conversations = [json.loads(line)["messages"] for line in (root / f"{name}.jsonl").open()]
        source = config.FileSource(name="files", files=(str(root / f"{name}.jsonl"),), record=chat_record)
        for kind, template in kinds.items():
            variables = [{"messages": messages, **tokenizer.named_tokens} for messages in conversations]
            texts = [re.sub(f"[{''.join(sandbox.GENERATION)}]", "", text) for text in sandbox.render(template, variables)]
            compare(
                f"{name}, {len(texts)} records, {kind}",
                partial(ahead, source, tokenizer, template, root, num_proc),
                partial(library, root, texts, False),
            )
        some = conversations[:2000]
        (root / "some.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in some))
        source = config.FileSource(name="files", files=(str(root / "some.jsonl"),), record=chat_record)
        compare(
            f"{name}, {len(some)} records, v3",
            partial(ahead, source, mistral, None, root, num_proc),
            partial(mistral_common, V3, some),
        )


@contextmanager
def timed() -> Iterator[Callable[[], Seconds]]:
    """CPU seconds of this process, those that it has waited for and those that render for it: what others do does not count."""
    begun, taken = (cpu_seconds(), time.perf_counter()), []
    yield lambda: Seconds(*taken)
    taken += [cpu_seconds() - begun[0], time.perf_counter() - begun[1]]


def cpu_seconds() -> float:
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def main(num_proc: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        gather_texts(root / "text")
        texts = [json.loads(line)["text"] for line in (root / "text" / "text_train.jsonl").open()]
        tokenizer = train_tokenizer(texts, 4096, root / "tokenizer")
        chats(root, texts, tokenizer, num_proc)
        paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]
        for name, records in (("documents", texts), ("paragraphs", paragraphs)):
            file = root / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
            source = config.FileSource(name="files", files=(str(file),), record=config.TextRecord(name="text"))
            data = config.Data(train=(source,), cache_dir=str(root / "cache"), num_proc=num_proc)
            compare(name, partial(ahead, source, tokenizer, None, root, num_proc), partial(library, root, records, True))
            for seq_len, batch_size in ((512, 8), (4096, 8)):
                start = time.perf_counter()
                loader = Loader(data, "train", tokenizer, BatchRows(batch_size, seq_len), seed=0)
                opened = time.perf_counter()
                tokens = 0
                batches = loader.iterate()
                for batch in itertools.islice(batches, 4_000_000 // (seq_len * batch_size)):
                    tokens += int((batch.segment_ids > 0).sum())
                rate = tokens / (time.perf_counter() - opened) / 1e6
                fill = loader.num_tokens / (loader.num_rows * seq_len)
                print(
                    f"{name:10} {loader.num_records:6} records {loader.num_tokens / 1e6:5.2f}M tokens, {batch_size} x {seq_len}: "
                    f"open {opened - start:5.2f} s, {rate:5.2f}M packed tokens/s, rows {fill:.1%} full"
                )
    for seq_len in (512, 4096, 32768):
        lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 1_000_000).astype(np.int64) + 1
        start = time.perf_counter()
        plan = make_plan(lengths, seq_len, "split", (0, 0))
        seconds = time.perf_counter() - start
        fill = plan.num_tokens / (plan.num_rows * seq_len)
        print(f"plan of 1M records, seq_len {seq_len:5}: {seconds:.2f} s, rows {fill:.2%} full")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
