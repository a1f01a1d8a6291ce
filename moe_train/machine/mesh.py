"""The device mesh: five named axes that always exist, and the conversion of a process's batch to global arrays.

| axis    | what it splits                                        |
|---------|-------------------------------------------------------|
| data    | batch; replicas of all weights, over the slow network |
| fsdp    | batch; weights on D, gathered just before use         |
| expert  | batch; expert weights on E                            |
| context | sequence                                              |
| tensor  | heads, F and V                                        |
"""

from __future__ import annotations

import atexit
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax._src.mesh import get_concrete_mesh  # the public function must not be called while tracing
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from moe_train import config
from moe_train.machine import processes

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Names of the mesh axes, outermost first."""
BATCH = ("data", "fsdp", "expert")
"""Mesh axes of a batch dim: every batch dim is split over exactly these.

Inside a model, whose replicas may compute on their own, use `batch_axes()`.
"""


HEARTBEAT_SECONDS = 600
"""Seconds after which JAX aborts a job whose process gives no sign of life, such as one in a virtual machine that is paused.

JAX's own limit of 100 s ends jobs that would continue. Processes that died are detected at once (`machine.processes`).
"""


def join_processes() -> None:
    """Join the other processes of this job, if the environment describes any (`processes.job`).

    Call it before anything touches a device; a second call does nothing.

    Raises:
        ValueError: the environment is incomplete.
        ConnectionError: the processes do not find each other.
    """
    job = processes.job(os.environ)
    if job is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # `train` handles SIGTERM itself
    try:
        # Deactivated, since JAX would otherwise look for a cluster of its own (Slurm, MPI) and might find another one.
        if isinstance(job, processes.Job):
            jax.distributed.initialize(*job, cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        # The other processes may only be late, so the same command may succeed.
        raise ConnectionError(
            f"the processes of this job could not connect to each other: {reason}; start the job again"
        ) from error
    index = jax.process_index()
    count = jax.process_count()
    processes.silence_other_processes(index)
    if count == 1:
        return
    key = "moe_train/watch"
    store = distributed.global_state.client
    address = distributed.global_state.coordinator_address
    assert store is not None and address is not None
    if index == 0:
        # The port and the password reach the other processes through JAX's coordination service.
        store.key_value_set(key, processes.listen(count))
    else:
        processes.connect(address.rpartition(":")[0], store.blocking_key_value_get(key, 60_000), index, count)
    atexit.register(processes.announce_exit)  # registered after JAX's own handler, and so called before it


_barriers = itertools.count()


def wait_for_processes() -> None:
    """Wait, for a minute at most, until every process of the job has called this; all of them must call it equally often.

    It goes through JAX's coordination service and so does not depend on the devices or their collectives.
    """
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"moe_train/{next(_barriers)}", 60_000)


def mesh_sizes(sizes: config.Mesh, device_count: int) -> config.Mesh:
    """Replace an axis size of -1 by the number of devices that the other axes leave.

    Args:
        sizes: mesh section of the config.
        device_count: number of devices.

    Raises:
        ValueError: the other axes do not divide `device_count`.
    """
    shape = {axis: getattr(sizes, axis) for axis in AXES}
    if -1 not in shape.values():
        return sizes
    stated = math.prod(size for size in shape.values() if size != -1)
    if device_count % stated:
        raise ValueError(f"mesh axes of {stated} devices do not divide the {device_count} available devices; change their sizes")
    return config.Mesh(**{axis: device_count // stated if size == -1 else size for axis, size in shape.items()})


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices along the five axes, all with explicit axis types.

        jax.set_mesh(moe_train.make_mesh(config.Mesh(fsdp=2, expert=4)))

    Args:
        sizes: mesh section of the config; one axis may be -1.
        devices: devices to use; None for all.

    Raises:
        ValueError: the product of the sizes is not the number of devices.
    """
    chosen = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(sizes, len(chosen))
    shape = [getattr(sizes, axis) for axis in AXES]
    if math.prod(shape) != len(chosen):
        axes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True) if size > 1) or "one device"
        raise ValueError(
            f"mesh ({axes}) needs {math.prod(shape)} devices, but {len(chosen)} are available; set one axis to -1 for the rest"
        )
    types = (AxisType.Explicit,) * len(AXES)
    # jax.make_mesh arranges all devices so that neighbours on an axis are neighbours in the network.
    if devices is None:
        return jax.make_mesh(tuple(shape), AXES, axis_types=types)
    return Mesh(np.array(chosen).reshape(shape), AXES, axis_types=types)


