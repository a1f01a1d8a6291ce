"""Personal data and secrets: what is found, where, and that neither reports nor copies show it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_train.data.check import personal_data
from moe_train.data.check.findings import PersonalDataSearch
from moe_train.data.tokenizers.huggingface import HuggingFace
from tests.data.check.samples import ANSWER, USER, Write, check_files

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n-----END RSA PRIVATE KEY-----"
TOKEN = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"
# What is personal, as it stands in a text, and its rule.
PERSONAL = [
    ("jane.doe+x@mail.example.org", "pii-email"),
    ("DE89 3704 0044 0532 0130 00", "pii-iban"),
    ("FR1420041010050500013M02606", "pii-iban"),
    ("4111 1111 1111 1111", "pii-card"),
    ("5500-0000-0000-0004", "pii-card"),
    ("078-05-1121", "pii-id"),
    ("12345678Z", "pii-id"),
    ("+49 30 901820", "pii-phone"),
    (TOKEN, "secret"),
    (KEY, "secret"),
    ("AKIAIOSFODNN7EXAMPLE", "secret"),
]
HARMLESS = (
    "version 1.2.3.4 of 2026-11-30, order 4111111111111112, hash d41d8cd98f00b204e9800998ecf8427e, "
    "0000 0000 0000 0000, @decorator, DE12 3456 7890 1234 5678 90, 3.14159265358979323846, password"
)


@pytest.fixture(autouse=True)
def libraries() -> None:
    for library in ("detect_secrets", "phonenumbers", "stdnum"):
        pytest.importorskip(library, reason="comes with the extras pii and test")


@pytest.mark.parametrize(("text", "rule"), PERSONAL)
def test_it_is_found_exactly(text: str, rule: str) -> None:
    before = "See AND "
    (found,) = personal_data.detect(f"{before}{text} AND more", None)
    assert (found.kind.rule, found.start, found.stop) == (rule, len(before), len(before) + len(text))


def test_what_only_looks_like_it_is_left_alone() -> None:
    assert personal_data.detect(HARMLESS, None) == []
    assert [found.kind.rule for found in personal_data.detect("call 030 901820", "DE")] == ["pii-phone"]
    (assigned,) = personal_data.detect("\n password = 'hunter22secret'\n", None)
    assert (assigned.start, assigned.stop) == (14, 28)


def test_neither_report_nor_copy_shows_it(tokenizer: HuggingFace, write_lines: Write, tmp_path: Path) -> None:
    mail = "jane@example.org"
    chat = {"messages": [USER | {"content": f"I am {mail}, {TOKEN}"}, ANSWER], "contact": mail}
    path = write_lines("a.jsonl", [chat, {"messages": [USER, ANSWER]}, {"text": f"card {4111111111111111}"}])
    search = PersonalDataSearch()
    answer = check_files(tokenizer, path, personal_data=search, allowed=frozenset({"mixed-kinds"}))
    assert answer["problem_counts"] == {"pii-email": 2, "secret": 1, "pii-card": 1}
    assert answer["personal_data"] == {"secret": 1, "pii-email": 2, "pii-card": 1}
    (first, *_) = answer["problems"]
    assert first["where"] == f"{path}:1" and first["message"] == "messages.0.content has an e-mail address at characters 5 to 21"
    out = tmp_path / "out"
    answer = check_files(tokenizer, path, personal_data=search, fix=out, allowed=frozenset({"mixed-kinds", "unread-key"}))
    lines = [json.loads(line) for line in (out / "a.jsonl").read_text().splitlines()]
    assert lines[0]["messages"][0]["content"] == "I am [EMAIL], [SECRET]" and lines[0]["contact"] == "[EMAIL]"
    assert lines[1] == {"messages": [USER, ANSWER]} and lines[2] == {"text": "card [CARD]"}
    assert answer["fixed"]["changed"] == 2 and answer["fixed"]["dropped"] == 0
    for shown in (json.dumps(answer), (out / "changes.log").read_text(), (out / "a.jsonl").read_text()):
        assert mail not in shown and TOKEN not in shown and "4111111111111111" not in shown
    number = write_lines("b.jsonl", [{"messages": [USER, ANSWER | {"weight": 4111111111111111}]}])  # no text could stand there
    answer = check_files(tokenizer, number, personal_data=search, fix=tmp_path / "other")
    assert answer["fixed"]["dropped"] == 1 and answer["fixed"]["kept"] == 0
    allowed = frozenset({"mixed-kinds", "pii-email", "secret", "pii-card"})
    assert check_files(tokenizer, path, personal_data=search, allowed=allowed)["problem_counts"] == {}
    assert check_files(tokenizer, path, allowed=frozenset({"mixed-kinds"}))["problem_counts"] == {}  # off unless asked


def test_wrong_requests_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--phone-region Germany is no country; state two letters, such as DE"):
        personal_data.check_region("Germany")
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(ValueError, match=r"--pii needs the extra pii .*: bash launch/install\.sh pii"):
        personal_data.require_libraries()
