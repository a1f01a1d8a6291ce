"""Records to ids on disk: one shard of a source, streamed through flat memory, there whole or not at all.

    SHARD/tokens      uint16 or uint32: the ids of all examples end to end
          loss_mask   bool for each id; not there where every id bears loss
          offsets     int64, one more than examples: example i is tokens[offsets[i]:offsets[i + 1]]
          origins     int64 pairs: in which span of the shard an example stands, and on which line (or row)
          facts.json  what the manifest says of it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moe_train import config
from moe_train.atomic import new_directory
from moe_train.data.encoding import encode
from moe_train.data.shards import Shard
from moe_train.data.sources import Origin, Records
from moe_train.data.tokenizer import Tokenizer

Told = Callable[[int, int], None]  # of records and tokens more


def write_shard(
    directory: Path, shard: Shard, records: Records, record: config.Record, tokenizer: Tokenizer, template: str | None, told: Told
) -> None:
    """Tokenise a shard into the new folder `directory`.

    Raises ValueError with file and line for the first record that cannot be used.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    per_span = [[0, 0] for _ in shard.spans]  # records, tokens
    num_examples = num_tokens = loss_tokens = empty = 0
    with new_directory(directory) as unfinished:
        with contextlib.ExitStack() as stack:
            names = ("tokens", "loss_mask", "offsets", "origins")
            tokens, loss_mask, offsets, origins = (stack.enter_context((unfinished / name).open("wb")) for name in names)
            offsets.write(np.int64(0).tobytes())
            for i, span in enumerate(shard.spans):
                numbered = ((Origin(span.place, number), fields) for number, fields in records.read(span))
                for origin, examples in encode(numbered, records, record, tokenizer, template):
                    empty += not examples
                    before = num_tokens
                    for ids, mask in examples:
                        num_examples += 1
                        num_tokens += len(ids)
                        tokens.write(np.asarray(ids, dtype).tobytes())
                        loss_mask.write(b"" if mask is None else np.asarray(mask, bool).tobytes())
                        loss_tokens += len(ids) if mask is None else sum(mask)
                        offsets.write(np.int64(num_tokens).tobytes())
                        origins.write(np.asarray((i, origin.number), np.int64).tobytes())
                    per_span[i][0] += 1
                    per_span[i][1] += num_tokens - before
                    told(1, num_tokens - before)
        if record.name == "text":
            (unfinished / "loss_mask").unlink()
        files = sorted(unfinished.iterdir())
        digest = hashlib.sha256(dtype.encode())
        for file in files:
            with file.open("rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        facts = {
            "dtype": dtype,
            "examples": num_examples,
            "tokens": num_tokens,
            "loss_tokens": loss_tokens,
            "empty": empty,
            "per_span": per_span,
            "sizes": {file.name: file.stat().st_size for file in files},
            "sha256": digest.hexdigest(),
        }
        (unfinished / "facts.json").write_text(json.dumps(facts) + "\n")
