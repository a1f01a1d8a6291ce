"""Train a run with a loss of one's own, the focal loss (arXiv:1708.02002): python examples/own_loss.py [RUN_DIR]"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import moe_train


def focal(model: moe_train.Transformer, batch, key) -> tuple:
    """Weigh the cross-entropy of each token by (1 - p)^2, so that tokens which the model knows already count less."""
    hidden_BTD, routers = model(batch.tokens, batch.positions, batch.segment_ids, key)
    logprobs_BTV = jax.nn.log_softmax(model.logits(hidden_BTD))
    logprob_BT = jnp.take_along_axis(logprobs_BTV, batch.targets[..., None], axis=-1)[..., 0]
    focal_BT = -((1 - jnp.exp(logprob_BT)) ** 2) * logprob_BT
    count = batch.loss_mask.sum()
    confidence = moe_train.Mean(jnp.sum(jnp.exp(logprob_BT) * batch.loss_mask), count)
    return jnp.sum(focal_BT * batch.loss_mask), count, {"confidence": confidence}, routers


run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/examples/own_loss"
tokenizer = Path(run_dir).parent / "tokenizer"
if not tokenizer.exists():
    moe_train.train_tokenizer(Path("LICENSE").read_text().splitlines(), 384, tokenizer)
overrides = [f"run_dir={run_dir}", f"data.tokenizer.path={tokenizer}"]
run = moe_train.resolve(moe_train.load_config("examples/tiny.yaml", overrides))
for metrics in moe_train.steps(run, moe_train.custom_objective(focal)):
    print(f"step {metrics['step']}: loss {metrics['loss']:.3f}, confidence {metrics['confidence']:.3f}")
