"""Every section of a run's configuration, and every check that needs no hardware.

One YAML file holds one complete run. A choice between kinds is a tagged union (`optimizer: {name: adamw, …}`);
a default is written once, here. Nothing in this file imports jax, so that `--help` and editors are quick.
`config_file` turns YAML and `key.path=value` overrides into a `Config`, and its errors into one line each.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _integral(value: object) -> object:
    """`1e9` is a float to YAML; where a whole number is asked for, a float without a fraction is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(value: str) -> str:
    """A URL would become a folder of that name."""
    if "://" in value:
        raise ValueError(
            "a URL where a path is needed; name a path of this machine, or of a file system (NFS, Lustre, a mounted bucket) "
            "that all hosts share. Only prepared data are read from buckets: {name: prepared, path: …}"
        )
    return value


LocalPath = Annotated[str, AfterValidator(_path)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_integral)]
NonNegative = Annotated[int, Field(ge=0), BeforeValidator(_integral)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the configuration: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# --- model -----------------------------------------------------------------------------------------------------


class DefaultRope(Section):
    """Rotary positions, arXiv:2104.09864: angle = position * theta ** (-2i / head_dim), half-split order."""

    name: Literal["default"]
    theta: PositiveFloat = 1e6


class YarnRope(Section):
    """YaRN, arXiv:2309.00071: low frequencies interpolated by `factor`, high ones kept, a ramp between."""

    name: Literal["yarn"]
    theta: PositiveFloat = 1e6
    factor: PositiveFloat
    original_max_seq_len: Positive
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 1.0


Rope = Annotated[DefaultRope | YarnRope, Field(discriminator="name")]


class QueryScaling(Section):
    """Llama-4 query scaling: q *= 1 + beta * log(1 + floor(position / original_max_seq_len))."""

    beta: PositiveFloat
    original_max_seq_len: Positive


class Attention(Section):
    """Grouped-query attention. `windows` is one period of layers: null sees everything before it, a number W
    sees the last W positions (itself included); layer i takes entry i modulo the period."""

    name: Literal["gqa"] = "gqa"
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    windows: Annotated[tuple[Positive | None, ...], Field(min_length=1)] = (None,)
    query_scaling: QueryScaling | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs; use an even head_dim")
        return self


class DenseFfn(Section):
    """SwiGLU: down(silu(gate(x)) * up(x)), arXiv:2002.05202."""

    name: Literal["dense"]
    ffn_dim: Positive


class SoftmaxRouter(Section):
    """Weights are the softmax over the logits of the chosen experts (Mixtral, arXiv:2401.04088).

    bias: of each expert, added to its probability where experts are chosen and nowhere else; not learned, but moved after
    each step towards an even load, by `loss.bias_update_rate` (arXiv:2408.15664).
    """

    name: Literal["softmax"]
    bias: bool = False


class SigmoidRouter(Section):
    """Weights are the sigmoids of the chosen experts' logits, divided by their sum, times `scale` (DeepSeek-V3,
    arXiv:2412.19437, eq. 12 to 16). bias: as a softmax router's, added to the sigmoid.

    num_groups, groups_per_token: the experts stand in groups, one after the other, and a token chooses among those of the
    groups whose two best (biases included) sum to most (section 2.1.2 there).
    """

    name: Literal["sigmoid"]
    bias: bool = False
    scale: PositiveFloat = 1.0
    num_groups: Positive = 1
    groups_per_token: Positive = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.groups_per_token > self.num_groups:
            raise ValueError(f"groups_per_token {self.groups_per_token} exceeds num_groups {self.num_groups}")
        if self.groups_per_token == self.num_groups > 1:
            raise ValueError(f"groups_per_token {self.groups_per_token} is all of num_groups, which limits nothing; leave both out")
        return self


Router = Annotated[SoftmaxRouter | SigmoidRouter, Field(discriminator="name")]


class MoeFfn(Section):
    """Sparse SwiGLU experts of width ffn_dim, `experts_per_token` of them chosen by a router. Beside them stand
    `num_shared_experts` that every token takes (DeepSeekMoE, arXiv:2401.06066): together one dense SwiGLU, as wide as they."""

    name: Literal["moe"]
    ffn_dim: Positive
    num_experts: Positive
    experts_per_token: Positive
    router: Router = SoftmaxRouter(name="softmax")
    num_shared_experts: NonNegative = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}")
        if isinstance(self.router, SigmoidRouter) and self.router.num_groups > 1:
            G, size = self.router.num_groups, self.num_experts // self.router.num_groups
            if self.num_experts % G or size < 2:
                raise ValueError(f"router.num_groups {G} does not divide num_experts {self.num_experts} into groups of two or more")
            if (within := self.router.groups_per_token * size) < self.experts_per_token:
                raise ValueError(f"experts_per_token {self.experts_per_token} exceeds the {within} experts of a token's groups")
        return self


