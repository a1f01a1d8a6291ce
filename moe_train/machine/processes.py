"""The processes of a job: how the environment describes them, and how a process detects the loss of another.

A process whose peer has died would wait in a collective forever, or until JAX's coordination service misses heartbeats for
some minutes and aborts it with a page of C++ output. So each process holds a TCP connection to the first one, which the kernel
closes when either dies: at once, or within a minute if a whole host has vanished.

When the first process is lost, JAX's coordination client also aborts the others, about 0.2 s later; by then the watch has
ended them with exit code 75. If a single call of C code holds the GIL for longer, the exit code is 134 instead. Every
launcher restarts after both.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

UNFINISHED = 75
"""Exit code for "stopped before the end, start again" (EX_TEMPFAIL of sysexits.h)."""
GRACE_SECONDS = 10
"""Time for a process whose peer has failed to report its own error, which may have the same cause."""
STRANGER_SECONDS = 5
"""Time for a new connection to identify itself."""
_NUMBER = struct.Struct("<i")
"""Format of the only data sent after the password: a process's index when it connects, its exit code when it leaves."""
_KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
"""TCP keepalive options: a host that does not answer is considered lost after 20 + 4 · 10 s."""


class Job(NamedTuple):
    """The processes that work together, and the index of this one."""

    coordinator: str
    """Address (host:port) where the first process listens."""
    num_processes: int
    process_id: int
    local_devices: tuple[int, ...] | None = None
    """GPUs of the host that belong to this process; None for all."""


class DetectedByJax(NamedTuple):
    """Marker for several processes that JAX detects itself, as on Cloud TPU."""


_OF_JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Variables that describe a job to JAX; a user sets all three or none."""
_OF_SLURM = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_STEP_NODELIST")
"""Variables that `srun` sets for every task."""


_IMPORTED = time.time()


def process_started() -> float:
    """Return the time (as of `time.time`) when this process was started; without /proc, the time when this module was imported."""
    try:
        # Field 22, counted after the name in parentheses: ticks between the start of the system and that of the process.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return _IMPORTED
    return time.time() - age


def job(env: Mapping[str, str]) -> Job | DetectedByJax | None:
    """Return the job that an environment describes; None for a single process.

    Recognized are:
    - JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID; or only JAX_NUM_PROCESSES=auto;
    - a step of Slurm (`srun`) with several tasks;
    - Google's TPU pods on Kubernetes: TPU_WORKER_HOSTNAMES with several names, MEGASCALE_NUM_SLICES.

    Raises:
        ValueError: one of these variables is missing or is not a number.
    """
    if env.get("JAX_NUM_PROCESSES") == "auto":
        conflicting = [name for name in (_OF_JAX[0], _OF_JAX[2]) if name in env]
        if conflicting:
            raise ValueError(
                f"JAX_NUM_PROCESSES is auto, but {conflicting[0]} is {env[conflicting[0]]!r}; unset it, or state the number"
            )
        return DetectedByJax()
    # What a user states comes before what a cluster sets.
    if any(name in env for name in _OF_JAX):
        _require_variables(env, _OF_JAX, "{present} is set, and all three or none of them must be")
        count = _number(env, "JAX_NUM_PROCESSES")
        index = _number(env, "JAX_PROCESS_ID")
        address = env["JAX_COORDINATOR_ADDRESS"]
        if not re.fullmatch(r".+:\d{1,5}", address):
            raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of the first process")
        if not 0 <= index < count:
            raise ValueError(f"JAX_PROCESS_ID is {index}, but JAX_NUM_PROCESSES is {count}; use a number from 0 to {count - 1}")
        return Job(address, count, index) if count > 1 else None
    # Of the step, since the variables of the job also stand where srun has started no tasks.
    count = _number(env, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in env else 1
    if count > 1:
        _require_variables(env, _OF_SLURM, "srun sets it; start the processes with srun")
        # JAX's own rule: with one task per host a task has all devices of its host, otherwise one device.
        spread = set(re.sub(r"\(x\d+\)", "", env.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")) == {"1"}
        local = None if spread else (_number(env, "SLURM_LOCALID"),)
        # One of the last 4096 ports, so that jobs that share a host use different ones.
        port = env.get("JAX_COORDINATOR_PORT") or 61440 + _number(env, "SLURM_JOB_ID") % 4096
        return Job(f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}", count, _number(env, "SLURM_PROCID"), local)
    # A single name is a host on its own.
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    slices = _number(env, "MEGASCALE_NUM_SLICES") if "MEGASCALE_NUM_SLICES" in env else 1
    return DetectedByJax() if "," in hosts or slices > 1 else None


def require_one_process(what: str) -> None:
    """Raise ValueError if the environment describes a job of several processes; `what` names the work that one process does."""
    if job(os.environ) is not None:
        raise ValueError(
            f"{what} is done by one process, on all devices of its machine, and the environment describes a job of several; start "
            "the command once (srun --ntasks=1, or unset JAX_NUM_PROCESSES), and the others when it has finished"
        )


def _require_variables(env: Mapping[str, str], names: tuple[str, ...], reason: str) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        present = ", ".join(name for name in names if name in env)
        raise ValueError(f"{' and '.join(missing)} is missing in the environment: {reason.format(present=present)}")


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ValueError(f"{name} is {env.get(name)!r} in the environment; it must be a whole number") from None


def _first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: node[007-015,020],other -> node007"""
    return re.sub(r"\[(\w+).*", r"\1", nodes.split(",")[0])


# --- connections that detect the loss of a process -------------------------------------------------------------------


