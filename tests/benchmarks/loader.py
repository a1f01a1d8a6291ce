"""How fast batches come: packed tokens a second on one core, from text that is tokenised already.

    taskset -c 0 python tests/benchmarks/loader.py

The bar is 1M packed tokens a second. Also timed: tokenising, opening again, and the packing plan of a million records.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.data.loader import Loader
from moe_train.data.packing import make_plan
from moe_train.data.standard_library import gather
from moe_train.data.tokenizer import train_bpe


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        gather(root / "text")
        texts = [json.loads(line)["text"] for line in (root / "text" / "text_train.jsonl").open()]
        tokenizer = train_bpe(texts, 4096, root / "tokenizer")
        paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]
        for name, records in (("documents", texts), ("paragraphs", paragraphs)):
            file = root / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
            source = config.FileSource(name="files", files=(str(file),), record=config.TextRecord(name="text"))
            data = config.Data(train=(source,), cache_dir=str(root / "cache"))
            for seq_len, batch_size in ((512, 8), (4096, 8)):
                start = time.perf_counter()
                loader = Loader(data, "train", tokenizer, batch_size=batch_size, seq_len=seq_len, seed=0)
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
        plan = make_plan(lengths, seq_len, "split")
        fill = plan.num_tokens / (plan.num_rows * seq_len)
        print(f"plan of 1M records, seq_len {seq_len:5}: {time.perf_counter() - start:.2f} s, rows {fill:.2%} full")


if __name__ == "__main__":
    main()
