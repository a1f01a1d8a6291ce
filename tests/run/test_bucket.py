"""A run's folder in a bucket: what a reader sees if the copy ends at any moment, and where a run continues."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_train import config
from moe_train.config import yaml_file
from moe_train.run import bucket
from moe_train.run.bucket import BucketCopy, in_working_folder, working_folder


class Stopped(Exception):
    """Stands for a process that is killed at this call of the bucket."""


def make_folder(folder: Path, steps: list[int]) -> Path:
    """A folder of a run with these checkpoints, of three files each, and two records."""
    for step in steps:
        for name in ("about/metadata", "params/d/0", "params/d/1"):
            file = folder / "checkpoints" / str(step) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{name} of {step}")
    (folder / "metrics.jsonl").write_text(f"steps {steps}")
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "compile").mkdir(exist_ok=True)
    (folder / "compile" / "program").write_text("of this machine")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'bucket' / 'run'}"


def fetched(url: str, folder: Path) -> dict[str, str]:
    """What a machine without the run's folder fetches."""
    shutil.rmtree(folder, ignore_errors=True)
    BucketCopy(url, folder).fetch()
    return content(folder)


def test_what_is_copied_comes_back(tmp_path: Path, url: str) -> None:
    here = make_folder(tmp_path / "here", [2, 4])
    BucketCopy(url, here).copy()
    expected = content(here)
    del expected["compile/program"]
    assert fetched(url, tmp_path / "there") == expected
    shutil.rmtree(here / "checkpoints" / "2")
    make_folder(here, [6])
    copy = BucketCopy(url, here)
    copy.fetch()  # what is here is newer, and stays
    copy.copy()
    assert sorted(path.name for path in (tmp_path / "bucket" / "run" / "checkpoints").iterdir()) == ["4", "6"]
    assert {name.split("/")[1] for name in fetched(url, tmp_path / "there") if name.startswith("checkpoints")} == {"4", "6"}


