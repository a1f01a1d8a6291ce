"""A small model's weights and random gradients, and the optimizers in plain numpy."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from moe_train import config
from moe_train.model.parameters import parameters
from moe_train.model.transformer import abstract_model
from tests.meshes import mesh_of

MODEL = config.Model(
    family="mixtral",
    vocab_size=32,
    model_dim=16,
    num_layers=2,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=24, num_experts=4, experts_per_token=2),
)
LORA = config.Lora(targets=(config.LoraTarget(modules=("*",), rank=2, alpha=4.0),))


@functools.cache
def shapes_of(lora: config.Lora | None) -> dict[str, jax.ShapeDtypeStruct]:
    """A small model's weights, stacked on layers and experts, with their specs."""
    with jax.set_mesh(mesh_of(config.Mesh(fsdp=2, expert=2, tensor=2))):
        return parameters(abstract_model(MODEL, config.Compute(), lora))[1]


def random_parameters(lora: config.Lora | None = None) -> dict[str, np.ndarray]:
    rng, shapes = np.random.default_rng(0), shapes_of(lora)
    return {path: rng.normal(size=x.shape).astype(np.float32) for path, x in shapes.items()}


def gradients(step: int, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step + 1)
    return {path: rng.normal(size=params[path].shape).astype(np.float32) for path in sorted(params)}


def clipped(grads: dict[str, np.ndarray], limit: float) -> dict[str, np.ndarray]:
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
    return {path: g.astype(np.float64) * min(1, limit / norm) for path, g in grads.items()}


def adam(m, v, g, t, b1, b2, eps):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return m, v, (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """https://kellerjordan.github.io/posts/muon, one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x / (np.linalg.norm(x) + 1e-8)
    y = y.T if x.shape[0] > x.shape[1] else y
    for _ in range(steps):
        s = y @ y.T
        y = a * y + (b * s + c * s @ s) @ y
    return y.T if x.shape[0] > x.shape[1] else y


def as_matrices(path: str, x: np.ndarray) -> np.ndarray:
    """(number of matrices, inputs, outputs): written out by hand for each kind of weight."""
    L, E, D, N, H, F = 2, 4, 16, x.shape[-2], 8, 24
    if path.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return x.reshape(L, D, N * H)
    if path.endswith("o_proj.weight"):
        return x.reshape(L, 4 * H, D)
    return x.reshape(L * E, *((F, D) if path.endswith("down_proj.weight") else (D, F)))


def is_matrix(path: str) -> bool:
    return ".attention." in path or (".ffn." in path and ".router." not in path)


def decays(path: str) -> bool:
    return "norm" not in path


def reference(section: config.Optimizer, params: dict[str, np.ndarray], steps: int = 3) -> dict[str, np.ndarray]:
    params = {path: x.astype(np.float64) for path, x in params.items()}
    m, v = ({path: np.zeros_like(x) for path, x in params.items()} for _ in range(2))
    for i in range(steps):
        grads = clipped(gradients(i, params), section.max_grad_norm)
        for path, g in grads.items():
            x, rate = params[path], section.learning_rate
            match section:
                case config.AdamW():
                    m[path], v[path], u = adam(m[path], v[path], g, i + 1, section.b1, section.b2, section.eps)
                case config.Lion():
                    u = np.sign(section.b1 * m[path] + (1 - section.b1) * g)
                    m[path] = section.b2 * m[path] + (1 - section.b2) * g
                case config.Muon() if is_matrix(path):
                    m[path] = section.momentum * m[path] + g
                    matrices = as_matrices(path, g + section.momentum * m[path])
                    scale = math.sqrt(max(1, matrices.shape[2] / matrices.shape[1]))
                    u = scale * np.stack([newton_schulz(one, section.ns_steps) for one in matrices]).reshape(g.shape)
                case config.Muon():
                    rate = section.adamw_learning_rate
                    m[path], v[path], u = adam(m[path], v[path], g, i + 1, section.b1, section.b2, section.eps)
            params[path] = x - rate * (u + section.weight_decay * x * decays(path))
    return params


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
