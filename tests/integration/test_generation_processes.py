"""Generation and likelihoods on a mesh over two processes: each has the answers of one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moe_train import config
from moe_train.evaluate.generation.generator import Generator
from moe_train.evaluate.generation.sampling import Sampling
from moe_train.evaluate.suites.likelihood import Continuation, log_likelihoods, scored_continuations
from moe_train.machine.mesh import make_mesh
from moe_train.model.parameters import combine
from tests.evaluate.tiny_generator import MIXTRAL, random_model

pytestmark = pytest.mark.slow

PROMPTS = [[5, 6, 7], [8], [9, 3, 4, 5, 6]]
CONTINUATIONS = [Continuation([5, 6, 7], [8, 9]), Continuation([3], [4, 5, 6])]

WORKER = """
import sys
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
# Imported afterwards, since importing the tests makes a mesh.
import json, pathlib
from moe_train import config
from moe_train.machine.mesh import make_mesh
from tests.integration.test_generation_processes import answers
pathlib.Path(sys.argv[3]).write_text(json.dumps(answers(make_mesh(config.Mesh(fsdp=2, expert=2)))))
"""


def answers(mesh: jax.sharding.Mesh) -> list[object]:
    """What a tiny model generates, greedily and by draws, and the likelihoods that it computes."""
    with jax.set_mesh(mesh):
        structure, weights = random_model(MIXTRAL)
        generator = Generator(combine(structure, weights), MIXTRAL, mesh, max_rows=4)
        greedy = [completion.tokens for completion in generator.generate(PROMPTS, Sampling(12))]
        drawn = [completion.tokens for completion in generator.generate(PROMPTS, Sampling(12, temperature=1.0, top_k=5))]
        likelihoods = log_likelihoods(structure, weights, mesh, CONTINUATIONS, 2)
        scored = scored_continuations(structure, weights, mesh, CONTINUATIONS, 2)
    return [greedy, drawn, [round(value, 3) for value in likelihoods], [one.is_greedy for one in scored]]


def test_both_processes_have_the_answers_of_one_device(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    files = [tmp_path / f"{index}.json" for index in range(2)]
    commands = [[sys.executable, "-c", WORKER, str(port), str(index), str(file)] for index, file in enumerate(files)]
    processes = [subprocess.Popen(command, env=env) for command in commands]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    expected = answers(make_mesh(config.Mesh(), jax.devices()[:1]))
    assert [json.loads(file.read_text()) for file in files] == [expected, expected]
