"""The transformer: embedding, stacks of layers, final norm, head.

A model is a list of stacks of layers (`stack.py`). `config.stacks` gives the stacks of a model: one if all layers are alike, two
if the first layers are dense.
`hidden, stats = model(tokens, positions, segment_ids)`; the loss applies `model.head_weight()`.

A model is passed around as a flat dict {path: array} (`parameters`, `combine`); `ParameterPath` gives the meaning of a path.
Layer i * period + j of stack s is entry i of `stacks.s.layers.j.…`. docs/how_it_works/architecture.md lists the letters of shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from moe_train import config
from moe_train.machine.mesh import use_default_mesh
from moe_train.model.attention.kinds import Cache, empty_cache
from moe_train.model.attention.places import TokenPlaces
from moe_train.model.attention.rope import Rotation, rotation
from moe_train.model.encoders.audio import Audio
from moe_train.model.encoders.media import Features, Media, write_features
from moe_train.model.encoders.vision import Vision
from moe_train.model.layers import Embedding, Head, Linear, RandomSource, RMSNorm
from moe_train.model.lora import adaptable, add_lora
from moe_train.model.moe.layer import ExpertLinear
from moe_train.model.moe.router import RouterStats
from moe_train.model.quantize import quantize_weights
from moe_train.model.sharding import fsdp
from moe_train.model.sharding.specs import place, plain_on_one_device
from moe_train.model.stack import Stack


class Transformer(nnx.Module):
    """A decoder-only transformer of the Mistral family, with a vision or audio tower if `encoder` is given."""

    def __init__(
        self,
        rngs: RandomSource,
        model: config.Model,
        compute: config.Compute,
        encoder: config.Encoder | None = None,
    ):
        dtype = jnp.dtype(compute.param_dtype)
        std = model.init_stddev
        self.embed = Embedding(rngs, model.vocab_size, model.model_dim, std, dtype)
        self.stacks = nnx.List([Stack(rngs, model, compute, stack) for stack in config.stacks(model)])
        self.final_norm = RMSNorm(model.model_dim, model.norm_eps, dtype)
        self.scores = model.scores is not None
        self.head = _head(rngs, model, dtype)
        # Last, so that the initial weights of the text model do not depend on it.
        self.vision = Vision(rngs, encoder, model.model_dim, compute) if isinstance(encoder, config.VisionEncoder) else None
        self.audio = Audio(rngs, encoder, model.model_dim, compute) if isinstance(encoder, config.AudioEncoder) else None
        self.dtype = jnp.dtype(compute.dtype)
        self.rope = model.rope
        self.rotated_dims = model.attention.rotated_dims

    def __call__(
        self,
        tokens_BT: Int[Array | np.ndarray, "B T"],
        positions_BT: Int[Array | np.ndarray, "B T"] | None = None,
        segment_ids_BT: Int[Array | np.ndarray, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
        media: Media | None = None,
        features: Features | None = None,
        prompt_ids_BT: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Compute the hidden states after the final norm.

        The arrays may have any sharding. On a mesh of one device, the hidden states can be used like any JAX array; on other
        meshes they are sharded by B and T (see `model.sharding.specs`).

        Args:
            tokens_BT: token ids.
            positions_BT: positions, which restart in each segment that continues no prompt; None for 0, 1, 2, … in each row.
            segment_ids_BT: packed segments; 0 for padding. None if each row is one segment without padding.
            key: PRNG key for the dropout of the adapters; None for no dropout, as in evaluation.
            media: pictures or sound that tokens stand for; None without any. The model needs a tower for them.
            features: features that tokens stand for, computed before; None without any. They need no tower.
            prompt_ids_BT: id of the earlier segment of the row whose tokens a segment continues, and sees; its own id where it
                continues none. None if no segment continues another.

        Returns:
            The hidden states, and the statistics (L, …) of the routers in the order of the sparse layers (`config.sparse_layers`);
            None for a dense model.
        """
        tokens_BT = place(tokens_BT, "BT")
        if positions_BT is None:
            positions_BT = np.broadcast_to(np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape)
        if segment_ids_BT is None:
            segment_ids_BT = np.ones(tokens_BT.shape, np.int32)
        prompt_ids_BT = None if prompt_ids_BT is None else place(prompt_ids_BT, "BT")
        places = TokenPlaces(place(positions_BT, "BT"), place(segment_ids_BT, "BT"), prompt_ids_BT)
        rotation = self.rotation(places.positions_BT)
        x_BTD = self.embed(tokens_BT, self.dtype)
        if media is not None:
            # No key of a layer: those come from `split`.
            x_BTD = self.with_media(x_BTD, media, None if key is None else jax.random.fold_in(key, 0))
        if features is not None:
            placed = features.placed()
            x_BTD = write_features(x_BTD, placed.features_BMD, placed.feature_index_BT)
        # One key per repeat over all stacks, so that no two layers drop the same entries.
        keys = None if key is None else jax.random.split(key, sum(stack.repeats for stack in self.stacks))
        stats = []
        first = 0
        for stack in self.stacks:
            stack_keys = None if keys is None else keys[first : first + stack.repeats]
            x_BTD, stack_stats = stack(x_BTD, places, rotation, stack_keys)
            if stack_stats is not None:
                stats.append(stack_stats)
            first += stack.repeats
        return plain_on_one_device(self.final_norm(x_BTD)), _concatenate(stats)

    def rotation(self, positions_BT: Int[Array, "B T"]) -> Rotation:
        """Return the rotation of queries and keys by their positions, which all layers share."""
        return rotation(positions_BT, self.rope, self.rotated_dims)

    def with_media(self, x_BTD: Float[Array, "B T D"], media: Media, key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Return embeddings in which the tokens that stand for pictures or sound have the features of these.

        Args:
            x_BTD: embeddings.
            media: pictures or sound.
            key: PRNG key for the dropout of the tower's adapters; None for no dropout.
        """
        placed = media.placed()
        return write_features(x_BTD, self.media_features(placed, key), placed.feature_index_BT)

    def media_features(self, media: Media, key: Key[Array, ""] | None = None) -> Float[Array, "B M D"]:
        """Return the features of the pictures or the sound of each row, for arrays with the shardings of activations.

        Args:
            media: pictures or sound.
            key: PRNG key for the dropout of the tower's adapters; None for no dropout.

        Raises:
            ValueError: the model has no tower for them.
        """
        if media.units.ndim == 4:
            if self.audio is None:
                raise ValueError("the model has no audio tower, so it takes no sound; build it with an encoder")
            return self.audio(media, key)
        if self.vision is None:
            raise ValueError("the model has no vision tower, so it takes no pictures; build it with an encoder")
        return self.vision(media, key)

    def head_weight(self) -> Float[Array, "V D"]:
        """Return the output matrix; with tied embeddings it is the embedding table."""
        return self.embed.weight[...] if self.head is None else self.head.weight[...]

    def head_lora_factors(
        self, hidden_BTD: Float[Array, "B T D"], key: Key[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T J"], Float[Array, "V J"]] | None:
        """Return the two factors whose product is the LoRA delta of the logits; None if the head has no adapter."""
        return None if self.head is None else self.head.lora_factors(hidden_BTD, key)

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Compute float32 logits of all positions at once; the built-in objectives compute them chunk by chunk instead.

        On a mesh of one device, the logits can be used like any JAX array. A model with a head for scores has those in their place.
        """
        if self.scores:
            # Another letter than V, since scores are not split over `tensor`. So few outputs cost nothing in float32.
            return plain_on_one_device(fsdp.project("BTD,CD->BTC", hidden_BTD.astype(jnp.float32), self.head_weight()))
        logits_BTV = fsdp.project("BTD,VD->BTV", hidden_BTD, self.head_weight())
        if beside := self.head_lora_factors(hidden_BTD):
            logits_BTV += fsdp.project("BTJ,VJ->BTV", *beside)
        return plain_on_one_device(logits_BTV.astype(jnp.float32))

    def decode(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        caches: Sequence[Sequence[Cache]],
        features: Features | None = None,
    ) -> tuple[Float[Array, "B T D"], Sequence[Sequence[Cache]]]:
        """Compute the hidden states of T further tokens of each sequence, after the final norm.

        Args:
            tokens_BT: token ids.
            positions_BT: positions in the sequences; -1 for padding.
            caches: caches as from `empty_caches`.
            features: features of pictures or sound that tokens stand for; None without any.

        Returns:
            The hidden states, of which `logits` makes logits, and the extended caches.
        """
        x_BTD = self.embed(tokens_BT, self.dtype)
        if features is not None:
            x_BTD = write_features(x_BTD, *features)
        # Segment 0 keeps padding out of the routers; attention to a cache masks by position.
        places = TokenPlaces(positions_BT, (positions_BT >= 0).astype(jnp.int32))
        rotation = self.rotation(positions_BT)
        extended = []
        for stack, stack_caches in zip(self.stacks, caches, strict=True):
            x_BTD, new_caches = stack.decode(x_BTD, places, rotation, stack_caches)
            extended.append(new_caches)
        return self.final_norm(x_BTD), extended


def _concatenate(stats: list[RouterStats]) -> RouterStats | None:
    """Concatenate the statistics of the stacks into those of the model; None without routers."""
    if len(stats) < 2:
        return stats[0] if stats else None
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *stats)


