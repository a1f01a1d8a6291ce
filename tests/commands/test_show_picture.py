"""A picture of training rows."""

from __future__ import annotations

import html
import re
from pathlib import Path

from moe_train import config
from moe_train.commands.show import rows_of_records
from moe_train.commands.show_picture import write_picture
from moe_train.data.tokenizers.huggingface import HuggingFace


def test_a_picture_holds_the_text_and_fetches_nothing(tmp_path: Path, tokenizer: HuggingFace) -> None:
    source = config.FileSource(name="files", files=(str(tmp_path / "a.jsonl"),), record=config.TextRecord(name="text"))
    (tmp_path / "a.jsonl").write_text('{"text": "the tide"}\n')
    rows = rows_of_records(source, 1, tokenizer, None, None)
    write_picture(tmp_path / "rows.svg", rows, tokenizer, "a.jsonl", False)
    svg = (tmp_path / "rows.svg").read_text()
    text = re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]*>", "", svg)))
    assert "thetide" in text and "a.jsonl" in text
    assert "url(" not in svg.replace("url(#", ""), "nothing is fetched"
