"""Compare which experts a model chooses for two kinds of text: python examples/router_statistics.py [MODEL]"""

import sys
from pathlib import Path

import jax
import numpy as np

import moe_train
from moe_train import config


def expert_loads(model: moe_train.Transformer, ids: list[int]) -> np.ndarray:
    """Return the share of routing choices of each expert in each sparse layer, (L, E)."""
    _, routers = jax.jit(lambda model, tokens_BT: model(tokens_BT))(model, np.array([ids], np.int32))
    return np.asarray(routers.load_E)


if len(sys.argv) > 1:
    model = moe_train.load_model(sys.argv[1])
    encode = moe_train.load_tokenizer(sys.argv[1]).encode
else:  # a random model on bytes, to try the program
    attention = config.GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
    experts = config.MoeFfn(name="moe", ffn_dim=64, num_experts=8, experts_per_token=2)
    sizes = {"vocab_size": 256, "model_dim": 32, "num_layers": 2, "max_seq_len": 512}
    model = moe_train.init_model(0, config.Model(family="mixtral", attention=attention, ffn=experts, **sizes))
    encode = lambda text: list(text.encode())  # noqa: E731

prose = expert_loads(model, encode(Path("LICENSE").read_text())[:500])
code = expert_loads(model, encode(Path(__file__).read_text())[:500])
for layer, (of_prose, of_code) in enumerate(zip(prose, code, strict=True)):
    distance = np.abs(of_prose - of_code).sum() / 2
    favourites = f"expert {of_prose.argmax()} for prose, {of_code.argmax()} for code"
    print(f"layer {layer}: most often {favourites}; {distance:.1%} of the choices differ between the two")
