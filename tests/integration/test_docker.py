"""The Dockerfiles of launch/docker/: pinned bases, files and programs that exist, and the images that launchers name."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch" / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, without comments and with continued lines joined."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: the last rule that matches it or a folder above it decides."""
    sent = True
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!")
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        if any(fnmatch.fnmatch(parent, pattern) for parent in parents):
            sent = rule.startswith("!")
    return sent


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dockerfile_names_what_exists(file: Path) -> None:
    stages: list[str] = []
    for instruction, value in instructions(file):
        assert instruction in {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"}, instruction
        if instruction == "FROM":
            image, _, stage = value.partition(" AS ")
            stages.append(stage)
            assert re.fullmatch(r"[a-z/.-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", image), f"{image} is not pinned"
        elif instruction == "COPY" and "--from=" in value:
            assert value.split()[0].removeprefix("--from=") in stages
        elif instruction == "COPY":
            for source in value.split()[:-1]:
                assert (ROOT / source).exists() and is_sent(source), source
        elif instruction in ("ENTRYPOINT", "CMD"):
            json.loads(value)
        elif instruction == "RUN" and (extras := re.search(r'"\.\[([\w,]+)\]"', value)):
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    program = dict(instructions(file))
    assert json.loads(program["ENTRYPOINT"])[0] in PROJECT["scripts"]
    # The devices of TPUs belong to root.
    assert program.get("USER", "root") == ("root" if file.stem.startswith("tpu") else "moe")
    minimum = PROJECT["requires-python"].removeprefix(">=")
    version = re.search(r"python:(\d+\.\d+)", file.read_text())
    assert version is not None and tuple(map(int, version[1].split("."))) >= tuple(map(int, minimum.split(".")))
    assert f"launch/docker/{file.name} -t moe-train:{file.name.removesuffix('.Dockerfile')} ." in file.read_text().splitlines()[0]


def test_an_image_needs_no_other_files_of_the_checkout() -> None:
    """What the build of a wheel reads is copied: the files that pyproject.toml names, and its build step."""
    names = (PROJECT["readme"], *PROJECT["license-files"], "launch/wheel.py", "configs", "moe_train")
    for file in FILES:
        copied = " ".join(value for instruction, value in instructions(file) if instruction == "COPY")
        assert all(name in copied for name in names)
    assert not is_sent(".git/config") and not is_sent("runs/a") and not is_sent("moe_train/run/__pycache__")


@pytest.mark.parametrize(("launcher", "image"), [("jobset_gpu.yaml", "cuda"), ("jobset_tpu.yaml", "tpu")])
def test_launchers_name_these_images_and_their_program(launcher: str, image: str) -> None:
    jobset = yaml.safe_load((ROOT / "launch" / launcher).read_text())
    [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"moe-train:{image}"
    assert container["command"][0] in PROJECT["scripts"] and container["command"][1] == "train"
    assert (ROOT / "launch" / "docker" / f"{image}.Dockerfile") in FILES
