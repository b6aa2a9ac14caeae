"""What the user said about a run: typed, validated, in a `Config` frozen. None of it is about the machine it runs on.

Field names follow RWKV-LM's scripts where they have a word for it (`n_embd`, `micro_bsz`, `lr_init`, ...) and
the field's standard term otherwise. Every field carries its description; docs/configuration.md is made from them.
Reading YAML and applying overrides lives in `rwkv_cluster.config.loader`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rwkv_cluster.config.launch import LaunchConfig
from rwkv_cluster.config.section import InvalidFields, Section, path_text
from rwkv_cluster.errors import ConfigError

__all__ = ["Config", "InvalidFields", "Section"]

ModelType = Literal["x052", "x060", "x070"]
Precision = Literal["fp32", "bf16", "fp16"]
WkvBackend = Literal["auto", "reference", "chunked", "native", "exact", "fla"]
Strategy = Literal[
    "auto",
    "ddp",
    "deepspeed",
    "deepspeed_stage_0",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_1_offload",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
]
Fused = Literal["auto", "plain", "native", "compile"]
OptimizerName = Literal["adamw", "adamw8bit", "lion", "muon"]
ScheduleName = Literal["cosine", "wsd", "linear", "constant", "points"]
SCHEDULE_FIELDS = {"wsd": ("decay_steps", "decay_tokens", "decay_shape"), "points": ("lr_points",)}
"""Fields that belong to one schedule alone."""
# The largest that make sense: what is larger is a slip, and would take minutes, or the machine, to find out.
MAX_WIDTH = 65_536
MAX_VOCAB_SIZE = 2**23  # as in a vocabulary file
YEAR_S = 31_536_000
MAX_ADDED_TOKENS = 10_000
SMALLEST_EPS_IN_8_BITS = 1e-8  # the default of torchao and bitsandbytes


@dataclass(frozen=True)
class TokenizerType:
    """What `data.tokenizer` takes beside a type. Its class is in `rwkv_cluster.tokenizer.table`.

    file: the field that names the file with its tokens, of which a work directory keeps a copy. needed: what has to be
    named in it; empty where it need not be set. takes_added_tokens: whether texts can be given ids of their own.
    """

    file: Literal["vocab_file", "path"] | None = None
    needed: str = ""
    takes_added_tokens: bool = False


TOKENIZER_TYPES = {
    "byte": TokenizerType(),
    "integer": TokenizerType(),
    "angle": TokenizerType(),
    "generic": TokenizerType("vocab_file", "a vocabulary file", takes_added_tokens=True),
    "world": TokenizerType("vocab_file", takes_added_tokens=True),
    "hf": TokenizerType("path", "a tokenizer.json, or a folder with one", takes_added_tokens=True),
}


class ModelConfig(Section):
    """Architecture. Widths: C = n_embd, A = dim_att, F = dim_ffn, N = head_size_a, H = A / N heads."""

    model_type: ModelType = Field("x060", description="architecture: x052 (RWKV-5.2), x060 (RWKV-6), x070 (RWKV-7)")
    n_layer: int = Field(3, ge=1, le=1024, description="number of blocks")
    n_embd: int = Field(128, ge=1, le=MAX_WIDTH, description="width C; a multiple of head_size_a")
    ctx_len: int = Field(1024, ge=1, le=2**24, description="tokens in a training sample")
    vocab_size: int | None = Field(
        None, ge=2, le=MAX_VOCAB_SIZE, description="rows of emb and head; default: the tokenizer's vocabulary size"
    )
    head_size_a: int = Field(64, ge=1, le=1024, description="head size N")
    dim_att: int | None = Field(
        None, ge=1, le=MAX_WIDTH, description="attention width A; default n_embd (x070 allows only that)"
    )
    dim_ffn: int | None = Field(
        None,
        ge=1,
        le=4 * MAX_WIDTH,
        description="channel-mix width F; default 4 C (x070) or 32 * floor(3.5 C / 32) (x052, x060)",
    )
    mix_lora_rank: int | None = Field(
        None, ge=1, le=MAX_WIDTH, description="x060: rank of the token-shift LoRA; default 32"
    )
    decay_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH, description="x060, x070: rank of the decay LoRA")
    a_lora_rank: int | None = Field(
        None, ge=1, le=MAX_WIDTH, description="x070: rank of the in-context learning-rate LoRA"
    )
    v_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH, description="x070: rank of the value-residual LoRA")
    gate_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH, description="x070: rank of the gate LoRA")
    block0_value_residual: bool = Field(
        True, description="x070: keep the unused v0, v1, v2 of block 0, as RWKV-LM's trainer does"
    )

    @model_validator(mode="after")
    def _check_widths(self) -> ModelConfig:
        if self.model_type == "x052" and self.head_size_a == 1:
            raise ValueError(
                "head_size_a is 1, with which weights of x052 cannot be told from those before RWKV-5.2. Use 2 or more"
            )
        att = self.dim_att or self.n_embd
        if att % self.head_size_a:
            lower = att // self.head_size_a * self.head_size_a
            nearest = f"{lower} or {lower + self.head_size_a}" if lower else f"{self.head_size_a}"
            field = "dim_att" if self.dim_att else "n_embd"
            raise ValueError(
                f"{field} is {att}, which is not a multiple of head_size_a {self.head_size_a}. "
                f"Use {field} {nearest}, or a head_size_a that divides {att}"
            )
        if self.model_type == "x070":
            if att != self.n_embd:
                raise ValueError(f"dim_att is {att}, but x070 needs dim_att = n_embd ({self.n_embd}). Remove dim_att")
            if self.dim_ffn not in (None, 4 * self.n_embd):
                raise ValueError(
                    f"dim_ffn is {self.dim_ffn}, but x070 needs dim_ffn = 4 * n_embd ({4 * self.n_embd}). "
                    "Remove dim_ffn"
                )
        elif self.dim_ffn is None and self.n_embd * 3.5 < 32:
            raise ValueError(f"n_embd {self.n_embd} is too small for the default dim_ffn. Set dim_ffn")
        return self


class TokenizerConfig(Section):
    """How text becomes token ids. Id 0 always means end of document."""

    type: str = Field(
        "byte",
        description="byte, integer, angle, generic, world, hf (a tokenizer.json of the Hugging Face Hub; extra: hf), "
        "or `package.module:ClassName` of a class with encode, decode, vocab_size",
    )
    vocab_file: str | None = Field(
        None,
        description="generic: vocabulary file; world: rwkv_vocab_v20230424.txt, where the one of the package rwkv is "
        "not to be used",
    )
    max_value: int = Field(359, ge=0, le=MAX_VOCAB_SIZE - 2, description="integer: largest value; ids are value + 1")
    path: str | None = Field(None, description="hf: a tokenizer.json, or a folder with one")
    added_tokens: list[str] | None = Field(
        None,
        max_length=MAX_ADDED_TOKENS,
        description="generic, world, hf: texts that are one token each, matched before all others; those that the "
        "vocabulary lacks get the ids after its last one, as world 65530, 65531, ...",
    )

    _paths = field_validator("vocab_file", "path", mode="before")(path_text)

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value not in TOKENIZER_TYPES and ":" not in value:
            raise ValueError(
                f"tokenizer type is {value!r}. Use one of {', '.join(TOKENIZER_TYPES)}, or `package.module:ClassName`"
            )
        return value

    @field_validator("added_tokens")
    @classmethod
    def _distinct_texts(cls, value: list[str] | None) -> list[str] | None:
        texts = value or []
        if "" in texts:
            raise ValueError("added_tokens has an empty text. Remove it")
        if twice := next((text for number, text in enumerate(texts) if text in texts[:number]), None):
            raise ValueError(f"added_tokens has {twice!r} twice. Keep one")
        return value

    @model_validator(mode="after")
    def _fields_of_the_type(self) -> TokenizerConfig:
        kind = TOKENIZER_TYPES.get(self.type, TokenizerType())
        if kind.file and kind.needed and not getattr(self, kind.file):
            raise ValueError(f"tokenizer type is {self.type!r} but {kind.file} is not set. Name {kind.needed}")
        if self.path and kind.file != "path":
            raise ValueError(f"path is set, but tokenizer type is {self.type!r}. Use type hf, or vocab_file")
        if self.vocab_file and kind.file == "path":
            raise ValueError(f"vocab_file is set, but tokenizer type is {self.type!r}. Name its file in path")
        if self.added_tokens and not kind.takes_added_tokens:
            able = ", ".join(name for name, kind in TOKENIZER_TYPES.items() if kind.takes_added_tokens)
            raise ValueError(f"added_tokens is set, but tokenizer type is {self.type!r}. Those that take it: {able}")
        return self


class DataConfig(Section):
    """What to train on and how it is prepared into `<work_dir>/data`."""

    sequence_length: int = Field(1024, ge=1, description="a 1-D integer array is cut into documents of this length")
    n_epochs_duplication: int = Field(
        3,
        ge=1,
        le=1_000_000,
        description="copies of every document in the token file, each pass shuffled anew; one where they are packed "
        "(documents reset)",
    )
    inputs: list[str] = Field(
        default_factory=list,
        description="files, folders or globs: .npy, .jsonl, .txt and other text, each also .gz or .zst; a .bin/.idx "
        "pair by its prefix or .bin; `stdlib:` for the source files of the running Python's standard library",
    )
    file_pattern: str = Field("*", description="which files of a folder are read, e.g. '*.py'")
    format: Literal["auto", "text", "conversations", "tokens"] = Field(
        "auto",
        description="what a row of a JSONL file is: text, conversations (messages, ShareGPT, prompt and completion, "
        "Alpaca, or World text of turns), tokens with labels or a mask; auto: told from the first rows, and said",
    )
    template: str = Field(
        "g1", description="conversations: how turns become text: g1 (RWKV's World and G1 models), or a Jinja file"
    )
    train_on: Literal["answers", "all"] = Field(
        "answers", description="conversations: which tokens are trained on: the assistant's answers, or all"
    )
    documents: Literal["continue", "reset"] | None = Field(
        None,
        description="continue: samples are slices of one stream of documents, as in RWKV-LM; reset: whole documents "
        "are packed into samples, and the state is zero where one begins. Default: reset where only some tokens are "
        "trained on (conversations, tokens with labels), else continue",
    )
    too_long: Literal["split", "drop", "truncate_left"] = Field(
        "split",
        description="documents reset: what becomes of a document longer than model.ctx_len: split into samples, left "
        "out, or its end alone kept; counted and said",
    )
    order: Literal["rwkv-lm", "all"] | None = Field(
        None,
        description="of samples in an epoch: rwkv-lm's, which leaves out up to a third of a small file; all: each "
        "exactly once, shuffled by the seed. Default: all for documents reset, else rwkv-lm",
    )
    text_field: str = Field("text", description="field of a JSONL object that holds the text or a list of integers")
    skip_bad_lines: bool = Field(False, description="leave out JSONL lines that cannot be read, and count them")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="how text becomes token ids")
    validation_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of documents held out for validation; equal documents stay together",
    )
    shuffle: bool = Field(True, description="shuffle documents, each pass anew")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the shuffle and of the validation split")
    write_jsonl: bool = Field(
        True,
        description="also write data/train.jsonl in rwkv-trainer's layout, for inputs that are not JSONL yet",
    )
    num_workers: int = Field(0, ge=0, le=1024, description="processes that tokenize; 0: every core")

    _paths = field_validator("inputs", "template", mode="before")(path_text)


class TrainingConfig(Section):
    """Optimisation. The global batch is micro_bsz * world size * accumulate_grad_batches samples of ctx_len tokens."""

    lr_init: float = Field(6e-4, ge=0, description="learning rate after warm-up")
    lr_final: float = Field(6e-5, ge=0, description="learning rate at the end of the horizon")
    warmup_steps: int = Field(10, ge=0, description="optimizer steps of linear warm-up, from 1 % of the rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay; Lion's mix of momentum and gradient")
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's second-moment decay; Lion's decay of the momentum")
    adam_eps: float = Field(1e-18, ge=0, description="Adam's epsilon")
    weight_decay: float = Field(0.001, ge=0, description="decoupled weight decay of the matrices")
    micro_bsz: int = Field(16, ge=1, le=65_536, description="samples per rank and micro batch")
    grad_cp: Literal["auto", 0, 1] = Field(
        "auto",
        description="1: recompute each block's activations in the backward pass; 0: keep them, which is faster; auto: "
        "0 where the memory that `plan` predicts fits the GPU, or on a CPU the machine, else 1",
    )
    epoch_save: int = Field(1, ge=1, description="write out/rwkv-<epoch>.pth every this many epochs")
    precision: Precision = Field(
        "bf16",
        description="of activations: fp32, bf16 or fp16 (CUDA only); masters and optimizer are always fp32",
    )
    strategy: Strategy = Field(
        "auto",
        description="auto (one process, or ddp), ddp, deepspeed (ZeRO, stage 2 unless zero_stage says), "
        "deepspeed_stage_0 to deepspeed_stage_3, each from 1 on also with _offload",
    )
    zero_stage: int | None = Field(
        None,
        ge=0,
        le=3,
        description="DeepSpeed ZeRO: 0 keeps everything on every rank, 1 shards the optimizer, 2 also the gradients, "
        "3 also the parameters; the same as strategy deepspeed_stage_<n>",
    )
    offload_optimizer: bool = Field(False, description="ZeRO 1 to 3: masters and moments in the host's memory")
    offload_parameters: bool = Field(False, description="ZeRO 3: parameters in the host's memory")
    ds_bucket_mb: int = Field(
        200,
        ge=1,
        le=10_000,
        description="ZeRO: size of a communication bucket in millions of elements (RWKV-LM's word)",
    )
    communication_dtype: Precision | None = Field(
        None, description="ZeRO: gradients travel in this dtype; default: that of the parameters"
    )
    num_epochs: int | None = Field(None, ge=1, description="passes over the data; default 1 without another bound")
    max_steps: int | None = Field(None, ge=1, description="end after this many optimizer steps")
    max_tokens: int | None = Field(None, ge=1, description="end after this many tokens (RWKV-LM's exit_tokens)")
    samples_per_epoch: int | None = Field(
        None,
        ge=1,
        description="samples in an epoch; default: one pass over the data. 40320 is RWKV-LM's mini-epoch",
    )
    accumulate_grad_batches: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="micro batches per optimizer step; default 1, or derived from global_batch_size",
    )
    global_batch_size: int | None = Field(
        None, ge=1, le=2**32, description="samples per optimizer step over all ranks; accumulation follows from it"
    )
    gradient_clip_val: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    l2wrap: float = Field(1e-4, ge=0, description="weight of RWKV-LM's extra gradient on the largest logit; 0: none")
    layerwise_lr: bool = Field(True, description="learning-rate multipliers by parameter group, as RWKV-LM")
    train: Literal["all"] | list[str] = Field(
        "all",
        description="parameters that are trained: all, or those whose names fit one of these patterns, such as "
        "['blocks.*.att.*', head.weight]; the others are frozen, in the training precision",
    )
    lr_multipliers: dict[str, float] = Field(
        default_factory=dict,
        description="learning-rate multipliers by pattern of the parameters' names, such as {'head.weight': 0.1}, on "
        "top of layerwise_lr's; where several patterns fit, the first counts",
    )
    random_seed: int = Field(-1, ge=-1, le=2**63 - 1, description="seed of the initial weights; -1: 0")
    init_from: str | None = Field(
        None,
        description="start from these weights instead of a fresh initialisation: a .pth, .safetensors or folder of any "
        "layout in docs/interchange.md. Fields of `model` that are not set, but for ctx_len, are read from them",
    )
    new_rows: Literal["mean", "zero"] | None = Field(
        None,
        description="init_from: how the rows of emb and head are made for new data.tokenizer.added_tokens, and beyond "
        "those of the file up to model.vocab_size. mean: the mean of the rows of what the token's text was before, "
        "else of all rows; zero. Default: none is made, and a file with too few is refused",
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA when present")
    devices: int = Field(
        1, ge=1, le=1024, description="processes on this machine when no launcher has set the world size"
    )
    timeout_s: float = Field(
        1800.0,
        ge=1,
        le=YEAR_S,
        description="for how long a rank waits for the others in a collective before the run ends",
    )
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of each rank; default torch's own choice"
    )
    val_interval_steps: int | None = Field(
        None, ge=1, description="evaluate every this many steps; default: at each epoch's end"
    )
    val_max_tokens: int = Field(
        262_144, ge=1, description="most tokens of the validation file that one evaluation reads"
    )
    early_stop_patience: int | None = Field(
        None,
        ge=1,
        description="end the run after so many evaluations in a row without a better validation loss; default: never",
    )
    early_stop_min_delta: float = Field(
        0.0, ge=0, description="early stop: by how many nats per token a validation loss must be lower to be better"
    )
    wkv_backend: WkvBackend = Field(
        "auto",
        description="WKV operator: auto; native (compiled, bf16 on tensor cores), exact (compiled, fp32 maths), "
        "chunked (PyTorch), reference (a loop), fla (flash-linear-attention, extra: fla)",
    )
    fused: Fused = Field(
        "auto",
        description="backend of the fused elementwise operations (token shift, norms, gates): native (the compiled "
        "libraries), compile (torch.compile), plain (PyTorch), auto (native where a library serves, else compile on a "
        "GPU that can, else plain)",
    )
    schedule: ScheduleName = Field(
        "cosine",
        description="learning rate after warm-up: cosine or linear, from lr_init to lr_final at the horizon; wsd, "
        "lr_init and at the end a decay to lr_final; constant, lr_init; points, along lr_points",
    )
    warmup_tokens: int | None = Field(None, ge=0, description="tokens of warm-up, in place of warmup_steps")
    decay_steps: int | None = Field(
        None, ge=1, description="wsd: optimizer steps of the decay, the last of the run; default a fifth of the run"
    )
    decay_tokens: int | None = Field(None, ge=1, description="wsd: tokens of the decay, in place of decay_steps")
    decay_shape: Literal["linear", "1-sqrt", "cosine"] | None = Field(
        None, description="wsd: how the rate falls in the decay; default 1-sqrt"
    )
    lr_points: list[list[float]] | None = Field(
        None,
        min_length=1,
        description="points: [tokens, learning rate] each, with straight lines between them, for instance "
        "[[0, 1e-3], [1000000, 1e-3], [2000000, 1e-5]]",
    )
    optimizer: OptimizerName = Field(
        "adamw",
        description="adamw; adamw8bit, whose moments have 8 bits (extra: torchao); lion; muon, for the matrices of the "
        "blocks, with adamw for the rest",
    )
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's decay of the momentum")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep an exponential moving average of the masters, validated and exported beside the weights: "
        "after each update ema = ema_decay * ema + (1 - ema_decay) * master. Default: none",
    )

    statistics_interval_steps: int | None = Field(
        None,
        ge=1,
        description="record the gradient's noise and the ratio of update to weights every this many steps, see "
        "docs/metrics.md; default: never",
    )

    _paths = field_validator("init_from", mode="before")(path_text)

    @field_validator("grad_cp", mode="before")
    @classmethod
    def _number_of_a_boolean(cls, value: Any) -> Any:
        return int(value) if isinstance(value, bool) else value

    @field_validator("train")
    @classmethod
    def _something_to_train(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("train is empty. Name parameters, or write all")
        return value

    @field_validator("lr_multipliers")
    @classmethod
    def _positive_multipliers(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, multiplier in value.items():
            if multiplier <= 0:
                raise ValueError(
                    f"lr_multipliers has {multiplier:g} for {pattern!r}, expected a number > 0. To freeze parameters, "
                    "leave them out of training.train"
                )
        return value

    @model_validator(mode="after")
    def _one_way_to_accumulate(self) -> TrainingConfig:
        if self.global_batch_size is not None and self.accumulate_grad_batches is not None:
            raise ValueError("set global_batch_size or accumulate_grad_batches, not both: one follows from the other")
        return self

    @field_validator("lr_points")
    @classmethod
    def _ascending_points(cls, value: list[list[float]] | None) -> list[list[float]] | None:
        for point in value or []:
            if len(point) != 2 or min(point) < 0:
                raise ValueError(f"lr_points has {point}. Each is [tokens, learning rate], both >= 0")
        places = [tokens for tokens, _ in value or []]
        if any(later <= earlier for earlier, later in pairwise(places)):
            raise ValueError("the tokens of lr_points do not ascend. Write each place once, in order")
        return value

    @model_validator(mode="after")
    def _fields_of_the_schedule(self) -> TrainingConfig:
        for schedule, names in SCHEDULE_FIELDS.items():
            name = next((name for name in names if getattr(self, name) is not None), None)
            if name is not None and self.schedule != schedule:
                raise ValueError(
                    f"{name} is set, which schedule {self.schedule} does not use. Remove it, or set schedule to "
                    f"{schedule}"
                )
        if self.decay_steps is not None and self.decay_tokens is not None:
            raise ValueError("set decay_steps or decay_tokens, not both")
        if self.schedule == "points" and self.lr_points is None:
            raise ValueError("schedule points needs lr_points, for instance [[0, 1e-3], [1000000, 1e-5]]. Set it")
        return self

    @model_validator(mode="after")
    def _moments_in_8_bits(self) -> TrainingConfig:
        if self.optimizer != "adamw8bit":
            return self
        if self.deepspeed_stage:
            raise ValueError(
                f"optimizer adamw8bit keeps its moments in blocks, which ZeRO stage {self.deepspeed_stage} would cut. "
                "Use strategy ddp, or optimizer adamw"
            )
        if self.adam_eps < SMALLEST_EPS_IN_8_BITS:
            raise ValueError(
                f"adam_eps is {self.adam_eps:g}, by which optimizer adamw8bit would divide where a second moment is "
                f"rounded to zero. Set it to {SMALLEST_EPS_IN_8_BITS:g} or more"
            )
        return self

    @property
    def deepspeed_stage(self) -> int | None:
        """The ZeRO stage; None without DeepSpeed."""
        if self.zero_stage is not None:
            return self.zero_stage
        named = re.search(r"stage_(\d)", self.strategy)
        return int(named[1]) if named else (2 if self.strategy == "deepspeed" else None)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether masters and moments are kept in the host's memory."""
        return self.offload_optimizer or self.strategy.endswith("_offload")

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters are kept in the host's memory."""
        return self.offload_parameters or self.strategy == "deepspeed_stage_3_offload"

    @model_validator(mode="after")
    def _one_zero_stage(self) -> TrainingConfig:
        stage = self.deepspeed_stage
        named = re.search(r"stage_(\d)", self.strategy)
        if self.zero_stage is not None and (self.strategy == "ddp" or (named and int(named[1]) != self.zero_stage)):
            raise ValueError(
                f"strategy {self.strategy} and zero_stage {self.zero_stage} contradict each other. Keep one"
            )
        if self.offloads_optimizer and not stage:
            raise ValueError(f"offload_optimizer needs ZeRO stage 1 to 3, {_stage_found(stage)}. Set zero_stage")
        if self.offloads_parameters and stage != 3:
            raise ValueError(f"offload_parameters needs ZeRO stage 3, {_stage_found(stage)}. Set zero_stage to 3")
        if stage is not None and self.precision == "fp16":
            raise ValueError("precision fp16 works with strategy auto or ddp only. Use bf16 with DeepSpeed")
        return self


