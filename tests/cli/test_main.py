"""The command line: what it imports, what it hands on, what it prints, and how it exits."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train.cli import main
from moe_train.config import Config
from tests.cli.command import run

ROOT = Path(__file__).parents[2]
COMMANDS = ["train", "inspect", "evaluate", "generate", "export", "verify", "upcycle", "bench", "tokenizer", "schema", "quickstart"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["tokenizer", "train"]], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom moe_train.cli.main import main\ntry:\n    main([*sys.argv[1:], '--help'])\nfinally:\n"
        "    heavy = {'jax', 'numpy', 'flax', 'orbax', 'datasets', 'tokenizers', 'moe_train.config'} & set(sys.modules)\n"
        "    print('heavy:', *sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert "Usage: moe-train" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["expotr"], "No such command 'expotr'. Did you mean 'export'"),
        (["train"], "Missing argument 'CONFIG'; see moe-train train --help"),
        (["generate", "x", "--prompt", "a", "--max-token", "3"], "No such option: --max-token (Possible options: --max-tokens)"),
        (["plan", "x", "--topology", "v5p-8", "--price", "-1"], "Invalid value for '--price': "),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"moe-train: {said}") and len(error.splitlines()) == 1 and not out


@pytest.mark.parametrize("code", [0, 75])
def test_train_hands_on_the_config_and_its_exit_code(stand_in, config_path: str, code: int) -> None:
    given: list[Config] = []

    def train(resolved: Config) -> int:
        given.append(resolved)
        return code

    stand_in("moe_train.commands.train", train=train)
    assert run("train", config_path, "train.steps=3", "name=other") == code
    assert (given[0].train.steps, given[0].name) == (3, "other")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("mesh.expert 3 does not divide num_experts 8"), 2, "moe-train: mesh.expert 3 does not divide num_experts 8\n"),
        (FileNotFoundError("a.jsonl: no such file"), 2, "moe-train: a.jsonl: no such file\n"),
        (ConnectionError("s3://a cannot be reached"), 75, "moe-train: s3://a cannot be reached\n"),
        (FileExistsError("out exists"), 2, "moe-train: out exists\n"),
        (OSError(28, "No space left on device", "step_5"), 1, "moe-train: step_5: No space left on device\n"),
        (RuntimeError("4 steps in a row were not finite"), 1, "moe-train: 4 steps in a row were not finite\n"),
    ],
)
def test_an_error_is_one_line(stand_in, config_path: str, capsys, error: Exception, code: int, said: str) -> None:
    def train(resolved: Config) -> int:
        raise error

    stand_in("moe_train.commands.train", train=train)
    assert run("train", config_path) == code
    assert capsys.readouterr() == ("", said)
    assert run("train", config_path, "--debug") == code
    assert capsys.readouterr().err.startswith("Traceback")


def test_an_unforeseen_error_shows_its_traceback(stand_in, config_path: str, capsys) -> None:
    def train(resolved: Config) -> int:
        return {}["no such key"]

    stand_in("moe_train.commands.train", train=train)
    assert run("train", config_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("moe-train: KeyError: 'no such key'\n")


def test_bad_configs_end_with_2_and_their_lines(config_path: str, tmp_path: Path, capsys) -> None:
    assert run("train", str(tmp_path / "none.yaml")) == 2
    assert capsys.readouterr().err == f"moe-train: {tmp_path}/none.yaml: no such config file\n"
    assert run("train", config_path, "train.step=3", "seed=x") == 2
    assert capsys.readouterr().err.splitlines() == [
        'moe-train: override seed=x: seed: has to be a whole number (value "x")',
        "moe-train: override train.step=3: train.step: unknown key; did you mean steps? (value 3)",
    ]


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_train", "bench", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"moe-train: {tmp_path}: is a folder, not a config file\n"


def test_usage_errors_end_with_2(config_path: str, capsys) -> None:
    assert run("train") == 2
    assert run("generate", "runs/tiny") == 2
    assert run("export", "runs/tiny", "out", "--format", "onnx") == 2
    assert run("fly") == 2
    assert run("plan", config_path, "--topology", "v5p:4x4x4", "--price", "-1") == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 5
    assert said.err.splitlines()[-1].startswith("moe-train: Invalid value for '--price': ")


def test_inspect(tmp_path: Path, capsys) -> None:
    path = str(ROOT / "configs" / "mixtral_8x7b_pretrain_v5p.yaml")
    assert run("inspect", path, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"]["optimizer"]["eps"] == 1e-8
    (gate,) = (row for row in answer["parameters"] if row["path"].endswith("gate_proj.weight"))
    assert gate["shape"] == [32, 8, 4096, 14336]
    assert gate["spec"] == "- expert fsdp tensor"
    assert gate["bytes_per_device"] == 32 * 4096 * 14336 * 8 * 4 // 64
    assert answer["total_parameters"] == 46_702_792_704  # as transformers counts MixtralForCausalLM of these sizes
    assert run("inspect", path, "mesh.expert=4") == 0
    shown = capsys.readouterr().out
    assert "num_experts: 8" in shown and "1,792.00 MiB" in shown and "46,702,792,704" in shown
    assert run("inspect", path, "init_from=models/none", "model=null") == 2
    assert "models/none: no such folder" in capsys.readouterr().err


def test_evaluate(stand_in, capsys) -> None:
    given: list[Any] = []

    def evaluate_dir(directory: Path, files: list[Path]) -> dict[str, float]:
        given.append((directory, files))
        return {"loss": 2.5, "tokens": 1000}

    stand_in("moe_train.commands.evaluate", evaluate_dir=evaluate_dir)
    assert run("evaluate", "runs/tiny", "--data", "a.jsonl", "--data", "b.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"loss": 2.5, "tokens": 1000}
    assert given == [(Path("runs/tiny"), [Path("a.jsonl"), Path("b.jsonl")])]
    assert run("evaluate", "runs/tiny", "--data", "a.jsonl") == 0
    assert capsys.readouterr().out.split() == ["loss", "2.5", "tokens", "1,000"]


def test_generate(stand_in, capsys) -> None:
    def generate_dir(
        directory: Path, prompts: list[str], max_tokens: int, temperature: float, seed: int, *, chat: bool
    ) -> list[str]:
        return [f" {max_tokens} {temperature} {seed} {chat}" for _ in prompts]

    stand_in("moe_train.commands.generate", generate_dir=generate_dir)
    options = ["--max-tokens", "3", "--temperature", "0.5", "--seed", "7"]
    assert run("generate", "runs/tiny", "--prompt", "a", "--prompt", "b", *options, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"prompt": "a", "completion": " 3 0.5 7 False"},
        {"prompt": "b", "completion": " 3 0.5 7 False"},
    ]
    assert run("generate", "runs/tiny", "--prompt", "a") == 0
    assert capsys.readouterr().out == "a 64 0.0 0 False\n"
    assert run("generate", "runs/tiny", "--prompt", "a", "--chat") == 0
    assert capsys.readouterr().out == "a\n 64 0.0 0 True\n"


CHECK = {"name": "tensors", "passed": True, "said": "3 tensors", "figures": {"tolerance": "bits"}, "seconds": 0.25}


def test_export(stand_in, capsys) -> None:
    given: list[Any] = []

    def export(source: Path, out_dir: Path, layout: str, merge: bool, **options: Any) -> dict[str, Any]:
        given.append((source, out_dir, layout, merge, options))
        return {"tensors": {}, "checks": [CHECK], "serve": "serve it"}

    stand_in("moe_train.commands.export", export=export)
    assert run("export", "runs/tiny", "out", "--format", "peft", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"directory": "out", "checks": [CHECK], "serve": "serve it"}
    options = ("--dtype", "q8_0", "--for", "llama.cpp", "--proof", "tensors", "--max-shard-size", "1GB")
    assert run("export", "runs/tiny", "out", "--merge", *options) == 0
    shown = capsys.readouterr().out
    assert "3 tensors" in shown and "bits" in shown and "serve it: serve it" in shown
    none = {"dtype": None, "depth": "full", "server": None, "max_shard_size": None}
    some = {"dtype": "q8_0", "depth": "tensors", "server": "llama.cpp", "max_shard_size": "1GB"}
    assert given == [(Path("runs/tiny"), Path("out"), "peft", False, none), (Path("runs/tiny"), Path("out"), "gguf", True, some)]
    assert run("export", "runs/tiny", "out") == 0
    assert given[-1] == (Path("runs/tiny"), Path("out"), "hf", False, none)


def test_verify(stand_in, capsys) -> None:
    found = [SimpleNamespace(**CHECK, _asdict=lambda: CHECK)]
    stand_in("moe_train.commands.verify", verify=lambda directory, base, run, depth, adapter: ({}, found))
    assert run("verify", "out") == 0
    assert "3 tensors" in capsys.readouterr().out
    failed = {**CHECK, "passed": False, "said": "w has changed"}
    found[0] = SimpleNamespace(**failed, _asdict=lambda: failed)
    assert run("verify", "out", "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"directory": "out", "passed": False, "checks": [failed]}
    assert shown.err == "moe-train: out is not what was exported: tensors\n"


def test_tokenizer_train(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be " * 50)
    (tmp_path / "b.jsonl").write_text('{"text": "that is the question"}\n{"story": "no text"}\n')
    out = str(tmp_path / "tokenizer")
    assert run("tokenizer", "train", str(tmp_path / "a.txt"), "--vocab-size", "270", "--out", out, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert 261 < answer["vocab_size"] <= 270
    assert f"{out}/tokenizer.json" in answer["files"] and Path(out, "tokenizer.json").is_file()
    assert run("tokenizer", "train", str(tmp_path / "*"), "--vocab-size", "270", "--out", str(tmp_path / "new")) == 2
    assert capsys.readouterr().err.startswith(f"moe-train: {tmp_path}/b.jsonl:2: no column 'text'; the record has 'story'")


def test_bench_and_quickstart(stand_in, config_path: str, capsys) -> None:
    stand_in(
        "moe_train.commands.bench", bench=lambda resolved: {"median_step_seconds": 0.5, "batch_size": resolved.train.batch_size}
    )
    assert run("bench", config_path, "train.batch_size=4", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"median_step_seconds": 0.5, "batch_size": 4}
    stand_in("moe_train.commands.quickstart", quickstart=lambda: 75)
    assert run("quickstart") == 75


def test_schema_is_json(capsys) -> None:
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"


def test_what_takes_a_while_says_what_it_does(monkeypatch, capsys):
    log = logging.getLogger("moe_train.data.prepared.store")
    monkeypatch.setattr("moe_train.config.schema.json_schema", lambda: log.info("tokenising %s", "a.jsonl") or {})
    with pytest.raises(SystemExit):
        main.main(["schema"])
    shown = capsys.readouterr()
    assert shown.err == "tokenising a.jsonl\n" and json.loads(shown.out) == {}
    log.info("after the command, the library is quiet again")
    assert capsys.readouterr().err == ""
