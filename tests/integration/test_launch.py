"""The scripts of launch/: what they install and call, told by a stand-in for the environment; and once in earnest, offline."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe_train.machine import processes

ROOT = Path(__file__).parents[2]
SETTINGS = ("PYTHON", "VENV", "WHEELHOUSE", "RESTARTS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


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
    assert "/bin/false is missing or older than 3.11" in done.stderr
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


# --- what starts processes -----------------------------------------------------------------------------------------

STARTERS = ("again.sh", "local.sh", "slurm.sbatch", "tpu_vm.sh", "jobset_gpu.yaml", "jobset_tpu.yaml", "skypilot.yaml")


@pytest.mark.parametrize("name", STARTERS)
def test_a_launcher_says_what_it_is_for_and_how_it_is_used(name: str) -> None:
    text = (ROOT / "launch" / name).read_text()
    header = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    assert f"launch/{name}" in "\n".join(header[:3])
    assert {"Purpose", "Hardware"} <= {line[2:].partition(":")[0] for line in header}
    assert "75" in "\n".join(header)
    if name.endswith(".yaml"):
        yaml.safe_load(text)
    else:
        subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


def stand_in(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def one_after_the_other(path: Path, *codes: str) -> Path:
    """A program that ends with each of the codes in turn, or by a signal, and writes down how it was called."""
    cases = " ".join(f"{i}) {'kill -9 $$' if code == 'killed' else f'exit {code}'} ;;" for i, code in enumerate(codes, 1))
    lines = [f'echo "$*" >> {path}.calls', f"case $(wc -l < {path}.calls) in {cases} esac"]
    return stand_in(path, "\n".join(lines))


@pytest.mark.parametrize(
    ("codes", "runs", "code"),
    [(["75", "killed", "0"], 3, 0), (["75", "2"], 2, 2), (["1"], 1, 1), (["75", "75", "75", "75"], 3, 75)],
)
def test_again_runs_again_what_is_unfinished_or_was_killed(tmp_path: Path, codes: list[str], runs: int, code: int) -> None:
    program = one_after_the_other(tmp_path / "program", *codes)
    stand_in(tmp_path / "sleep", "")
    done = script("again.sh", str(program), "a b", RESTARTS="2", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == code
    assert (tmp_path / "program.calls").read_text() == "a b\n" * runs
    assert ("the limit (RESTARTS)" in done.stderr) == (code == 75)


def test_again_hands_term_on_and_ends(tmp_path: Path) -> None:
    program = stand_in(tmp_path / "program", f"trap 'exit 75' TERM; touch {tmp_path}/there; while :; do sleep 0.05; done")
    job = subprocess.Popen(["bash", "launch/again.sh", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
    job.terminate()
    assert job.communicate(timeout=60)[1] == "" and job.returncode == 75


_JOB = "import os; from moe_train.machine import processes; print(processes.job(os.environ))"
SAYS_JOB = f"exec env PYTHONPATH={ROOT} {sys.executable} -c '{_JOB}'"


def test_local_starts_processes_that_find_each_other(tmp_path: Path) -> None:
    said = f'echo "$* gpus=${{JAX_LOCAL_DEVICE_IDS:-all}}" > {tmp_path}/$JAX_PROCESS_ID; {SAYS_JOB} >> {tmp_path}/$JAX_PROCESS_ID'
    python = stand_in(tmp_path / "python", said)
    stand_in(tmp_path / "nvidia-smi", "printf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'")
    settings = {"PYTHON": python, "JAX_PLATFORMS": "cuda", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = script("local.sh", "2", "--", "train", "a b.yaml", **settings)
    assert done.returncode == 0, done.stderr
    (first, job_0), (second, job_1) = ((tmp_path / str(i)).read_text().splitlines() for i in range(2))
    assert first == "-m moe_train train a b.yaml gpus=0,1" and second == "-m moe_train train a b.yaml gpus=2,3"
    assert "num_processes=2, process_id=0" in job_0 and job_1 == job_0.replace("process_id=0", "process_id=1")
    done = script("local.sh", "3", "--", "train", **settings)
    assert done.returncode == 2 and "3 processes do not divide the 4 GPUs of this machine" in done.stderr
    assert script("local.sh", "train").returncode == 2
    stand_in(python, 'exit "$((JAX_PROCESS_ID * 2))"')
    assert script("local.sh", "2", "--", "train", **settings).returncode == 2


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True), (134, True), (137, True)])
def test_slurm_requeues_what_is_unfinished_or_was_killed(tmp_path: Path, code: int, again: bool) -> None:
    stand_in(tmp_path / "srun", f'echo "$*" > {tmp_path}/srun.calls; exit {code}')
    stand_in(tmp_path / "scontrol", f'echo "$*" > {tmp_path}/scontrol.calls')
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": ROOT, "SLURM_JOB_ID": "12", "VENV": "venv"}
    assert script("slurm.sbatch", "train", "run.yaml", **settings).returncode == code
    assert (tmp_path / "srun.calls").read_text() == "--kill-on-bad-exit=0 venv/bin/python -m moe_train train run.yaml\n"
    calls = tmp_path / "scontrol.calls"
    assert (calls.read_text() if calls.exists() else None) == ("requeue 12\n" if again else None)
    calls.unlink(missing_ok=True)
    script("slurm.sbatch", "train", "run.yaml", SLURM_RESTART_COUNT="5", RESTARTS="5", **settings)
    assert not calls.exists()


def test_tpu_vm_starts_and_stops_each_host_by_ssh(tmp_path: Path) -> None:
    """The stand-in for gcloud runs the command on this machine, as the only host."""
    stand_in(tmp_path / "gcloud", f'echo "$*" > {tmp_path}/gcloud.calls; cd {tmp_path} && bash -c "${{@: -1}}"')
    program = f"echo \"$* processes=$JAX_NUM_PROCESSES\"; trap 'exit 75' TERM; touch {tmp_path}/there; while :; do sleep 0.05; done"
    stand_in(tmp_path / "my tree/.venv/bin/moe-train", program)
    (tmp_path / "my tree/launch").symlink_to(ROOT / "launch")
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CHECKOUT": "my tree"}
    assert script("tpu_vm.sh", "slice", "us-east5-a", "--", "train", "a b.yaml", **settings).returncode == 0
    assert (
        (tmp_path / "gcloud.calls")
        .read_text()
        .startswith("compute tpus tpu-vm ssh slice --zone us-east5-a --worker=all --command ")
    )
    while not (tmp_path / "there").exists():
        time.sleep(0.01)
    assert script("tpu_vm.sh", "slice", "us-east5-a", "--stop", **settings).returncode == 0
    host = int((tmp_path / "my tree/moe-train.pid").read_text())
    until = time.monotonic() + 60
    while Path(f"/proc/{host}").exists() and time.monotonic() < until and "Z" not in Path(f"/proc/{host}/stat").read_text():
        time.sleep(0.02)
    assert (tmp_path / "my tree/moe-train.log").read_text() == "train a b.yaml processes=auto\n"
    assert script("tpu_vm.sh", "slice", "us-east5-a").returncode == 2


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_a_jobset_is_one_of_kubernetes(name: str) -> None:
    """Of the fields that JobSet's and Job's schemas have, those that are used here: a misspelt one is refused."""
    whole = yaml.safe_load((ROOT / "launch" / name).read_text())
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole["spec"].keys() == {"failurePolicy", "replicatedJobs"}
    (jobs,) = whole["spec"]["replicatedJobs"]
    assert jobs.keys() == {"name", "replicas", "template"} and jobs["template"].keys() == {"spec"}
    job = jobs["template"]["spec"]
    assert job.keys() == {"parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template"}
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    known = {"restartPolicy", "terminationGracePeriodSeconds", "securityContext", "containers", "volumes", "nodeSelector"}
    assert pod.keys() <= known and pod["restartPolicy"] == "Never"  # as podFailurePolicy needs it
    (container,) = pod["containers"]
    assert container.keys() <= {"name", "image", "command", "env", "ports", "resources", "volumeMounts"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # A pod that fails fails its job (backoffLimit), and so all are started again, unless its exit code was 1 or 2.
    policy = whole["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0 and job["backoffLimit"] == 0
    assert policy["rules"] == [{"name": "fault", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [1, 2]}}
    if name == "jobset_gpu.yaml":
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        env = {v["name"]: v.get("value") or {index: "1"}[v["valueFrom"]["fieldRef"]["fieldPath"]] for v in container["env"]}
        host = f"{whole['metadata']['name']}-{jobs['name']}-0-0.{whole['metadata']['name']}"
        assert processes.job(env) == processes.Job(f"{host}:8476", job["parallelism"], 1)


def test_skypilot_tells_each_host_of_the_others(tmp_path: Path) -> None:
    task = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 134, 137]}
    stand_in(tmp_path / ".venv/bin/moe-train", f'echo "$*"; {SAYS_JOB}')
    env = (
        os.environ
        | task["envs"]
        | {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    )
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    arguments, job = done.stdout.splitlines()
    assert arguments == f"train {task['envs']['CONFIG']} {task['envs']['OVERRIDES']}" and (ROOT / task["envs"]["CONFIG"]).is_file()
    assert job == str(processes.Job("10.0.0.7:8476", task["num_nodes"], 1))


# --- without a network ---------------------------------------------------------------------------------------------


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
    command = [*prefix, "bash", "launch/test.sh", "-q", "tests/config", "tests/integration/test_configs.py", "tests/cli"]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    done = subprocess.run(
        [*prefix, ".venv/bin/moe-train", "--help"], cwd=checkout, env=env, capture_output=True, text=True, check=True
    )
    assert "Usage: moe-train" in done.stdout
