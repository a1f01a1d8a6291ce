"""Compile the training step of a run with the real compiler, for devices that need not be present.

The TPU compiler comes with libtpu, the GPU compiler with JAX's CUDA plugin; neither needs the hardware. Both read the
environment only once and abort the process on failure, so they run in a separate process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_train import config
from moe_train.data.batches.batch import PackedBatch
from moe_train.machine.mesh import BATCH, make_mesh
from moe_train.model.parameters import Parameters, parameters
from moe_train.model.transformer import abstract_model
from moe_train.plan import gpu_targets, hlo
from moe_train.plan.hlo_text import num_instructions
from moe_train.plan.replica_groups import axes_of
from moe_train.plan.topology import Topology, parse_topology
from moe_train.train.optimizer import make_optimizer_of_any_length
from moe_train.train.state import TrainState, create_state, trained_in_full
from moe_train.train.step import compile_step
from moe_train.train.step_definition import StepDefinition, definition_of


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device receives in a step through collectives of one kind along the same mesh axes."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    crosses_slices: bool
    """Whether a group contains devices of several slices."""
    times: int
    bytes: float
    bytes_overlapped: float
    """The part that asynchronous collectives receive while matrix products run between their start and done."""


@dataclass(frozen=True)
class Compiled:
    """One compiled training step; bytes and FLOPs are per device."""

    bytes_per_device: int
    """Peak memory, arguments included.

    The sum of arguments and temporaries that `memory_analysis` also states is up to half more. XLA:TPU places programs in this
    size with gaps of a few percent, and refuses programs by it.
    """
    traffic: tuple[Traffic, ...]
    fallback_bytes: float
    """Additional bytes received if every conditional takes its most expensive branch."""
    flops: float
    """FLOPs of matrix products outside kernels, with the bodies of loops multiplied by their trip counts."""
    kernel_flops: float
    """FLOPs that Pallas kernels estimate for themselves: the worst case if group sizes are dynamic."""
    instructions: int
    warnings: tuple[str, ...]
    """Lines of the compiler's output about memory or rematerialization."""
    compile_seconds: float
    """Seconds for tracing, lowering and compiling."""
    hlo: str
    """The text of the optimized program."""

    @property
    def network_bytes(self) -> float:
        """Bytes that one device receives in a step through all collectives."""
        return sum(t.bytes for t in self.traffic)


