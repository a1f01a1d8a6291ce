"""Train on the records of a database: python examples/own_data.py [RUN_DIR]"""

import hashlib
import sqlite3
import sys
from pathlib import Path
from typing import Any

import moe_train
from moe_train import config


class Articles:
    """The rows of a table, as `moe_train.Records` asks for them."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        texts = [text for (text,) in database.execute("SELECT text FROM articles ORDER BY id")]
        # The identity changes with the content, so that tokens of old content are never trained on.
        self.identity = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        self._count = len(texts)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        (text,) = self._database.execute("SELECT text FROM articles WHERE id = ?", (index,)).fetchone()
        return {"text": text}

    def where(self, index: int) -> str:
        return f"articles, row {index}"


paragraphs = Path("LICENSE").read_text().split("\n\n")
database = sqlite3.connect(":memory:")
database.execute("CREATE TABLE articles (id INTEGER PRIMARY KEY, text TEXT)")
database.executemany("INSERT INTO articles VALUES (?, ?)", enumerate(paragraphs))

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/examples/own_data"
tokenizer = Path(run_dir).parent / "tokenizer"
if not tokenizer.exists():
    moe_train.train_tokenizer(paragraphs, 384, tokenizer)
written = moe_train.load_config("examples/tiny.yaml", [f"run_dir={run_dir}", f"data.tokenizer.path={tokenizer}"])
assert written.data is not None
articles = config.PythonSource(name="python", title="articles", records=Articles(database), record=config.TextRecord(name="text"))
run = moe_train.resolve(written.model_copy(update={"data": written.data.model_copy(update={"train": (articles,)})}))
for metrics in moe_train.steps(run):
    print(f"step {metrics['step']}: loss {metrics['loss']:.3f}")
