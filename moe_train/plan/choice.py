"""One way to run on a topology, with its costs according to the model and, if it was compiled, to the compiler."""

from __future__ import annotations

from typing import NamedTuple

from moe_train import config
from moe_train.machine.devices import DEVICES, Device
from moe_train.plan import compile as compiler
from moe_train.plan.memory import Memory, memory
from moe_train.plan.roofline import Time, Work, step_time, step_work
from moe_train.plan.topology import Topology
from moe_train.plan.traffic import Flow, flows, microbatch_shape
from moe_train.plan.weights import layout


class Choice(NamedTuple):
    """One way to run, with its costs according to the model."""

    run: config.Run
    """The run with this choice's mesh, transport, remat and batch."""
    memory: Memory
    flows: list[Flow]
    work: Work
    time: Time
    limit: int
    """Bytes of a device that a program may use."""
    compiled: compiler.Compiled | None = None
    """The compiled step; None if the choice was not compiled, or refused."""
    refused: str | None = None
    """The compiler's message if it cannot place the program."""

    @property
    def transport(self) -> str | None:
        """The transport of the experts' tokens; None if the device holds all experts, or the model has none."""
        return microbatch_shape(self.run).transport

    @property
    def bytes_per_device(self) -> int:
        """Bytes of memory according to the compiler, or to the model if the choice was not compiled."""
        return self.compiled.bytes_per_device if self.compiled else self.memory.total

    @property
    def fits(self) -> bool:
        """Whether the compiler has not refused the choice and its memory is within the limit."""
        return self.refused is None and self.bytes_per_device <= self.limit

    @property
    def tokens(self) -> int:
        """Tokens of one step, on all devices."""
        return self.run.train.batch_size * self.run.train.seq_len

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all devices at the roofline, an upper bound."""
        return self.tokens / self.time.step

    @property
    def received(self) -> float:
        """Bytes that one device receives in a step."""
        return self.work.network_bytes + self.work.dcn_bytes

    @property
    def memory_error(self) -> float:
        """Relative error of the model's memory against the compiler's; positive if the model estimates more."""
        assert self.compiled is not None  # asked of compiled choices only
        return self.memory.total / self.compiled.bytes_per_device - 1

    @property
    def received_error(self) -> float:
        """Relative error of the model's received bytes against the compiler's.

        Positive if the model estimates more; 1 if the compiler counts no bytes and the model does.
        """
        assert self.compiled is not None  # asked of compiled choices only
        counted = self.compiled.network_bytes
        if not counted:
            return float(self.received > 0)
        return self.received / counted - 1

    def received_per_token(self, devices: int) -> float:
        """Return the received bytes for each token that a device processes.

        Args:
            devices: number of devices over which the step's tokens are divided.
        """
        return self.received / (self.tokens / devices)


def device_limit(topology: Topology) -> int:
    """Return the bytes of HBM that a program may use on one device."""
    # The table is of chips, some of which are several devices to JAX.
    return DEVICES[topology.device].hbm_bytes // topology.devices_per_chip


def model_choice(run: config.Run, topology: Topology) -> Choice:
    """Model the costs of a resolved run whose mesh has no -1. Raises ValueError if mesh and model do not fit together."""
    if run.compute.transport == "auto" and run.mesh.expert > 1 and isinstance(run.model.ffn, config.MoeFfn):
        # Resolved now, for the topology's platform; later it would be resolved for this process's.
        transport = microbatch_shape(run, topology.platform).transport
        run = run.model_copy(update={"compute": run.compute.model_copy(update={"transport": transport})})
    weight_layout = layout(run)
    transfers = flows(run, weight_layout, topology.platform)
    work = step_work(run, weight_layout, transfers, topology)
    time = step_time(work, transfers, run, topology, DEVICES[topology.device])
    return Choice(run, memory(run, weight_layout, topology.platform), transfers, work, time, device_limit(topology))


def share_of_peak(choice: Choice, topology: Topology) -> float:
    """Return the model's FLOPs over what the device could compute during the step: an upper bound on MFU."""
    peak = DEVICES[topology.device].flops[choice.run.compute.dtype] / topology.devices_per_chip
    return choice.work.model_flops / peak / choice.time.step


def dollars_per_billion(choice: Choice, topology: Topology, price: float | None) -> float | None:
    """Return the dollars per 1e9 tokens at the roofline, a lower bound.

    Args:
        choice: the choice.
        topology: states the number of chips.
        price: dollars per chip and hour; None if unknown, and then the result is None too.
    """
    if price is None:
        return None
    return price * topology.num_chips / 3600 / choice.tokens_per_second * 1e9


class Price(NamedTuple):
    """The price of a chip."""

    dollars_per_hour: float | None
    """Dollars per chip and hour; None if unknown."""
    source: str
    """Source of the price, in words."""


def price_of(device: Device, stated: float | None) -> Price:
    """Return the stated price, or else the list price."""
    if stated is not None:
        return Price(stated, "--price")
    if device.dollars_per_hour is None:
        return Price(None, "no list price is known; state --price")
    return Price(device.dollars_per_hour, f"list price of {device.priced}")