Ffn = Annotated[DenseFfn | MoeFfn, Field(discriminator="name")]


class Model(Section):
    """A transformer's architecture. Sizes by their letters: vocab_size V, model_dim D, ffn_dim F, head_dim H."""

    family: Literal["mistral", "mixtral", "ministral", "ministral3", "llama"]
    vocab_size: Positive
    model_dim: Positive
    num_layers: Positive
    attention: Attention
    ffn: Ffn
    rope: Rope = DefaultRope(name="default")
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    max_seq_len: Positive = 32768
    init_stddev: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _check(self) -> Self:
        period = len(self.attention.windows)
        if self.num_layers % period:
            raise ValueError(f"num_layers {self.num_layers} is not a multiple of the {period} attention.windows")
        if (self.family == "mixtral") != isinstance(self.ffn, MoeFfn):
            raise ValueError(f"family {self.family} does not have a {self.ffn.name} ffn; only mixtral has, and needs, moe")
        wants_yarn = self.family == "ministral3"
        if isinstance(self.rope, YarnRope) and not wants_yarn:
            raise ValueError(f"family {self.family} has no yarn rope; only ministral3 has")
        if self.attention.query_scaling and not wants_yarn:
            raise ValueError(f"family {self.family} has no attention.query_scaling; only ministral3 has")
        if len(set(self.attention.windows)) > 1 and self.family != "ministral":
            raise ValueError(f"family {self.family} has one window for all layers; interleaved windows are ministral's")
        if len({w for w in self.attention.windows if w is not None}) > 1:
            raise ValueError(f"attention.windows {list(self.attention.windows)} has several sizes; the family's layers share one")
        if isinstance(self.rope, YarnRope) and self.attention.query_scaling is not None:
            lengths = self.rope.original_max_seq_len, self.attention.query_scaling.original_max_seq_len
            if lengths[0] != lengths[1]:
                raise ValueError(f"original_max_seq_len is {lengths[0]} in rope, {lengths[1]} in query_scaling; they are the same")
        if self.family == "llama" and self.attention.windows != (None,):
            raise ValueError("family llama has no attention window; leave attention.windows out")
        return self


def without_format(model: Model) -> str | None:
    """What a model has that no file format of its family has a place for; None for one that can be exported."""
    if not isinstance(model.ffn, MoeFfn):
        return None
    router, shared = model.ffn.router, model.ffn.num_shared_experts
    has = {f"a {router.name} router": router.name != "softmax", "a router bias": router.bias, "shared experts": shared > 0}
    return " and ".join(what for what, is_there in has.items() if is_there) or None


# --- adapters --------------------------------------------------------------------------------------------------


NAMED_IN_FULL = ("ffn.router", "embed", "head")
"""Modules that no pattern with a wildcard reaches: the router stays frozen unless it is named, as do both ends."""


class LoraTarget(Section):
    """Modules that get an adapter. `modules` are patterns over module paths inside a layer (`attention.*`,
    `ffn.gate_proj`, `*.down_proj`), or the names `ffn.router`, `embed` and `head`; the update is
    alpha / rank * B·A (arXiv:2106.09685). `experts`: of routed experts these alone; others may be another target's."""

    modules: Annotated[tuple[str, ...], Field(min_length=1)]
    rank: Positive
    alpha: PositiveFloat
    experts: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts is not None and len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts {list(self.experts)} names one twice")
        return self


class Nf4(Section):
    """4-bit NormalFloat of QLoRA (arXiv:2305.14314): each block of `block_size` weights is its largest magnitude times
    one of 16 levels; 4 bits a weight, and a scale of the weight's own dtype a block."""

    name: Literal["nf4"]
    block_size: Annotated[Positive, Field(multiple_of=4)] = 64


class Int8(Section):
    """Whole numbers from -127 to 127 times a scale for each block of `block_size` weights."""

    name: Literal["int8"]
    block_size: Annotated[Positive, Field(ge=2)] = 64


