"""The JSON answer of a plan."""

from __future__ import annotations

import json
import math

import pytest

from tests.plan.pretraining import PRETRAIN, SMALL, run


def test_json_has_what_programs_build_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", PRETRAIN, "--topology", "tpu7x-8", "--no-compile", "--json", "--price", "3", *SMALL) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["topology", "price", "initial_files", "considered", "fitting", "given", "best", "choices"]
    assert answer["topology"] == {
        **{"name": "tpu7x:2x2x1", "device": "tpu7x", "slices": 1, "chips": 4, "devices": 8},
        "hbm_bytes_per_device": 96 * 2**30,
    }
    assert answer["price"] == {"dollars_per_chip_hour": 3.0, "source": "--price"}
    assert answer["best"] == answer["choices"][0]
    assert answer["given"]["mesh"] == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    for choice in answer["choices"]:
        assert math.prod(choice["mesh"].values()) == 8
        assert choice["memory_bytes"]["total"] == sum(v for k, v in choice["memory_bytes"].items() if k != "total")
        assert choice["seconds"]["step"] >= max(choice["seconds"][k] for k in ("compute", "hbm", "network", "dcn"))
        assert choice["binds"] in ("compute", "HBM", "network", "DCN")
        dollars = 3.0 * 4 / 3600 / choice["tokens_per_second"] * 1e9
        assert choice["dollars_per_billion_tokens"] == pytest.approx(dollars)
        assert bool(choice["why_not"]) == (choice is not answer["choices"][0])
    speeds = [choice["tokens_per_second"] for choice in answer["choices"] if choice["fits"]]
    assert speeds == sorted(speeds, key=lambda s: -float(f"{s:.3g}"))
