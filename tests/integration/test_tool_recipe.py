"""The recipe with tool dialogues: its data have no problems, and a model trains on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_train.cli import main

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(list(arguments))
    assert not ended.value.code


@pytest.mark.slow
def test_the_recipe_checks_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tokenizer = "runs/tool_dialogue/tokenizer"
    command("tokenizer", "train", str(ROOT / "README.md"), "--chat-format", "chatml", "--vocab-size", "512", "--out", tokenizer)
    capsys.readouterr()
    recipe = "configs/tool_dialogue_chatml.yaml"
    command("data", "check", "--config", recipe, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["problem_counts"] == {} and answer["shapes"] == {"chat with tools": 6}
    command("train", recipe, "train.steps=2", "train.batch_size=8", "mesh.data=8")  # the tests have eight devices
    capsys.readouterr()
    run = "runs/tool_dialogue/run"
    command("evaluate", run, "--data", "configs/data/tool_dialogue.jsonl", "--json")
    loss = json.loads(capsys.readouterr().out)["loss"]
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n")
    losses = []
    for template in ([], ["--chat-template", "chatml"], ["--chat-template", str(plain)]):
        command("evaluate", run, "--data", str(chats), "--json", *template)
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert loss > 0 and losses[0] == losses[1] != losses[2]
    command("generate", run, "--prompt", "a", "--chat", "--chat-template", str(plain), "--max-tokens", "2")
    with pytest.raises(SystemExit) as ended:
        main.main(["generate", run, "--prompt", "a", "--chat-template", "chatml"])
    assert ended.value.code == 2 and "--chat-template has no effect on text to continue; add --chat" in capsys.readouterr().err
