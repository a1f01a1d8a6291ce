"""The answer of `moe-train plan` as JSON; the keys are stable, so programs can rely on them."""

from __future__ import annotations

from typing import Any

from moe_train.plan.answer import Answer
from moe_train.plan.choice import Choice, device_limit, dollars_per_billion, share_of_peak
from moe_train.plan.describe import explain
from moe_train.plan.measured_speed import calibrated_speed


def answer_as_json(answer: Answer) -> dict[str, Any]:
    """Return the complete answer: the topology, the price, and the best choice of each mesh."""
    topology = answer.topology
    best = answer.best
    return {
        "topology": {
            "name": topology.name,
            "device": topology.device,
            "slices": topology.num_slices,
            "chips": topology.num_chips,
            "devices": topology.num_devices,
            "hbm_bytes_per_device": device_limit(topology),
        },
        "price": {"dollars_per_chip_hour": answer.price.dollars_per_hour, "source": answer.price.source},
        "initial_files": list(answer.initial_files),
        "considered": answer.considered,
        "fitting": answer.fitting,
        # The key is a part of the format; the field is `Answer.stated`.
        "given": None if answer.stated is None else choice_as_json(answer, answer.stated),
        "best": None if best is None else choice_as_json(answer, best),
        "choices": [choice_as_json(answer, choice) for choice in answer.choices],
    }


def choice_as_json(answer: Answer, choice: Choice) -> dict[str, Any]:
    """Return one choice: its settings, its costs as modelled and as compiled, and why it is not the best."""
    topology = answer.topology
    run = choice.run
    compiled = choice.compiled
    is_best = choice is answer.best
    speed = calibrated_speed(choice, topology)
    record: dict[str, Any] = {
        "mesh": run.mesh.model_dump(),
        "transport": choice.transport,
        "remat": run.compute.remat,
        "batch_size": run.train.batch_size,
        "microbatches": run.train.microbatches,
        "fits": choice.fits,
        "memory_bytes": {**choice.memory._asdict(), "total": choice.memory.total},
        "received_bytes": {"network": choice.work.network_bytes, "dcn": choice.work.dcn_bytes},
        "received_bytes_per_token": choice.received_per_token(topology.num_devices),
        "flows": [flow._asdict() for flow in choice.flows],
        "model_flops": choice.work.model_flops,
        "flops": choice.work.flops,
        "hbm_bytes": choice.work.hbm_bytes,
        "seconds": {**choice.time._asdict(), "step": choice.time.step},
        "binds": choice.time.binds,
        "tokens_per_second": choice.tokens_per_second,
        "mfu": share_of_peak(choice, topology),
        "calibrated": None if speed is None else {"tokens_per_second": speed.tokens_per_second, **speed.measured._asdict()},
        "dollars_per_billion_tokens": dollars_per_billion(choice, topology, answer.price.dollars_per_hour),
        "compiled": None,
        "why_not": None if is_best else explain(choice, answer.best or choice),
    }
    if compiled is not None:
        record["compiled"] = {
            "bytes_per_device": compiled.bytes_per_device,
            "received_bytes": compiled.network_bytes,
            "seconds": compiled.compile_seconds,
            "memory_error": choice.memory_error,
            "received_error": choice.received_error,
        }
    elif choice.refused is not None:
        record["compiled"] = {"refused": choice.refused}
    return record
