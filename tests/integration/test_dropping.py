"""A run whose model has no export format, and whose experts have little room."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_train.checkpoint import model_dir
from moe_train.commands.export import export
from moe_train.commands.train import train
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from moe_train.run import loop

MOE = {
    **{"name": "moe", "ffn_dim": 16, "num_experts": 4, "experts_per_token": 2},
    **{"router": {"name": "softmax", "bias": True}, "num_shared_experts": 1},
}
LOSS = {"load_balance_loss_coef": 0.01, "router_z_loss_coef": 0.0, "bias_update_rate": 0.01}


@pytest.mark.slow
def test_a_run_without_a_format_trains_and_stops_where_it_drops_too_much(small_run, tmp_path, capsys) -> None:
    settings = {"model__family": "mixtral", "model__ffn": MOE, "loss": LOSS, "export": "none", "mesh": {"expert": 4, "fsdp": 2}}
    settings |= {"train__capacity_factor": 0.5, "model__num_layers": 1, "evaluation": {"every_steps": 100}}
    run = small_run(tmp_path / "run", train__steps=1, train__max_drop_rate=1.0, **settings)
    assert train(run) == loop.FINISHED
    said = capsys.readouterr().err
    assert "experts: all_to_all over 4 devices, chosen by bytes on cpu: each receives" in said
    assert "export: none, since no file format can express a router bias and shared experts" in said
    assert " dropped" in said
    with pytest.raises(ValueError, match=r"cannot be exported: no file format can express a router bias and shared experts"):
        export(run.run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with jax.set_mesh(make_mesh(run.mesh)):
        shapes = parameters(abstract_model(run.model, run.compute))[1]
        bias = np.asarray(model_dir.load_parameters(run.run_dir, shapes)["stacks.0.layers.0.ffn.router.bias"])
    assert bias.shape == (1, 4) and {*np.abs(bias).ravel()} <= {np.float32(0), np.float32(0.01)} and bias.any()
    again = small_run(tmp_path / "run", train__steps=2, train__max_drop_rate=0.25, **settings)
    with pytest.raises(RuntimeError, match=r"step 2: layer 0 dropped [3-6]\d\.\d\d% of its assignments; train.max_drop_rate is 25"):
        train(again)
