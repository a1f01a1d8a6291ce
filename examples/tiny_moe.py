"""Train a tiny Mixture-of-Experts transformer on bytes: python examples/tiny_moe.py"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import moe_train
from moe_train import config

MODEL = config.Model(
    family="mixtral",
    vocab_size=256,
    model_dim=32,
    num_layers=2,
    max_seq_len=64,
    attention=config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    ffn=config.MoeFfn(name="moe", ffn_dim=64, num_experts=4, experts_per_token=2),
)


def loss(model: moe_train.Transformer, tokens_BT: jax.Array) -> jax.Array:
    hidden_BTD, routers = model(tokens_BT[:, :-1])
    logprobs_BTV = jax.nn.log_softmax(model.logits(hidden_BTD))
    target_logprobs = jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1)
    return -target_logprobs.mean() + 0.01 * routers.load_balance_loss.mean()


@jax.jit
def step(model: moe_train.Transformer, opt_state: optax.OptState, tokens_BT: jax.Array) -> tuple:
    value, gradients = jax.value_and_grad(loss)(model, tokens_BT)
    updates, opt_state = optimizer.update(gradients, opt_state, model)
    return optax.apply_updates(model, updates), opt_state, value


text = np.frombuffer(Path("LICENSE").read_bytes(), np.uint8).astype(np.int32)
random = np.random.default_rng(0)
model = moe_train.init_model(0, MODEL)
optimizer = optax.adamw(3e-3)
opt_state = optimizer.init(model)
for i in range(1, 101):
    starts = random.integers(0, len(text) - 65, 8)
    model, opt_state, value = step(model, opt_state, np.stack([text[start : start + 65] for start in starts]))
    if i % 20 == 0:
        print(f"step {i}: loss {value:.3f}")
