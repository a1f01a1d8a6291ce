"""Without a network every connection and look-up is refused, but for the processes of the job; children inherit it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from moe_train.machine import network


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment, which is as before after the test; the network is allowed again."""
    for name in (network.VARIABLE, *network.OFFLINE_SETTINGS):
        monkeypatch.setenv(name, "")
    yield monkeypatch
    network._reason = None


def test_connections_are_refused_in_one_line_and_logged(environment, caplog):
    network.forbid_network("network: none")
    for connect in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.create_connection(("0.0.0.0", 80), timeout=1),  # a proxy of this machine
        lambda: socket.getaddrinfo("example.com", 443),
        lambda: socket.gethostbyname("example.com"),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    ):
        with pytest.raises(RuntimeError, match="was refused, since network: none forbids the network; leave network: none out"):
            connect()
    assert caplog.text.count("forbids the network") == 5
    with pytest.raises(ValueError, match=r"gs://bucket needs a network, which network: none forbids"):
        network.require_network("gs://bucket")
    one, other = socket.socketpair()  # processes of a pool talk like this
    one.send(b"x")
    assert other.recv(1) == b"x"
    assert os.environ["HF_HUB_OFFLINE"] == "1" and network.is_forbidden()


def test_the_processes_of_the_job_reach_each_other(environment):
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{server.getsockname()[1]}")
        network.forbid_network("network: none")
        network.forbid_network("network: none")  # as the environment and a config do
        socket.create_connection(("localhost", server.getsockname()[1])).close()
        with pytest.raises(RuntimeError):
            socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_hosts_of_a_job_are_read_from_its_environment():
    assert network.peers_of_job({}) == frozenset()
    assert {"10.0.0.1", "10.0.0.2", "169.254.169.254"} <= network.peers_of_job({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"})
    assert "10.0.0.7" in network.peers_of_job({"JAX_COORDINATOR_ADDRESS": "10.0.0.7:1234"})


def test_the_environment_forbids_it_for_programs_and_children():
    code = "import moe_train, socket\nfor host in ('192.0.2.1',):\n    socket.create_connection((host, 80), timeout=1)"
    for value, error in (("1", "RuntimeError: a connection to 192.0.2.1 was refused, since MOE_TRAIN_OFFLINE=1"), ("0", "OSError")):
        ended = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "MOE_TRAIN_OFFLINE": value}, capture_output=True, text=True
        )
        last = ended.stderr.splitlines()[-1]
        assert last.startswith(error) or (value == "0" and "RuntimeError" not in last), last
