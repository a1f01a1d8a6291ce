"""Work without a network: every connection but those between the processes of the job is a fault.

`network: none` in a config or MOE_TRAIN_OFFLINE=1 in the environment turns this on. An audit hook of the interpreter (PEP 578)
sees each connection and each look-up of a name that Python code makes, in libraries too, and refuses it. Compiled code is not
seen: the readers of buckets ask `require_network` before they connect, and settings of other libraries are put into the
environment. For a guarantee by the kernel, start the command in a network namespace: `unshare -rn moe-train …`.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping

log = logging.getLogger(__name__)

VARIABLE = "MOE_TRAIN_OFFLINE"
"""Variable of the environment that forbids the network in this process and in those that it starts."""
OFFLINE_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
}
"""Settings by which other libraries do not try the network at all."""
_CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")
_LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_METADATA_HOSTS = ("metadata.google.internal", "169.254.169.254")
"""Where JAX asks for the other hosts of a TPU slice."""

_reason: str | None = None
_peers: frozenset[str] = frozenset()
_is_hooked = False


def is_forbidden() -> bool:
    """Return whether the network is forbidden in this process."""
    return _reason is not None


def obey_environment() -> None:
    """Forbid the network if the environment says so."""
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        forbid_network(f"{VARIABLE}={os.environ[VARIABLE]}")


def forbid_network(reason: str) -> None:
    """Refuse every connection of this process, except to the other processes of its job, until the process ends.

    Args:
        reason: The setting that asks for it, for messages.
    """
    global _reason, _peers, _is_hooked
    # The names of the job's hosts have to be looked up, also if the environment has forbidden the network before.
    _reason = None
    _peers = peers_of_job(os.environ)
    _reason = reason
    # Processes that this one starts inherit it.
    os.environ[VARIABLE] = "1"
    os.environ.update(OFFLINE_SETTINGS)
    _set_in_loaded_libraries()
    # A hook cannot be removed, so it is added once.
    if not _is_hooked:
        _is_hooked = True
        sys.addaudithook(_refuse_connections)


def _set_in_loaded_libraries() -> None:
    """Tell libraries that have read their settings already."""
    for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], name, True)


def peers_of_job(env: Mapping[str, str]) -> frozenset[str]:
    """Return the hosts of the job that an environment describes, by every name and address under which they are reached.

    The names are looked up before the network is forbidden.
    """
    hosts = [env.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0]]
    for variable in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        hosts += [host.rpartition(":")[0] or host for host in env.get(variable, "").split(",")]
    if env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        hosts.append(env["MEGASCALE_COORDINATOR_ADDRESS"].partition(":")[0])
    if env.get("JAX_NUM_PROCESSES") == "auto" or any(hosts[1:]):
        hosts += _METADATA_HOSTS
    if env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        # Imported here, since only Slurm writes its hosts in a form that has to be read.
        from moe_train.machine.processes import Job, job

        found = job(env)
        if isinstance(found, Job):
            hosts.append(found.coordinator.rpartition(":")[0])
    names = {host.strip("[] ") for host in hosts if host}
    return frozenset(names | {address for name in names for address in _addresses(name)})


def _addresses(host: str) -> set[str]:
    """Return the addresses of a host; none if its name is not known."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def require_network(what: str) -> None:
    """Check that the network may be used.

    Args:
        what: What needs it, for the message.

    Raises:
        ValueError: The network is forbidden.
    """
    if _reason is not None:
        raise ValueError(f"{what} needs a network, which {_reason} forbids; copy it to this machine first, or leave {_reason} out")


def _refuse_connections(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse a connection or a look-up that is not between the processes of the job."""
    if _reason is None or not event.startswith("socket."):
        return
    host: object
    if event in _CONNECTIONS:
        address = arguments[1]
        # A path is a socket of the same machine, as processes of a pool use.
        if not isinstance(address, tuple):
            return
        host = address[0]
    elif event in _LOOK_UPS:
        host = arguments[0]
        # No name: the machine's own addresses, to listen at. A connection to them would reach a proxy of this machine.
        if host in (None, "", "0.0.0.0", "::"):
            return
    else:
        return
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host in _peers:
        return
    fault = f"a connection to {host} was refused, since {_reason} forbids the network"
    # Logged as well, since a library may catch the error and go on.
    log.error("%s", fault)
    raise RuntimeError(f"{fault}; leave {_reason} out if it is meant, or provide what is needed on this machine")
