"""The scripts of launch/: what they install and call, told by a stand-in for the environment; and once in earnest, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = ("PYTHON", "VENV", "WHEELHOUSE", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def script(name: str, *arguments: str, **settings: str | Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    env.update({key: str(value) for key, value in settings.items()})
    return subprocess.run(["bash", f"launch/{name}", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A stand-in for a virtual environment, whose programs write down how they were called."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("python", "pip", "moe-train"):
        program = tmp_path / "venv" / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $* cache=$JAX_COMPILATION_CACHE_DIR" >> "{tmp_path}/calls"\n')
        program.chmod(0o755)
    return tmp_path / "venv"


def calls(venv: Path) -> list[str]:
    """The calls since the last look, without pip's constant options and the cache."""
    log = venv.parent / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.rpartition(" cache=")[0].replace("--quiet --disable-pip-version-check ", "") for line in lines]


def test_install_happens_once_per_extra_and_pyproject(venv: Path) -> None:
    assert script("install.sh", VENV=venv).returncode == 0
    assert calls(venv) == ["python -m pip install --editable ."]
    assert script("install.sh", VENV=venv).stderr == ""
    assert calls(venv) == []
    script("install.sh", "test", "judges", VENV=venv)
    assert calls(venv) == ["python -m pip install --editable .[test,judges]"]
    script("install.sh", "judges", VENV=venv)
    assert calls(venv) == []
    (venv / "installed.judges").write_text("the checksum of another pyproject.toml\n")
    script("install.sh", "test", VENV=venv)
    assert calls(venv) == []
    script("install.sh", "test", "judges", VENV=venv)
    assert calls(venv) == ["python -m pip install --editable .[test,judges]"]


def test_a_failed_install_is_tried_again(venv: Path) -> None:
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 3\n")
    assert script("install.sh", VENV=venv).returncode == 3
    assert not list(venv.glob("installed.*"))


def test_test_sh_installs_what_it_runs(venv: Path) -> None:
    assert script("test.sh", "-k", "no such test", VENV=venv).returncode == 0
    assert calls(venv) == ["python -m pip install --editable .[test]", "python -m pytest -k no such test"]
    script("test.sh", "--slow", "--judges", VENV=venv)
    assert calls(venv) == ["python -m pip install --editable .[test,judges]", "python -m pytest --slow --judges"]


def test_tests_keep_compiled_programs(venv: Path, tmp_path: Path) -> None:
    script("test.sh", VENV=venv)
    assert (tmp_path / "calls").read_text().splitlines()[-1].endswith(f"cache={ROOT}/.cache/jax")
    script("test.sh", VENV=venv, JAX_COMPILATION_CACHE_DIR="/elsewhere")
    assert (tmp_path / "calls").read_text().splitlines()[-1].endswith("cache=/elsewhere")


def test_quickstart_sh_hands_on_its_options(venv: Path) -> None:
    assert script("quickstart.sh", "--help", VENV=venv).returncode == 0
    assert calls(venv) == ["python -m pip install --editable .", "moe-train quickstart --help"]


def test_a_python_that_will_not_do_is_named(venv: Path, tmp_path: Path) -> None:
    done = script("install.sh", VENV=tmp_path / "new", PYTHON="/bin/false")
    assert done.returncode == 2
    assert "/bin/false is older than 3.11, or missing" in done.stderr
    assert not (tmp_path / "new").exists()
    done = script("install.sh", VENV=venv, PYTHON=sys.executable)
    assert done.returncode == 2
    assert f"remove {venv} or choose another" in done.stderr


def test_wheelhouse_collects_extras_and_the_build_backend(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\necho "$*" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    done = script("wheelhouse.sh", "test", "judges", PYTHON=python, WHEELHOUSE=tmp_path / "wheels")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().split()[-3:] == [f"{tmp_path}/wheels", "setuptools>=77", ".[test,judges]"]
    assert f"PIP_NO_INDEX=1 PIP_FIND_LINKS={tmp_path}/wheels bash launch/quickstart.sh" in done.stdout


def without_network() -> list[str]:
    """A prefix that takes the network away from a command; empty where this machine cannot."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return []


@pytest.mark.slow
def test_it_installs_and_runs_without_a_network(tmp_path: Path) -> None:
    checkout, wheels = tmp_path / "checkout", tmp_path / "wheels"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, files.stdout.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    collect = {"PYTHON": sys.executable, "WHEELHOUSE": str(wheels)}
    subprocess.run(["bash", "launch/wheelhouse.sh", "test"], cwd=checkout, env={**os.environ, **collect}, check=True)

    prefix = without_network()
    print("the network is taken away by", " ".join(prefix) or "an index that does not exist, since unshare does not work here")
    if prefix:
        reach = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
        tried = subprocess.run([*prefix, sys.executable, "-c", reach], capture_output=True, text=True, check=False)
        assert "Network is unreachable" in tried.stderr
    env = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") and key not in SETTINGS}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_INDEX_URL": "http://192.0.2.1/simple"}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHON": sys.executable, "HOME": str(tmp_path)}
    command = [*prefix, "bash", "launch/test.sh", "-q", "tests/test_config.py", "tests/test_configs.py", "tests/test_cli.py"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    done = subprocess.run(
        [*prefix, ".venv/bin/moe-train", "--help"], cwd=checkout, env=env, capture_output=True, text=True, check=True
    )
    assert "Usage: moe-train" in done.stdout