def compile_config(run: config.Run, topology: Topology, *, timeout_seconds: float = 3600) -> Compiled:
    """Compile the training step of a run in a process of its own.

    Args:
        run: a resolved run whose `model` is stated.
        topology: the hardware to compile for.
        timeout_seconds: limit for the whole compilation.

    Raises:
        ValueError: the run has no architecture, its mesh does not have the topology's size, the compiler is not installed, or
            it refuses the program (with the compiler's own message if the program exceeds the device's memory).
    """
    if run.model is None:
        raise ValueError(
            f"the architecture is unknown, since init_from {run.init_from} was not found; state `model` in the config too"
        )
    check_installed(topology)
    with tempfile.TemporaryDirectory() as folder:
        request_path = Path(folder, "request.json")
        reply_path = Path(folder, "reply.json")
        request_path.write_text(json.dumps({"run": run.model_dump(mode="json"), "topology": topology.name}), encoding="utf-8")
        # -P and PYTHONPATH make the child import this package, whatever the working directory contains
        command = [sys.executable, "-P", "-m", "moe_train.plan.compile", str(request_path), str(reply_path)]
        python_path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        process = subprocess.run(
            command,
            env=os.environ | _environment(topology) | {"PYTHONPATH": python_path},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        if not reply_path.exists():
            # The compiler aborted the process, so its last line is the only explanation.
            last_lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit status {process.returncode}"]
            raise ValueError(f"{topology.name}: the compiler aborted: {last_lines[-1]}")
        reply = json.loads(reply_path.read_text(encoding="utf-8"))
    if "error" in reply:
        raise ValueError(f"{topology.name}: {reply['error']}")
    # JSON has turned tuples into lists.
    traffic = tuple(Traffic(**{**t, "axes": tuple(t["axes"])}) for t in reply.pop("traffic"))
    return Compiled(**reply, traffic=traffic, warnings=_warnings(process.stderr))


def check_installed(topology: Topology) -> None:
    """Raise ValueError if the compiler for `topology` is not installed."""
    compiler, extra, modules = {
        "tpu": ("libtpu", "tpu", ("libtpu",)),
        "gpu": ("JAX's CUDA plugin", "cuda", ("jax_cuda12_plugin", "jax_cuda13_plugin")),
    }[topology.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        remedy = f"run: bash launch/install.sh {extra}, or plan with --no-compile"
        raise ValueError(f"compiling for {topology.name} needs {compiler}, which is not installed; {remedy}")


def _environment(topology: Topology) -> dict[str, str]:
    """Return variables that keep the compilers from looking for hardware and from querying a cloud's metadata server."""
    # Log level 0 prints the lines that `_warnings` reads.
    variables = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "0"}
    if topology.platform == "tpu":
        variables |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
        variables |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # several processes may compile at once, since none of them holds a chip
    return variables


def _warnings(stderr: str) -> tuple[str, ...]:
    """Return the distinct lines about memory or rematerialization, without their timestamps."""
    messages: dict[str, None] = {}  # a dict keeps the order of the lines
    for line in stderr.splitlines():
        if re.search(r"rematerializ|exceed|out of memory", line, re.IGNORECASE):
            messages[re.sub(r"^\S+ \S+ +\d+ (\S+\] )?", "", line)] = None
    return tuple(messages)


# --- in the process that compiles ----------------------------------------------------------------------------------


def devices_of(topology: Topology) -> Sequence[jax.Device]:
    """Return devices that programs can be compiled for, but not run on."""
    if topology.platform == "gpu":
        shape = f"1x{topology.num_slices}x{topology.chips_per_slice}"  # network partitions x hosts x GPUs per host
        if topology.device not in gpu_targets.GPU_TARGETS:
            known = ", ".join(gpu_targets.GPU_TARGETS)
            raise ValueError(f"the compiler has no description of {topology.device}, only of {known}; add --no-compile")
        target = gpu_targets.description(topology.device)
        return topologies.get_topology_desc("", platform="cuda", topology=shape, target_config=target).devices
    slice_options = {} if topology.num_slices == 1 else {"num_slices": topology.num_slices}
    return topologies.get_topology_desc(topology.slice_name, platform="tpu", **slice_options).devices


class AbstractStep(NamedTuple):
    """The arguments of `compile_step`, with every array given as a shape with its sharding."""

    definition: StepDefinition
    state: TrainState
    batch: PackedBatch
    base_weights: Parameters


def abstract_step(run: config.Run, mesh: Mesh) -> AbstractStep:
    """Build the abstract training step of a run whose model is stated; `mesh` must be in force."""

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Return the shape with its sharding on the concrete mesh; counters have none, and are replicated."""
        spec = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    optimizer = make_optimizer_of_any_length(run.optimizer)
    structure, params = parameters(abstract_model(run.model, run.compute, run.lora, run.model_encoder))
    state = jax.eval_shape(
        lambda params: create_state(params, optimizer, run.lora, run.trained_tower), jax.tree.map(placed, params)
    )
    state = jax.tree.map(placed, state)
    sharding = NamedSharding(mesh, P(BATCH, "context"))
    definition = definition_of(run, structure, optimizer)
    empty = definition.objective.batch_type.empty(run.train.batch_size, run.train.seq_len)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), empty)
    return AbstractStep(definition, state, batch, trained_in_full(state.learned, run.lora))


def compile_on(run: config.Run, mesh: Mesh) -> Compiled:
    """Compile the training step of `run` for the devices of `mesh`, in this process."""
    start_time = time.perf_counter()
    with jax.set_mesh(mesh):
        program = compile_step(*abstract_step(run, mesh))
    seconds = time.perf_counter() - start_time
    memory = program.memory_analysis()
    text = program.as_text()
    assert memory is not None and text is not None  # all compilers used here provide both
    counts = hlo.count_program(text)
    return Compiled(
        bytes_per_device=memory.peak_memory_in_bytes,
        traffic=program_traffic(counts, mesh),
        fallback_bytes=counts.fallback_bytes,
        flops=counts.flops,
        kernel_flops=counts.kernel_flops,
        instructions=num_instructions(text),
        warnings=(),
        compile_seconds=seconds,
        hlo=text,
    )


def program_traffic(counts: hlo.Counts, mesh: Mesh) -> tuple[Traffic, ...]:
    """Sum the collectives of a program by kind, axes and dtype, in descending order of bytes."""
    slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    sums: dict[tuple[str, tuple[str, ...], str, bool], Traffic] = {}
    for c, times in counts.collectives.items():
        axes = axes_of(c.groups, mesh.shape)
        crosses_slices = any(len({slices[device] for device in group}) > 1 for group in c.groups)
        key = c.kind, axes, c.dtype, crosses_slices
        total = sums.get(key, Traffic(*key, times=0, bytes=0.0, bytes_overlapped=0.0))
        received = c.bytes * times
        sums[key] = replace(
            total,
            times=total.times + times,
            bytes=total.bytes + received,
            bytes_overlapped=total.bytes_overlapped + (received if c.hidden_flops else 0.0),
        )
    return tuple(sorted(sums.values(), key=lambda t: -t.bytes))


def _compile_request(request_path: Path) -> dict[str, Any]:
    """Compile what the request file asks for; returns the fields of `Compiled`, or {"error": message}."""
    request = json.loads(request_path.read_text(encoding="utf-8"))
    run = config.Run.model_validate_json(json.dumps(request["run"]))
    try:
        devices = devices_of(parse_topology(request["topology"]))
        reply = asdict(compile_on(run, make_mesh(run.mesh, devices)))
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        return {"error": str(error).splitlines()[0]}
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        remedy = "pip install nvidia-cudnn-cu12 (nvidia-cudnn-cu13 for CUDA 13), or plan with --no-compile"
        return {"error": f"attention is compiled for cuDNN, which is not installed beside JAX's CUDA plugin; run: {remedy}"}
    reply.pop("warnings")  # only the parent process sees the compiler's output
    return reply


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_compile_request(Path(sys.argv[1]))), encoding="utf-8")