class Lora(Section):
    """Low-rank adapters; everything else is frozen, and where `quantize` is set, its linear maps (attention, FFN,
    experts) are held in few bits.

    rslora: alpha / sqrt(rank) in place of alpha / rank (arXiv:2312.03732). dropout: of the adapters' inputs in training.
    train: patterns of modules that are trained in full beside the adapters (`*_norm`, `ffn.router`, `embed`, `head`, …).
    init_from: an adapter to start from; `targets` and `train` are then its own where they are left out.
    """

    targets: tuple[LoraTarget, ...] = ()
    rslora: bool = False
    dropout: Decay = 0.0
    train: tuple[str, ...] = ()
    init_from: LocalPath | None = None
    quantize: Annotated[Nf4 | Int8, Field(discriminator="name")] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets and self.init_from is None:
            raise ValueError("lora has no targets; state at least one, or init_from (an adapter to start from)")
        return self

    @property
    def trains_router(self) -> bool:
        return "ffn.router" in (*self.train, *(name for target in self.targets for name in target.modules))

    def scale(self, target: LoraTarget) -> float:
        """What the product of a target's A and B is multiplied with."""
        return target.alpha / (target.rank**0.5 if self.rslora else target.rank)


# --- data ------------------------------------------------------------------------------------------------------


class HuggingFaceTokenizer(Section):
    """A directory with `tokenizer.json` (and `tokenizer_config.json`, `chat_template.jinja`), or that file."""

    name: Literal["huggingface"]
    path: LocalPath


class MistralTokenizer(Section):
    """A `tekken.json` or a sentencepiece `tokenizer.model.v*`, read by mistral-common."""

    name: Literal["mistral"]
    path: LocalPath


Tokenizer = Annotated[HuggingFaceTokenizer | MistralTokenizer, Field(discriminator="name")]


class TextRecord(Section):
    """Plain text; every token bears loss. A record longer than the sequence is split, dropped or an error."""

    name: Literal["text"]
    column: str = "text"
    too_long: Literal["split", "drop", "error"] = "split"


class ChatRecord(Section):
    """A list of messages (`role`, `content`) rendered by the chat template; the assistant's tokens bear loss.

    `interactions` and ShareGPT's `conversations` are found where `messages` is not; other spellings by `role` and
    `content` (the keys of a message) and `roles` (theirs -> system, user, assistant, tool).
    """

    name: Literal["chat"]
    column: str = "messages"
    role: str = "role"
    content: str = "content"
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    too_long: Literal["truncate", "drop", "error"] = "error"


class CompletionRecord(Section):
    """A prompt and its completion, rendered as one user and one assistant turn of the chat template."""

    name: Literal["completion"]
    prompt: str = "prompt"
    completion: str = "completion"
    too_long: Literal["truncate", "drop", "error"] = "error"


Record = Annotated[TextRecord | ChatRecord | CompletionRecord, Field(discriminator="name")]


class FileSource(Section):
    """Local files: paths, folders or globs, relative to the working directory. `licence` and `origin` go on record."""

    name: Literal["files"]
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    format: Literal["auto", "text", "json", "csv", "parquet", "arrow"] = "auto"
    record: Record
    weight: PositiveFloat = 1.0
    licence: str | None = None
    origin: str | None = None


class HubSource(Section):
    """A data set of the Hugging Face hub; the only setting that lets training data come over the network."""

    name: Literal["hub"]
    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str
    record: Record
    weight: PositiveFloat = 1.0
    licence: str | None = None
    origin: str | None = None


class PreparedSource(Section):
    """What `moe-train data prepare` made: a folder with manifest.json, here or in a bucket (`gs://…`).

    too_long is the prepared record's where it is not stated. Of a bucket, parts of files are read as they are needed,
    and the last `cache_mib` of them stay in memory.
    """

    name: Literal["prepared"]
    path: str
    too_long: Literal["split", "truncate", "drop", "error"] | None = None
    weight: PositiveFloat = 1.0
    cache_mib: Positive = 1024


RecordSource = FileSource | HubSource
Source = Annotated[RecordSource | PreparedSource, Field(discriminator="name")]


class BestFit(Section):
    """Longest record first (by a length that is off by a random tenth), each into the fullest row that has room for it."""

    name: Literal["best_fit"]


class FirstFit(Section):
    """In random order, each record into the first row that has room for it: long and short ones mix, rows are less full."""

    name: Literal["first_fit"]


