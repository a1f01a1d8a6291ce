"""What MLflow writes without a server, read with its own client. Needs the extra `mlflow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_train import config
from moe_train.run.trackers.mlflow import ID_TAG
from tests.run.trackers.logged import SETTINGS, log_twice


@pytest.mark.slow
def test_the_database_holds_one_run_with_config_and_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = log_twice(tmp_path, config.MlflowTracker(name="mlflow", project="p"))
    assert not caplog.text
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'trackers' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("p")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.tags[ID_TAG] == identity and run.info.status == "FINISHED" and run.info.run_name == "tiny"
    assert run.data.params == {name: str(value) for name, value in SETTINGS.items()}
    logged = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss/train")]
    assert sorted(set(logged)) == [(step, 10.0 / step) for step in range(1, 6)]
    assert client.get_metric_history(run.info.run_id, "router/load/max")[0].value == 1.5