def _head(rngs: RandomSource, model: config.Model, dtype: jnp.dtype) -> Head | None:
    """Return the head; None if it is tied to the embedding."""
    if model.scores is not None:
        return Head(rngs, model.scores.num_outputs, model.model_dim, model.init_stddev, dtype, split=False)
    if model.tie_embeddings:
        return None
    return Head(rngs, model.vocab_size, model.model_dim, model.init_stddev, dtype)


def init_model(
    seed: int,
    model: config.Model,
    compute: config.Compute = config.Compute(),  # noqa: B008 (immutable)
    lora: config.Lora | None = None,
    encoder: config.Encoder | None = None,
) -> Transformer:
    """Initialize a model with random weights, including adapters and quantized weights.

        model = moe_train.init_model(0, moe_train.load_config("configs/quickstart_pretrain.yaml").model)

    Each array is created with its sharding on the mesh in force; without one, a mesh of one device is put in force
    (`machine.mesh.use_default_mesh`).

    Args:
        seed: seed of the weights.
        model: model section of the config.
        compute: dtypes, kernels and rematerialization; by default float32.
        lora: adapters and quantization to add; None for full training.
        encoder: vision or audio tower and projector; None for a text model.

    Raises:
        ValueError: `lora` does not fit the model (see `add_lora` and `quantize_weights`).
    """
    use_default_mesh()
    return _build(nnx.Rngs(params=jax.random.key(seed)), model, compute, lora, encoder)