Packing = Annotated[BestFit | FirstFit, Field(discriminator="name")]


class Data(Section):
    """What is trained on and evaluated on. `tokenizer` may be left out where `init_from` carries one.

    The share of a source in the rows of training, and so in its tokens, is its weight over the sum of weights.
    shuffle_tokens: records are shuffled within windows of about that many tokens, which come in random order (null: over
    all); for a bucket, choose what fits its `cache_mib` twice.
    """

    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    eval: tuple[Source, ...] = ()
    packing: Packing = BestFit(name="best_fit")
    shuffle_tokens: Positive | None = None
    cache_dir: LocalPath = "runs/cache"
    num_proc: Positive = 1
    prefetch: Positive = 2


# --- optimisation ----------------------------------------------------------------------------------------------


class ConstantSchedule(Section):
    name: Literal["constant"]
    warmup_steps: NonNegative = 0


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak at the last step."""

    name: Literal["cosine"]
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = 0.1


class LinearSchedule(Section):
    """Linear warm-up, then a line down to `final_fraction` of the peak at the last step."""

    name: Literal["linear"]
    warmup_steps: NonNegative = 0
    final_fraction: Fraction = 0.0


class WsdSchedule(Section):
    """Warm-up, stable, decay (arXiv:2404.06395): the last `decay_steps` fall on a line to `final_fraction`."""

    name: Literal["wsd"]
    warmup_steps: NonNegative = 0
    decay_steps: Positive
    final_fraction: Fraction = 0.0


Schedule = Annotated[ConstantSchedule | CosineSchedule | LinearSchedule | WsdSchedule, Field(discriminator="name")]


class _OptimizerBase(Section):
    learning_rate: PositiveFloat
    schedule: Schedule = ConstantSchedule(name="constant")
    weight_decay: NonNegativeFloat = 0.0
    no_decay: tuple[Literal["norms", "biases", "router", "embeddings"], ...] = ("norms", "biases")
    max_grad_norm: PositiveFloat | None = 1.0


class AdamW(_OptimizerBase):
    """Adam with decoupled weight decay, arXiv:1711.05101."""

    name: Literal["adamw"]
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: PositiveFloat = 1e-8


class Lion(_OptimizerBase):
    """Sign of an interpolated momentum, arXiv:2302.06675."""

    name: Literal["lion"]
    b1: Decay = 0.9
    b2: Decay = 0.99


class Adafactor(_OptimizerBase):
    """Factored second moments, arXiv:1804.04235."""

    name: Literal["adafactor"]
    decay_rate: Decay = 0.8
    min_dim_size_to_factor: Positive = 128


class Muon(_OptimizerBase):
    """Orthogonalised momentum for the matrices of attention and (expert) FFN, chosen by name; AdamW for
    embeddings, head, router and norms with `adamw_learning_rate` (https://kellerjordan.github.io/posts/muon)."""

    name: Literal["muon"]
    momentum: Decay = 0.95
    ns_steps: Positive = 5
    nesterov: bool = True
    adamw_learning_rate: PositiveFloat
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: PositiveFloat = 1e-8


Optimizer = Annotated[AdamW | Lion | Adafactor | Muon, Field(discriminator="name")]


class Loss(Section):
    """How routers are kept balanced: coefficients of their two losses, per layer, which full training of a sparse model
    must state; and by how much a step moves the bias of a router that has one, up for an expert with less than the mean
    load of the step, down for one with more (0.001 is DeepSeek-V3's)."""

    load_balance_loss_coef: NonNegativeFloat | None = None
    router_z_loss_coef: NonNegativeFloat | None = None
    bias_update_rate: NonNegativeFloat | None = None


class Train(Section):
    """Length and shape of the optimisation. Exactly one of `steps`, `epochs`, `tokens` sets the length.

    batch_size is the number of sequences in an optimizer step over all devices; microbatches splits it.
    capacity_factor limits an expert to capacity_factor * T * A / E assignments of a sequence of T tokens, in training
    alone; what is beyond is dropped, earlier tokens first served (null: nothing is dropped). The run stops where a layer
    drops more than max_drop_rate of its assignments in a step.
    """

    steps: Annotated[Positive, Field(le=100_000_000)] | None = None
    epochs: Positive | None = None
    tokens: Positive | None = None
    batch_size: Positive
    seq_len: Positive
    microbatches: Positive = 1
    max_skipped_steps: NonNegative = 3
    capacity_factor: PositiveFloat | None = None
    max_drop_rate: Fraction | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [k for k in ("steps", "epochs", "tokens") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"the length of a run is exactly one of steps, epochs, tokens; here: {', '.join(given) or 'none'}")
        if self.batch_size % self.microbatches:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of microbatches {self.microbatches}")
        if self.capacity_factor is not None and self.max_drop_rate is None:
            raise ValueError("state max_drop_rate where there is a capacity_factor (0.1 stops at a tenth dropped; 1 never stops)")
        if self.capacity_factor is None and self.max_drop_rate is not None:
            raise ValueError("max_drop_rate has no effect without a capacity_factor: nothing is dropped; leave it out")
        if self.tokens is not None and self.tokens < self.batch_size * self.seq_len:
            raise ValueError(f"tokens {self.tokens} is less than one step of {self.batch_size * self.seq_len}")
        return self


# --- the machine -----------------------------------------------------------------------------------------------


class Compute(Section):
    """Number formats, rematerialisation and kernels; `auto` takes the fast path of the platform.

    remat says what a layer keeps for its backward pass: `minimal` recomputes only what is cheap (norms, rotary
    positions, activations, gathered weights) and keeps the outputs of matrix products; `full` keeps the layer's
    input alone. transport is how tokens meet their experts along the mesh axis `expert`: every device sees all tokens
    (all_gather), or they are sent to where they go (all_to_all and, not on CPUs, ragged_all_to_all, which recompute
    experts whatever remat says).
    """

    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    remat: Literal["minimal", "full"] = "minimal"
    attention: Literal["auto", "reference", "blocked", "splash", "cudnn"] = "auto"
    transport: Literal["auto", "all_gather", "all_to_all", "ragged_all_to_all"] = "auto"
    grouped_matmul: Literal["auto", "reference", "blocked", "megablox", "ragged_dot"] = "auto"


AxisSize = Annotated[int, BeforeValidator(_integral)]


class Mesh(Section):
    """Devices along each axis; one axis may be -1: the devices that the others leave.

    data splits the batch between replicas of the model; fsdp and expert split it too, and the weights; context splits
    sequences, for long ones; tensor splits heads, ffn_dim and the vocabulary.
    """

    data: AxisSize = 1
    fsdp: AxisSize = 1
    expert: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        sizes = {k: getattr(self, k) for k in type(self).model_fields}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} is {size}; use a positive number, or -1 for the rest of the devices")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis can be -1 (the rest of the devices)")
        return self


