"""The form of a table of names: rows of tensors, and the rows of one layout of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

from moe_train import config


class Row(NamedTuple):
    """A tensor of a file and our parameter.

    Letters of dims: V vocabulary, D model_dim, N heads, K kv heads, H dims of a query, F ffn_dim, E experts, S width of the shared
    experts, Y scores of a classifier, J rank of an adapter; H may be written as its halves, Z = 2 and P = H / 2. Of latent
    attention: Q and R ranks of the two latents, C = R and the rotary dims, W dims of a value, U = dims of a key without the rotary
    ones and of a value. Adjacent letters form one dim.
    """

    name: str
    """Name in the file, without the layer's prefix if it belongs to a layer."""
    file_dims: str
    """Dims of the file's tensor, by letter."""
    path: str
    """Path of our parameter."""
    internal_dims: str
    """Dims of our parameter, by letter."""
    stack: Literal["", "experts", "gate of gate_up", "up of gate_up"] = ""
    """What else the file's tensor contains: all experts, (E, dims); or gate stacked on up for all experts, (E, 2F, D)."""


@dataclass(frozen=True)
class TensorLayout:
    """How files of one kind name the tensors of a model."""

    file_format: config.FileFormat
    embed: Row
    norm: Row
    head: Row
    layer: str
    """Prefix of the names of layer `{l}`."""
    norms: tuple[Row, Row]
    """Norms of the inputs of attention and of the feed-forward part."""
    grouped_query: tuple[Row, ...]
    latent: tuple[Row, ...]
    """Rows of latent attention, those with a latent of queries and the one without."""
    dense: tuple[Row, ...]
    router: Row
    router_bias: Row
    shared: tuple[Row, ...]
    """Rows of the shared experts, which are one SwiGLU of their summed width."""
    experts: tuple[Row, ...]
    """Rows of the experts; `{e}` stands for the expert's index if each expert has tensors of its own."""
    adapters: tuple[str, str]
    """Names of A (rank, in) and B (out, rank) for `{stem}`, a weight's name without `.weight`."""
    adapters_of_embed: tuple[str, str] | None = None
    """The same for the embedding, A (rank, V) and B (D, rank); None if routers, embedding and head cannot have adapters."""
    scores: Row | None = None
    """A head for classification or rewards, in place of `head`; None if files of this kind cannot have one."""

    def attention_rows(self, attention: config.Attention) -> tuple[Row, ...]:
        """Return the rows of a layer's attention."""
        match attention:
            case config.GroupedQueryAttention():
                return self.grouped_query
            case config.MultiHeadLatentAttention():
                absent = DIRECT_QUERIES if attention.q_lora_rank is not None else LATENT_QUERIES
                return tuple(row for row in self.latent if row.path not in absent)
            case _:
                assert_never(attention)

    def rows_of_tokens(self, ffn: config.Ffn) -> tuple[Row, ...]:
        """Return the rows of a feed-forward part that every token uses, which excludes the routed experts."""
        match ffn:
            case config.DenseFfn():
                return self.dense
            case config.MoeFfn():
                bias = (self.router_bias,) if ffn.router.bias else ()
                return (self.router, *bias, *(self.shared if ffn.num_shared_experts else ()))
            case _:
                assert_never(ffn)


LATENT_QUERIES = ("attention.q_a_proj.weight", "attention.q_a_norm.scale", "attention.q_b_proj.weight")
"""Parameters of latent attention with a latent of queries."""
DIRECT_QUERIES = ("attention.q_proj.weight",)
"""Parameters of latent attention without one."""