def _stage_found(stage: int | None) -> str:
    return "and there is no ZeRO stage" if stage is None else f"and the stage is {stage}"


class AdapterConfig(Section):
    """Adapter that is trained in place of the weights, which stay as training.init_from has them."""

    kind: Literal["none", "lora", "dora", "pissa", "miss", "state"] = Field(
        "none",
        description="none; lora: W + alpha / rank * B A; dora: lora, and the length of each row of W; pissa: lora that "
        "begins with W's largest singular vectors; miss: one block of rank rows, repeated over W's columns; state: no "
        "matrix, but the WKV state that each document begins from",
    )
    quant: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="how the frozen matrices of the blocks are held: none, in the training precision; int8: a byte an "
        "element, and a scale a row; nf4: half a byte, and a scale for 64 elements",
    )
    token_shifts: bool = Field(False, description="state: also what the token shifts begin from")
    rank: int = Field(32, ge=1, le=MAX_WIDTH, description="rank of each matrix's update")
    alpha: float | None = Field(
        None,
        gt=0,
        description="lora, dora, pissa: the update is scaled by alpha / rank; default 2 rank, of pissa rank",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the update's inputs that a training step drops")
    targets: list[str] = Field(
        default_factory=lambda: [
            *(f"*.att.{name}" for name in ("receptance", "key", "value", "output")),
            *(f"*.ffn.{name}" for name in ("key", "value")),
        ],
        min_length=1,
        description="matrices of the blocks that get one, by patterns of their names, such as 'blocks.*.att.key'",
    )

    @model_validator(mode="after")
    def _only_frozen_matrices_are_quantised(self) -> AdapterConfig:
        if self.kind == "none" and self.quant != "none":
            raise ValueError(
                f"quant is {self.quant}, and kind is none: weights that are trained are not quantised. Leave quant out"
            )
        return self

    @model_validator(mode="after")
    def _no_scale_of_miss(self) -> AdapterConfig:
        if self.kind == "miss" and self.alpha is not None:
            raise ValueError("alpha is set, but an adapter of kind miss has no scale. Leave alpha out")
        return self

    @model_validator(mode="after")
    def _a_state_has_no_matrices(self) -> AdapterConfig:
        fields = {name: AdapterConfig.model_fields[name] for name in ("rank", "alpha", "dropout", "targets")}
        changed = [n for n, field in fields.items() if getattr(self, n) != field.get_default(call_default_factory=True)]
        if self.kind == "state" and changed:
            raise ValueError(f"{changed[0]} is set, but a state has no matrices. Leave {changed[0]} out")
        if self.kind != "state" and self.token_shifts:
            raise ValueError(f"token_shifts is set, and kind is {self.kind}. They belong to kind: state")
        return self

    @property
    def scale(self) -> float:
        """Factor of the update."""
        if self.kind == "miss":
            return 1.0
        default = self.rank if self.kind == "pissa" else 2 * self.rank
        return (default if self.alpha is None else self.alpha) / self.rank


class CheckpointConfig(Section):
    """Full-state checkpoints under `<work_dir>/out/checkpoints/step-XXXXXXXX/`."""

    save_interval_steps: int | None = Field(
        None,
        ge=1,
        description="write a full-state checkpoint every this many steps; default: at each epoch's end",
    )
    save_interval_s: float | None = Field(
        600.0, gt=0, description="also save after this many seconds; null: by steps only"
    )
    keep_last: int = Field(3, ge=1, description="full-state checkpoints that are kept")
    background: bool | None = Field(
        None,
        description="write checkpoints while training goes on, from a copy in the host's memory; default: on a GPU",
    )


class GuardConfig(Section):
    """What watches over a run. A loss or gradient that is not finite always ends it, before the update.

    128 steps and 6 deviations are those with which OLMo-core's SkipStepOptimizer leaves out single updates; it takes
    the mean and the standard deviation, which one outlier moves. See `rwkv_cluster.train.guards.spike_guard`.
    """

    on_spike: Literal["ignore", "stop", "rollback"] = Field(
        "ignore",
        description="when the loss spikes: ignore; stop, with exit code 1; rollback, to a checkpoint from before it, "
        "and go on without its samples",
    )
    spike_window_steps: int = Field(
        128,
        ge=8,
        le=4096,
        description="window of steps without a spike for median and deviation; no spike is detected before it is full",
    )
    spike_factor: float = Field(
        6.0, ge=1, description="a loss spikes above median + spike_factor * 1.4826 * (median distance from the median)"
    )
    spike_patience_steps: int = Field(
        5, ge=1, description="steps in a row that have to spike before anything is done; single ones heal by themselves"
    )
    spike_lead_steps: int = Field(
        100,
        ge=0,
        description="rollback: the samples of so many steps before the spike are left out too, as in PaLM's training",
    )
    max_rollbacks: int = Field(3, ge=1, description="rollbacks in a run; the next spike ends it")
    hang_timeout_s: float | None = Field(
        None,
        ge=1,
        le=YEAR_S,
        description="a rank that has not finished a micro batch for so long writes the stacks of its threads to "
        "logs/hang/; default: half of training.timeout_s",
    )


class LoggingConfig(Section):
    """Records of a run, which are written always but for a profile: docs/metrics.md describes them."""

    log_interval_steps: int = Field(
        10, ge=1, description="a line in logs/train.log every this many steps, and on stderr where that is no terminal"
    )
    progress_bar: bool = Field(True, description="progress bar on a terminal")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="peak of each rank's device in 10^12 operations per second, for MFU and HFU; default: of GPUs in "
        "rwkv_cluster/runtime/gpu_specs.py in 16 bits, none elsewhere",
    )
    profile_steps: int = Field(
        0,
        ge=0,
        description="take a profile of this many steps, once the first three of a session are over, into logs/profile/",
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events (extra: tensorboard)")
    wandb_project: str | None = Field(None, description="also log to this Weights & Biases project (extra: wandb)")
    sample_prompt: str | None = Field(
        None, description="text that the trained model continues at the end; default: none for integers"
    )
    sample_tokens: int = Field(200, ge=0, le=1_000_000, description="length of that sample in tokens; 0: no sample")
    sample_interval_steps: int | None = Field(
        None,
        ge=1,
        description="also write such a sample to logs/samples/ every this many steps; under ZeRO 3 each of its tokens "
        "gathers all parameters",
    )


class Config(Section):
    """A whole run: the file's sections and the work directory."""

    work_dir: str = Field("work", min_length=1, description="the one directory of the run")
    model: ModelConfig = Field(default_factory=ModelConfig, description="architecture")
    data: DataConfig = Field(default_factory=DataConfig, description="data")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="optimisation")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="adapter")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="guards")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="records")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="where and how the run is started")

    _paths = field_validator("work_dir", mode="before")(path_text)

    @model_validator(mode="after")
    def _an_average_of_the_whole_model(self) -> Config:
        is_partial = self.adapter.kind != "none" or self.training.train != "all"
        if self.training.ema_decay is not None and is_partial:
            raise ValueError(
                "training.ema_decay is set, which averages a whole model, and only a part is trained. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _one_choice_of_what_is_trained(self) -> Config:
        if self.adapter.kind != "none" and self.training.train != "all":
            raise ValueError(
                f"adapter.kind is {self.adapter.kind}, which trains the adapter alone, and training.train names "
                "parameters of the model. Keep one"
            )
        return self

    def model_post_init(self, context: Any, /) -> None:
        """What runs describe themselves by does not change: the sections become frozen copies."""
        for name, section in self:
            if isinstance(section, Section):
                self.__dict__[name] = section.frozen()
        self._is_frozen = True


def ranks_per_node(config: Config) -> int:
    """Processes on each node: launch.ranks_per_node, else one for each GPU, else training.devices."""
    launch = config.launch
    return launch.ranks_per_node or launch.gpus_per_node or config.training.devices


def open_sizes(config: Config) -> list[str]:
    """Fields of `model` that say a size of the network and are not set: training.init_from's weights may say them."""
    model = config.model
    given = {name for name in model.model_fields_set if getattr(model, name) is not None}
    return [name for name in type(model).model_fields if name not in given and name != "ctx_len"]


def with_vocabulary(config: Config, vocab_size: int) -> Config:
    """`config` with model.vocab_size filled in from the tokenizer. Raises ConfigError when it is too small."""
    configured = config.model.vocab_size
    if configured is not None and configured < vocab_size:
        raise ConfigError(
            f"model.vocab_size is {configured}, but the tokenizer has ids up to {vocab_size - 1}",
            remedy=f"Use at least {vocab_size}, or leave model.vocab_size out",
        )
    model = config.model.model_copy(update={"vocab_size": configured or vocab_size})
    return config.model_copy(update={"model": model})