def use_default_mesh() -> None:
    """Put a mesh of one device in force, for the rest of the process, if no mesh is in force.

    So a program that never mentions a mesh runs on the first device. `jax.set_mesh` replaces it.

    Raises:
        ValueError: JAX is tracing, where a mesh can no longer be put in force.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return
    try:
        jax.set_mesh(make_mesh(config.Mesh(), jax.devices()[:1]))
    except ValueError as error:
        raise ValueError(
            "no mesh is in force inside this jit; call jax.set_mesh(moe_train.make_mesh(moe_train.Mesh())) before it, or create "
            "the model outside"
        ) from error


def is_one_device() -> bool:
    """Return whether the mesh in force has a single device."""
    return jax.sharding.get_abstract_mesh().size == 1


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh without devices, for shapes and shardings only."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def axis_size(axis: str) -> int:
    """Return the size of a mesh axis inside a traced function or under `jax.set_mesh`."""
    return jax.sharding.get_abstract_mesh().shape[axis]


def slices_along(axis: str) -> int:
    """Return the number of TPU slices that the devices along an axis of the mesh in force span.

    Each slice must hold an equal, contiguous part of the axis; otherwise every device is counted as a slice of its own.
    """
    mesh = get_concrete_mesh()
    size = axis_size(axis)
    # Empty under an abstract mesh, whose devices belong to no slice.
    if mesh.empty or size == 1:
        return 1
    slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    # One row per line of devices along the axis, with the slice of each device.
    along = np.moveaxis(slices, AXES.index(axis), -1).reshape(-1, size)
    count = len(set(along[0].tolist()))
    # Every line must visit the slices one after the other, with equally many devices in each.
    in_turn = size % count == 0 and (along == np.repeat(along[:, :: size // count], size // count, axis=1)).all()
    return count if in_turn else size


def global_axes() -> tuple[str, ...]:
    """Return the axes that an array's spec may name: all, except `data` if each replica computes on its own (`train.step`)."""
    # Inside a `shard_map` over `data` that axis is manual, not explicit.
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def batch_axes() -> tuple[str, ...]:
    """Return those axes of `BATCH` that a spec may name."""
    return tuple(axis for axis in BATCH if axis in global_axes())


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Convert a process's rows of a batch, a pytree of (b, T) numpy arrays, to global (B, T) arrays on the mesh.

    Raises:
        ValueError: the devices of a row belong to several processes.
    """
    if jax.process_count() > 1:
        check_rows(mesh.devices)
    # Rows over all batch axes, positions over `context`; replicated over `tensor`.
    sharding = NamedSharding(mesh, PartitionSpec(BATCH, "context"))

    def put(x: Any) -> jax.Array:
        # The global shape is given, not inferred: if `tensor` spans processes, JAX would silently treat their rows as equal.
        global_shape = (x.shape[0] * jax.process_count(), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, global_shape)

    return jax.tree.map(put, batch)


def put_equal(arrays: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Convert a pytree of NumPy arrays that are equal in all processes to global arrays on the mesh."""
    sharding = NamedSharding(mesh, spec)

    def put(x: Any) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, arrays)


def check_rows(devices: np.ndarray) -> None:
    """Raise ValueError if the devices of a batch row, along context and tensor, belong to several processes."""
    # The last two axes of the mesh, so that the devices of one row are consecutive.
    *_, context, tensor = devices.shape
    owners = np.array([device.process_index for device in devices.flat]).reshape(-1, context * tensor)
    if (owners != owners[:, :1]).any():
        devices_per_process = np.bincount(owners.reshape(-1)).max()
        raise ValueError(
            f"mesh.context {context} x mesh.tensor {tensor} devices share a sequence, but belong to several processes of "
            f"{devices_per_process} devices, and a process reads whole sequences; let context x tensor divide {devices_per_process}"
        )


def platform() -> str:
    """Return the platform of the mesh in force ("cpu", "tpu", "gpu"); its devices need not be attached to this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform:
        return device.platform
    return jax.default_backend()