class _Watch:
    """Connections of this process: the first process has one to every other process, each other process one to the first."""

    def __init__(self) -> None:
        self.index = 0
        self.count = 1
        self.peers: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        self.left = False


_watch = _Watch()


def listen(count: int) -> str:
    """Accept and watch the connections of the other processes; called by the first process.

    Args:
        count: number of processes.

    Returns:
        The `invitation` for `connect`: the port and a password, since anybody on the network can connect to the port.
    """
    _watch.count = count
    password = secrets.token_hex(16)
    dual_stack = socket.has_dualstack_ipv6()
    # Port 0: the system chooses a free one, which the invitation states.
    server = socket.create_server(("", 0), family=socket.AF_INET6 if dual_stack else socket.AF_INET, dualstack_ipv6=dual_stack)

    def accept() -> None:
        awaited = set(range(1, count))
        while awaited:
            peer, _ = server.accept()
            index = _authenticate(peer, password)
            # An index that is not awaited is a stranger's, or one that has come before.
            if index in awaited:
                awaited.remove(index)
                _start(index, peer)
            else:
                peer.close()
        server.close()

    threading.Thread(target=accept, daemon=True).start()
    return f"{server.getsockname()[1]} {password}"


def _authenticate(peer: socket.socket, password: str) -> int | None:
    """Return the index of a peer that knows the password; None for anybody else, and after a few seconds of silence."""
    peer.settimeout(STRANGER_SECONDS)
    try:
        greeting = peer.recv(len(password) + _NUMBER.size, socket.MSG_WAITALL)
    except OSError:
        return None
    # Takes equally long wherever the texts differ, so the password cannot be guessed byte by byte.
    if not secrets.compare_digest(greeting[: -_NUMBER.size], password.encode()):
        return None
    peer.settimeout(None)
    return int(_NUMBER.unpack(greeting[-_NUMBER.size :])[0])


def connect(host: str, invitation: str, index: int, count: int) -> None:
    """Connect to the first process, so that both watch each other; called by all other processes.

    Args:
        host: host of the first process.
        invitation: result of `listen` there.
        index: index of this process.
        count: number of processes.
    """
    _watch.index = index
    _watch.count = count
    port, password = invitation.split()
    peer = socket.create_connection((host, int(port)), timeout=60)
    peer.settimeout(None)
    peer.sendall(password.encode() + _NUMBER.pack(index))
    _start(0, peer)


def silence_other_processes(index: int) -> None:
    """Silence the output of this process unless it is the first one; errors go to stderr from any process.

    What C libraries write to stdout (Gloo prints its number of ranks) would break JSON output, so on the first process it goes to
    stderr, and on the others it is discarded.
    """
    sys.stdout.flush()
    if index:
        # At the level of descriptors, since C libraries do not write through sys.stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        logging.disable(logging.WARNING)
    else:
        # Python writes to a copy of stdout; descriptor 1 itself, to which C libraries write, becomes stderr.
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, buffering=1)
        os.dup2(2, 1)


def announce_exit(code: int = 0) -> None:
    """Tell the other processes that this one ends on purpose or, with a code other than 0, that it has failed."""
    if not _watch.left:
        _watch.left = True
        for peer in _watch.peers:
            with contextlib.suppress(OSError):  # the peer has left already
                peer.sendall(_NUMBER.pack(code))


def exit_process(code: int) -> None:
    """End this process if it is one of several: after a failure it must not wait for the others at JAX's exit barrier."""
    if _watch.count == 1:
        return
    announce_exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # The first process hosts JAX's coordination service, which aborts the others if it ends before them.
    if _watch.index == 0:
        until = time.monotonic() + GRACE_SECONDS + 5
        for thread in list(_watch.threads):
            # A thread of the watch that ends the process cannot join itself.
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
    # `os._exit` skips the exit handlers, of which JAX's would wait for the other processes.
    os._exit(code)


def wait_for_loss() -> None:
    """Wait for the watch to end this process.

    Call it after a network error that may mean a lost process: the watch reports the loss more clearly.
    """
    if _watch.count > 1:
        time.sleep(GRACE_SECONDS + 1)


def _start(index: int, peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        if hasattr(socket, option):  # some systems lack it
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    _watch.peers.append(peer)
    thread = threading.Thread(target=_await_peer, args=(index, peer), daemon=True)
    # Started first: `exit_process`, which may run at any moment, cannot join a thread that has not been started.
    thread.start()
    _watch.threads.append(thread)


def _await_peer(index: int, peer: socket.socket) -> None:
    """Wait until a peer leaves, and end this process if the peer is lost or has failed.

    After a failure of the peer this process first gets some time to report its own error.
    """
    try:
        message = peer.recv(_NUMBER.size, socket.MSG_WAITALL)
    except OSError:
        message = b""
    if _watch.left:
        return
    who = f"process {index} of {_watch.count}"
    if len(message) < _NUMBER.size:
        _stop_process(f"{who} was lost; run the same command again to continue from what was saved", UNFINISHED)
        return
    code = _NUMBER.unpack(message)[0]
    if code == 0:
        return
    # A peer that was asked to stop has not failed, so this process has no error of its own to report.
    if code != UNFINISHED:
        time.sleep(GRACE_SECONDS)
    _stop_process(f"{who} stopped with exit code {code}; see its message", code)


def _stop_process(reason: str, code: int) -> None:
    if _watch.left:
        return
    # Not print: the main thread may hold the lock of sys.stderr, in a call that never returns.
    os.write(2, f"moe-train: {reason}\n".encode())
    exit_process(code)