def test_a_copy_that_ends_at_any_moment_leaves_complete_checkpoints(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed at the n-th call of the bucket, for every n."""
    from fsspec.implementations.local import LocalFileSystem

    calls = SimpleNamespace(left=0)

    def limited(name: str) -> Callable[..., Any]:
        original = getattr(LocalFileSystem, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if calls.left == 0:
                raise Stopped
            calls.left -= 1
            return original(*args, **kwargs)

        return call

    for name in ("put_file", "pipe_file", "rm_file", "rm"):
        monkeypatch.setattr(LocalFileSystem, name, limited(name))
    outcomes = set()
    for number in range(40):
        shutil.rmtree(tmp_path / "bucket", ignore_errors=True)
        shutil.rmtree(tmp_path / "here", ignore_errors=True)
        here = make_folder(tmp_path / "here", [2, 4])
        calls.left = 1000
        BucketCopy(url, here).copy()
        shutil.rmtree(here / "checkpoints" / "2")
        make_folder(here, [6])
        copy = BucketCopy(url, here)
        copy.fetch()
        calls.left = number
        try:
            copy.copy()
            is_done = True
        except Stopped:
            is_done = False
        calls.left = 1000
        there = fetched(url, tmp_path / "there")
        steps = sorted({int(name.split("/")[1]) for name in there if name.startswith("checkpoints")})
        outcomes.add(tuple(steps))
        for step in steps:
            assert there[f"checkpoints/{step}/params/d/1"] == f"params/d/1 of {step}"
            assert len([name for name in there if name.startswith(f"checkpoints/{step}/")]) == 3
        # The next process on the same machine completes it.
        again = BucketCopy(url, here)
        again.fetch()
        again.copy()
        assert fetched(url, tmp_path / "there") == {k: v for k, v in content(here).items() if k != "compile/program"}
        if is_done:
            break
    assert is_done and outcomes == {(2, 4), (2, 4, 6), (4, 6)}


def test_an_older_folder_gives_way_to_the_bucket(tmp_path: Path, url: str) -> None:
    BucketCopy(url, make_folder(tmp_path / "other", [2, 4])).copy()
    here = make_folder(tmp_path / "here", [2])
    BucketCopy(url, here).fetch()
    assert "checkpoints/4/about/metadata" in content(here) and content(here)["metrics.jsonl"] == "steps [2, 4]"


def test_a_bucket_that_does_not_answer_is_one_warning_and_an_error_at_the_end(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = BucketCopy(url, make_folder(tmp_path / "here", [2]))
    monkeypatch.setattr(bucket, "SYNC_SECONDS", 0.01)

    def fail(*_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(copy, "_put", fail)
    with pytest.raises(OSError, match=r"run cannot be reached: no route; start again when the store answers"), copy.copying():
        time.sleep(0.2)
    assert caplog.text.count("and what is new is copied later") == 1


def test_what_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert working_folder("runs/a") == Path("runs/a")
    monkeypatch.setenv("MOE_TRAIN_WORK_DIR", str(tmp_path))
    folder = working_folder("gs://bucket/runs/a/")
    assert folder.parent == tmp_path and folder.name.startswith("a-") and folder == working_folder("gs://bucket/runs/a")
    assert folder != working_folder("gs://other/runs/a")
    run: Any = SimpleNamespace(run_dir="unknown://bucket/run", model_copy=lambda update: SimpleNamespace(**update))
    with pytest.raises(ValueError, match="unknown://bucket/run cannot be opened: "), in_working_folder(run):
        pass


@pytest.mark.parametrize("is_shared", [True, False])
def test_processes_work_in_the_folder_of_the_first(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    """Two threads stand for two processes; those of different hosts have different working folders."""
    monkeypatch.setattr(bucket, "SIGN_SECONDS", 0.2)
    process = threading.local()
    texts: dict[str, list[str]] = {"first": [], "second": []}
    barrier = threading.Barrier(2)

    def exchange(text: str, *_: object) -> list[str]:
        texts[process.name].append(text)
        barrier.wait(20)
        both = [texts["first"][-1], texts["second"][-1]]
        barrier.wait(20)
        return both

    monkeypatch.setattr(bucket, "exchange", exchange)
    monkeypatch.setattr(bucket.jax, "process_count", lambda: 2)
    monkeypatch.setattr(bucket.jax, "process_index", lambda: int(process.name == "second"))
    monkeypatch.setattr(bucket, "working_folder", lambda _: tmp_path / ("work" if is_shared else f"work_{process.name}"))
    outcomes: dict[str, object] = {}

    def work(name: str) -> None:
        process.name = name
        run: Any = SimpleNamespace(run_dir=url, model_copy=lambda update: SimpleNamespace(**update))
        try:
            with in_working_folder(run) as local_run:
                if name == "first":
                    make_folder(Path(local_run.run_dir), [2])
                outcomes[name] = local_run.run_dir
        except ValueError as error:
            outcomes[name] = str(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if is_shared:
        assert outcomes == {"first": str(tmp_path / "work"), "second": str(tmp_path / "work")}
        assert set(content(tmp_path / "bucket" / "run")) >= {"complete/2.json", "checkpoints/2/params/d/0", "metrics.jsonl"}
        assert not list((tmp_path / "bucket" / "run").glob(".*"))
    else:
        assert outcomes["first"] != outcomes["second"]  # each names its own folder
        for message in outcomes.values():
            assert re.search(
                "process 1 of 2 does not see .*; let MOE_TRAIN_WORK_DIR name a folder that all hosts see", str(message)
            )


# --- a real store, and a real run ------------------------------------------------------------------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An emulated S3 with a bucket, in a thread of this process."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[s3,server] and s3fs")
    pytest.importorskip("s3fs", reason="needs moto[s3,server] and s3fs")
    server = server_module.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    import s3fs

    # fsspec hands out one instance for equal arguments, and the address of an earlier server is none of them.
    s3fs.S3FileSystem.clear_instance_cache()
    # The emulator keeps its buckets for the life of the process.
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
    yield f"s3://{name}/run"
    server.stop()


@pytest.mark.slow
def test_an_emulated_s3_takes_and_gives_a_run(tmp_path: Path, s3: str) -> None:
    here = make_folder(tmp_path / "here", [2])
    BucketCopy(s3, here).copy()
    shutil.rmtree(here / "checkpoints" / "2")
    make_folder(here, [4])
    copy = BucketCopy(s3, here)
    copy.fetch()
    copy.copy()
    assert {k: v for k, v in content(here).items() if k != "compile/program"} == fetched(s3, tmp_path / "there")


@pytest.mark.slow
def test_a_run_that_is_killed_continues_on_another_machine(
    tmp_path: Path, s3: str, small_run: Callable[..., config.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 after a checkpoint is in the bucket; the second machine has another working folder."""
    run = small_run(tmp_path / "unused", mesh={}, checkpoint={"every_steps": 20})
    file = tmp_path / "run.yaml"
    file.write_text(yaml_file.dump(run))
    program = "from moe_train.run import bucket; bucket.SYNC_SECONDS = 0.5; from moe_train.cli.main import main; main()"
    command = [sys.executable, "-c", program, "train", str(file)]
    files, root = bucket.open_files(s3)

    def start(machine: str, steps: int) -> subprocess.Popen[bytes]:
        env = {**os.environ, "MOE_TRAIN_WORK_DIR": str(tmp_path / machine), "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen([*command, f"run_dir={s3}", f"train.steps={steps}"], env=env, stderr=subprocess.PIPE)

    killed = start("first", 100_000)
    for _ in range(600):
        files.invalidate_cache()
        if files.exists(f"{root}/complete") or killed.poll() is not None:
            break
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    files.invalidate_cache()
    newest = max(int(Path(path).stem) for path in files.ls(f"{root}/complete", detail=False))
    done = start("second", newest + 20)
    _, printed = done.communicate(timeout=300)
    assert done.returncode == 0 and b"continuing after step" in printed, printed.decode()
    files.invalidate_cache()
    events = json.loads(files.cat_file(f"{root}/run.json"))["events"]
    assert [event["event"] for event in events] == ["start", "resume", "stop"] and events[-1]["reason"] == "finished"
    assert events[1]["step"] == newest and files.exists(f"{root}/complete/{newest + 20}.json")


@pytest.mark.slow
def test_two_processes_copy_one_run_and_one_continues_it(
    tmp_path: Path, s3: str, small_run: Callable[..., config.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of two processes on one host, whose checkpoint in the bucket is continued by one process with another folder."""
    run = small_run(tmp_path / "unused", mesh={"fsdp": 2}, checkpoint={"every_steps": 20})
    file = tmp_path / "run.yaml"
    file.write_text(yaml_file.dump(run))
    root = Path(__file__).parents[2]

    def start(machine: str, command: list[str], devices: int, steps: int) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "MOE_TRAIN_WORK_DIR": str(tmp_path / machine), "PYTHONPATH": str(root), "PYTHON": sys.executable}
        env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        arguments = [*command, "train", str(file), f"run_dir={s3}", f"train.steps={steps}"]
        return subprocess.run(arguments, cwd=root, env=env, capture_output=True, text=True, timeout=300)

    both = start("first", ["bash", "launch/local.sh", "2", "--"], 1, 20)
    assert both.returncode == 0, both.stderr
    files, folder = bucket.open_files(s3)
    files.invalidate_cache()
    assert files.exists(f"{folder}/complete/20.json")
    alone = start("second", [sys.executable, "-m", "moe_train"], 2, 24)
    assert alone.returncode == 0 and "continuing after step 20" in alone.stderr, alone.stderr