def abstract_model(
    model: config.Model,
    compute: config.Compute = config.Compute(),  # noqa: B008 (immutable)
    lora: config.Lora | None = None,
    encoder: config.Encoder | None = None,
) -> Transformer:
    """Return the model of `init_model` with a `jax.ShapeDtypeStruct` in place of each array, in a fraction of the time.

    The arguments and errors are those of `init_model`.
    """
    use_default_mesh()
    return jax.eval_shape(lambda: _build(None, model, compute, lora, encoder))


def _build(
    rngs: RandomSource,
    model: config.Model,
    compute: config.Compute,
    lora: config.Lora | None,
    encoder: config.Encoder | None,
) -> Transformer:
    transformer = Transformer(rngs, model, compute, encoder)
    if lora is not None:
        # Adapters come before quantization: they take shape and sharding from the weights, which are replaced then.
        add_lora(transformer, lora, rngs)
        if lora.quantize is not None:
            linear_maps = [
                (name, module)
                for name, module in adaptable(transformer)
                # A tower is small, and stays as it is.
                if isinstance(module, Linear | ExpertLinear)
                and not lora.trains_in_full(name)
                and not name.startswith(config.TOWERS)
            ]
            quantize_weights(linear_maps, lora.quantize)
    return transformer


def empty_caches(
    transformer: Transformer, model: config.Model, batch_size: int, max_len: int, dtype: jnp.dtype
) -> list[list[Cache]]:
    """Return caches for `batch_size` sequences of at most `max_len` tokens, in the form that `Transformer.decode` takes.

    There is a list for each stack of the transformer, with one cache for each layer of its period.
    """

    def stack_caches(stack: Stack) -> list[Cache]:
        return [empty_cache(model.attention, stack.repeats, batch_size, max_len, dtype) for _ in stack.layers]

    return [stack_caches(stack) for stack in transformer.stacks]