# --- the run ---------------------------------------------------------------------------------------------------


class Evaluation(Section):
    """Held-out loss on `data.eval`: every `every_steps` and at the end, on `batches` batches (null: all).

    drift_batches: on how many of them the routing of a model with adapters is compared with that of its base, which takes
    a second forward pass (null: 4 where there are adapters and routers; 0: none).
    """

    every_steps: Positive = 100
    batches: Positive | None = None
    drift_batches: NonNegative | None = None


class Checkpoint(Section):
    """When the run's state is saved, and how many saves stay: the last `keep_last`, plus the best held-out loss."""

    every_steps: Positive = 100
    every_minutes: PositiveFloat | None = 30.0
    keep_last: Positive = 2
    keep_best: bool = True


class Metrics(Section):
    """Where figures go besides the terminal and `metrics.jsonl`."""

    every_steps: Positive = 1
    tensorboard: bool = True


class Config(Section):
    """One complete run. export: none lets an architecture train that no file format has words for."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: LocalPath
    seed: NonNegative = 0
    init_from: LocalPath | None = None
    model: Model | None = None
    lora: Lora | None = None
    data: Data | None = None
    train: Train
    optimizer: Optimizer
    loss: Loss = Loss()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    export: Literal["all", "none"] = "all"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model is None and self.init_from is None:
            raise ValueError("state model (an architecture, trained from random weights) or init_from (a checkpoint)")
        if self.model is not None:
            check_model(self, self.model)
        check_batch(self)
        if self.compute.attention == "cudnn" and self.compute.dtype == "float32":
            raise ValueError("compute.attention cudnn takes 16-bit numbers; set compute.dtype to bfloat16, or attention to auto")
        return self


def check_batch(config: Config) -> None:
    """Raise ValueError where a microbatch, or a sequence, does not divide over the mesh."""
    mesh, train = config.mesh, config.train
    replicas = mesh.data * mesh.fsdp * mesh.expert
    per_microbatch = train.batch_size // train.microbatches
    if replicas > 0 and per_microbatch % replicas:
        raise ValueError(
            f"batch_size {train.batch_size} / microbatches {train.microbatches} = {per_microbatch} sequences do not divide "
            f"over mesh data x fsdp x expert = {replicas}; use a multiple of {replicas * train.microbatches}"
        )
    chunks = 1 if mesh.context == 1 else 2 * mesh.context  # two for each device, so that all have as much to attend to
    if mesh.context > 0 and train.seq_len % chunks:
        down = train.seq_len // chunks * chunks
        raise ValueError(
            f"train.seq_len {train.seq_len} does not divide into two chunks for each of mesh.context {mesh.context}; "
            f"use a multiple of {chunks}: {f'{down} or ' if down else ''}{down + chunks}"
        )
    if mesh.context > 0 and config.compute.attention == "splash" and train.seq_len % (128 * chunks):
        raise ValueError(
            f"compute.attention splash wants a train.seq_len of whole {128 * chunks}s"
            f"{'' if chunks == 1 else f' on mesh.context {mesh.context}'}, not {train.seq_len}; use auto"
        )


def check_model(config: Config, model: Model) -> None:
    """Raise ValueError where `model` (stated, or read from `init_from`) does not go with the rest of `config`."""
    mesh, loss, attention = config.mesh, config.loss, model.attention
    _divides(mesh.fsdp, "fsdp", model.model_dim, "model_dim")
    _divides(mesh.tensor, "tensor", attention.num_kv_heads, "num_kv_heads")
    _divides(mesh.tensor, "tensor", model.ffn.ffn_dim, "ffn_dim")
    _divides(mesh.tensor, "tensor", model.vocab_size, "vocab_size")
    if config.train.seq_len > model.max_seq_len:
        raise ValueError(f"train.seq_len {config.train.seq_len} exceeds the model's max_seq_len {model.max_seq_len}")
    if config.evaluation.drift_batches and (config.lora is None or not isinstance(model.ffn, MoeFfn)):
        raise ValueError("evaluation.drift_batches compares the routing of adapters with their base's; here is none: leave it out")
    if config.compute.transport != "auto" and mesh.expert == 1:
        raise ValueError(f"compute.transport {config.compute.transport} has no effect where mesh.expert is 1; leave it out")
    if (has := without_format(model)) and config.export != "none":
        raise ValueError(f"no file format has a place for {has} of family {model.family}; set export: none to train it anyway")
    if not has and config.export == "none":
        raise ValueError(f"export: none has no effect on family {model.family}, which has its formats; leave it out")
    coefs = {"load_balance_loss_coef": loss.load_balance_loss_coef, "router_z_loss_coef": loss.router_z_loss_coef}
    if isinstance(model.ffn, MoeFfn):
        _divides(mesh.expert, "expert", model.ffn.num_experts, "num_experts")
        if (config.lora is None or config.lora.trains_router) and None in coefs.values():
            missing = ", ".join(f"loss.{k}" for k, v in coefs.items() if v is None)
            raise ValueError(f"state {missing} where routers are trained (0.01 and 0.001 are usual; 0 is off)")
        moves = model.ffn.router.bias and (config.lora is None or "ffn.router" in config.lora.train)
        if moves and loss.bias_update_rate is None:
            raise ValueError("state loss.bias_update_rate where routers have a bias (0.001 is usual; 0 is off)")
        if not moves and loss.bias_update_rate is not None:
            why = "is frozen" if model.ffn.router.bias else "is not there (model.ffn.router.bias)"
            raise ValueError(f"loss.bias_update_rate has no effect: the routers' bias {why}; leave it out")
    else:
        if mesh.expert != 1:
            raise ValueError(f"mesh.expert is {mesh.expert}, but a {model.family} model has no experts; use fsdp or data")
        if config.train.capacity_factor is not None:
            raise ValueError("train.capacity_factor is of experts, but the model has none; leave it out")
        if any(coefs.values()) or loss.bias_update_rate is not None:
            raise ValueError("loss has router coefficients, but the model has no router; leave them out")


def _divides(size: int, axis: str, dim: int, name: str) -> None:
    if size > 0 and dim % size:
        nearest = next(n for n in range(size, 0, -1) if dim % n == 0)
        raise ValueError(f"mesh.{axis} {size} does not divide {name} {dim}; use {nearest}")
