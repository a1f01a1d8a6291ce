"""The processes of one job: found in the environment, and missed when they go."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_train.machine import processes

ROOT = Path(__file__).parents[2]
THREE = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
STEP = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[007-015,20],b3"}


@pytest.mark.parametrize(
    ("env", "job"),
    [
        ({}, None),
        (THREE, processes.Job("host:1234", 4, 3)),
        ({**THREE, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"JAX_NUM_PROCESSES": "auto"}, processes.DetectedByJax()),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # the batch script, not a step
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, processes.Job("node007:61441", 2, 1)),
        (
            {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n1"},
            processes.Job("n1:61441", 2, 1, (1,)),
        ),
        ({**STEP, "JAX_COORDINATOR_PORT": "99"}, processes.Job("node007:99", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, processes.DetectedByJax()),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, processes.DetectedByJax()),
    ],
)
def test_the_environment_says_which_processes_there_are(env: dict[str, str], job: Any) -> None:
    assert processes.job(env) == job


def test_work_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    processes.require_one_process("writing")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "auto")
    with pytest.raises(ValueError, match=r"writing is done by one process.*start the command once"):
        processes.require_one_process("writing")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1"},
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID is missing .*: JAX_COORDINATOR_ADDRESS is set",
        ),
        ({**THREE, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID is 4, but JAX_NUM_PROCESSES is 4; use a number from 0 to 3"),
        ({**THREE, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four' in the environment; it must be a whole number"),
        ({**THREE, "JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS is 'host'; it must be HOST:PORT"),
        ({**THREE, "JAX_NUM_PROCESSES": "auto"}, "JAX_NUM_PROCESSES is auto, but JAX_COORDINATOR_ADDRESS is 'host:1234'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_JOB_ID and SLURM_PROCID and SLURM_STEP_NODELIST is missing"),
    ],
)
def test_half_an_environment_is_refused_in_one_line(env: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        processes.job(env)
    assert "\n" not in str(error.value)


PEER = """
import os, sys, time
from moe_train.machine import processes
processes.GRACE_SECONDS = 0.5
index, how, invitation = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if index == 0:
    processes.silence_other_processes(0)
    print(processes.listen(3), flush=True)
else:
    processes.connect("localhost", invitation, index, 3)
    print("connected", flush=True)
sys.stdin.readline()
if how == "leaves":
    processes.announce_exit()
elif how == "fails":
    processes.exit_process(2)
elif how == "dies":
    os.kill(os.getpid(), 9)
else:
    time.sleep(100)
"""


def job_of_three(*hows: str, strangers: tuple[bytes, ...] = ()) -> list[tuple[int, str]]:
    """(exit code, stderr) of three processes; those that go do so when all are there, and those that wait would do so for
    longer than this does. Strangers say something to the first one before the others come."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started: list[subprocess.Popen[str]] = []
    invitation = ""
    for i, how in enumerate(hows):
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen([sys.executable, "-c", PEER, str(i), how, invitation], env=env, text=True, **pipes))
        if i == 0:
            invitation = started[0].stdout.readline().strip()
            for said in strangers:
                with socket.create_connection(("localhost", int(invitation.split()[0]))) as stranger:
                    stranger.sendall(said)
    for process in started[1:]:
        assert process.stdout.readline() == "connected\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[1] for process in started]
    return [(process.returncode, lines) for process, lines in zip(started, said, strict=True)]


@pytest.mark.parametrize("gone", [0, 2])
def test_a_process_that_dies_ends_the_others_with_75_and_one_line(gone: int) -> None:
    found = job_of_three(*("dies" if i == gone else "waits" for i in range(3)))
    assert [code for code, _ in found] == [-9 if i == gone else 75 for i in range(3)]
    lost = f"moe-train: process {gone} of 3 was lost; run the same command again to continue from what was saved\n"
    assert found[0 if gone else 1][1] == lost
    assert found[1][1] in (lost, "moe-train: process 0 of 3 stopped with exit code 75; see its message\n")


OF_JAX = """
import os, sys, time
from jaxlib import _jax
from moe_train.machine import processes
index, port = int(sys.argv[1]), sys.argv[2]
if index == 0:
    service = _jax.get_distributed_runtime_service(f"[::]:{port}", 2)
client = _jax.get_distributed_runtime_client(f"localhost:{port}", index)
client.connect()
if index == 0:
    client.key_value_set("watch", processes.listen(2))
    client.wait_at_barrier("watched", 100_000)
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
processes.connect("localhost", client.blocking_key_value_get("watch", 100_000), index, 2)
client.wait_at_barrier("watched", 100_000)
while True:  # the watch has to take Python's lock from this
    pass
"""


def test_the_others_miss_the_first_process_before_jax_aborts_them() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", OF_JAX, str(index), port] for index in range(2)]
    job = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=60)[1] for process in job]
    assert [process.returncode for process in job] == [-9, 75], said
    assert said[1].endswith("moe-train: process 0 of 2 was lost; run the same command again to continue from what was saved\n")


def test_a_process_that_fails_ends_the_others_with_its_exit_code() -> None:
    found = job_of_three("waits", "fails", "waits")
    assert [code for code, _ in found] == [2, 2, 2]
    assert found[0][1] == "moe-train: process 1 of 3 stopped with exit code 2; see its message\n"


def test_processes_that_leave_in_order_are_not_missed() -> None:
    assert job_of_three("leaves", "leaves", "leaves") == [(0, ""), (0, ""), (0, "")]


def test_strangers_at_the_port_are_nobodys_loss() -> None:
    said = (b"", b"GET / HTTP/1.1", bytes(64), b"0" * 32 + bytes([1, 0, 0, 0]))
    assert job_of_three("leaves", "leaves", "leaves", strangers=said) == [(0, "")] * 3
