"""The keys of a run file, their types and defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from tpcheck.config.presets import PRESETS
from tpcheck.config.strategies import Strategy
from tpcheck.errors import shown

__all__ = [
    "KINDS",
    "DataConfig",
    "ExpertsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TraceConfig",
    "directory",
]

PATH, NAME = 1000, 200  # letters of an output, and bytes of a part of it, with room for what is put inside
LARGEST = 1 << 48
VOCAB_MULTIPLE = 128  # never a function of the tensor-parallel size
# Of a record; settings are what a step is made with, resumed is an optimizer's state before the first step.
KINDS = ("settings", "start", "resumed", "input", "in", "out", "mask", "loss", "again", "dout", "din", "grad", "clip",
         "weight", "state")  # fmt: skip


class Section(BaseModel):
    """A part of the run file; unknown keys are refused, and what is no number of anything where one is due."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{info.field_name} is not a matter of {str(value).lower()}")
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise ValueError(f"{info.field_name} is beyond what any machine holds")
        return value


class ExpertsConfig(Section):
    """A mixture of experts in place of every feed-forward layer."""

    number: int = Field(gt=0)
    per_token: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)  # of one expert
    score: Literal["softmax", "sigmoid"] = "softmax"
    router_dtype: Literal["fp32"] | None = None  # of logits; null: the model's
    balance_loss: float = Field(0.0, ge=0)  # coefficient of a loss of each sequence, Megatron's seq_aux_loss
    z_loss: float = Field(0.0, ge=0)
    bias_update_rate: float = Field(0.0, ge=0)  # of a bias on sigmoid scores that balances loads without a loss
    capacity_factor: float | None = Field(None, gt=0)  # of what an expert takes of each sequence; null: all
    shared_ffn_hidden_size: int | None = Field(None, gt=0)  # of an expert that every token goes to
    shared_gate: bool = False
    dispatcher: Literal["allgather", "alltoall"] = "alltoall"


class ModelConfig(Section):
    """Shape and features of a GPT. A run file names a preset and overrides any of these."""

    preset: str | None = None
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    normalization: Literal["RMSNorm", "LayerNorm"]
    norm_eps: float = Field(gt=0)
    qk_layernorm: bool
    activation: Literal["swiglu", "gelu"]
    bias: bool
    positions: Literal["rope", "learned"]
    rope_base: int = Field(gt=0, le=10**12)
    max_positions: int = Field(gt=0)
    init_std: float = Field(gt=0)
    tied: bool
    dropout: float = Field(0.0, ge=0, lt=1)
    experts: ExpertsConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"preset": given}
        if not isinstance(given, Mapping) or given.get("preset") is None:
            return given
        if not isinstance(given["preset"], str) or given["preset"] not in PRESETS:
            raise ValueError(f"unknown preset {shown(given['preset'])}: use one of {', '.join(PRESETS)}")
        return {**PRESETS[given["preset"]], **given}

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class DataConfig(Section):
    """Where the tokens come from. `text` without a path is the source of Python's standard library."""

    kind: Literal["text", "megatron", "synthetic"] = "text"
    path: str | None = None


class OptimizerConfig(Section):
    """Adam with decoupled weight decay; the learning rate warms up linearly and decays as a cosine."""

    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-4, ge=0)
    warmup_steps: int = Field(2, ge=0)
    decay_steps: int | None = Field(None, gt=0)  # null: the run's steps
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)


class TraceConfig(Section):
    """What `tpcheck.trace` records; of a run, into `trace` in its output."""

    steps: list[int] | None = None  # numbers from 0; null: all that are made inside
    modules: list[str] = ["*"]  # patterns of module and parameter names, as the shell has them
    kinds: list[str] = []  # of `KINDS`; none: all of them
    sample: int = 1  # of every tensor, only each so many-th index of its longest dimension
    perturb: int = 0  # a seed other than 0 nudges what is computed by one rounding

    @field_validator("steps", mode="before")
    @classmethod
    def _are_numbers(cls, steps: Any) -> Any:
        if steps is not None and not (isinstance(steps, Collection) and steps and all(map(_is_number, steps))):
            raise ValueError(f"steps={shown(steps)}: name them by numbers from 0, as in steps=[0, 1]")
        return steps if steps is None else list(steps)

    @field_validator("modules", "kinds", mode="before")
    @classmethod
    def _are_lists(cls, names: Any, info: ValidationInfo) -> Any:
        if not isinstance(names, Sequence) or isinstance(names, str):
            raise ValueError(f"{info.field_name}={shown(names)}: use a list, [{shown(names)}]")
        if unknown := [name for name in names if info.field_name == "kinds" and name not in KINDS]:
            raise ValueError(f"kinds={shown(unknown)}: use some of {', '.join(KINDS)}")
        if not names and info.field_name == "modules":
            raise ValueError("modules=[]: name at least one pattern, or leave modules out for all of them")
        return list(names)

    @field_validator("sample", "perturb", mode="before")
    @classmethod
    def _is_in_range(cls, number: Any, info: ValidationInfo) -> Any:
        if info.field_name == "sample" and not (_is_number(number) and number):
            raise ValueError(f"sample={shown(number)}: use a number from 1, which records everything")
        if not _is_number(number):
            raise ValueError(f"perturb={shown(number)}: use 0, or a seed above it")
        return number


def directory(path: str) -> str:
    """`path`, where results can go.

    Raises:
        ValueError: they can't, on any machine.
    """
    if not path or "\0" in path:
        raise ValueError(f"output={shown(path)} names no directory: use one such as results/run")
    if Path(path).is_absolute() and len(Path(path).parts) == 1:
        raise ValueError(f"output={path} is the root of all files: name a directory in it")
    if len(path) > PATH or any(len(part.encode()) > NAME for part in Path(path).parts):
        raise ValueError(f"output={shown(path)} has {len(path)} letters: use at most {NAME} a name and {PATH} in all")
    return path


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class RunConfig(Section):
    """One training run. All that its bits may depend on is defined here."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate("qwen3-tiny"))
    strategy: Strategy = "tree"
    leaves: int = Field(8, gt=0, le=1024)
    layers: Literal["te", "local"] | None = None  # Transformer Engine's or Megatron's; null: te on a GPU that has it
    # null: under the patches blockwise on a GPU and with chunks, unfused on a CPU; in a stock run what TE chooses
    attention: Literal["blockwise", "unfused", "flash", "fused"] | None = None
    batch: Literal["order-free"] | None = None  # sums over the batch are the same at any layout; null: in order
    chunks: int = Field(1, gt=0, le=1 << 16)  # of every sequence, which order-free sums are over: 2 * cp or more
    symmetric_memory: bool = False  # ranks read each other's sums instead of sending them; the same bits
    tp: int = Field(1, gt=0)
    pp: int = Field(1, gt=0)
    vpp: int = Field(1, gt=0)  # pieces of the model that each pipeline stage holds: virtual stages
    dp: int = Field(1, gt=0)
    cp: int = Field(1, gt=0)  # ranks that share every sequence: context parallelism
    ep: int = Field(1, gt=0)  # ranks, of those of tp * dp, that experts are spread over
    etp: int | None = Field(None, gt=0)  # ranks that share every expert's matrices; null: as many as tp
    sequence_parallel: bool = False
    dtype: Literal["bf16", "fp32"] = "bf16"
    distributed_optimizer: bool = False
    recompute: bool = False
    gradient_accumulation_fusion: bool = False
    seq_length: int = Field(64, gt=0)
    micro_batch_size: int = Field(2, gt=0)
    global_batch_size: int = Field(4, gt=0)
    steps: int = Field(20, gt=0)
    stop_after: int | None = Field(None, gt=0)  # save and leave after this step, as a signal would make it
    seed: int = Field(1234, ge=0, lt=2**31)
    threads: int = Field(1, gt=0)  # torch threads per rank on CPU
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trace: TraceConfig | None = None
    checkpoint_every: int = Field(0, ge=0)  # 0: only at the end
    output: str = "results/run"

    @field_validator("output")
    @classmethod
    def _is_a_directory(cls, output: str) -> str:
        return directory(output)

    def attention_on(self, gpu: bool) -> str:
        """What computes attention on a GPU or a CPU; unfused stands for whatever a stock run may choose."""
        blockwise = self.chunks > 1 or (gpu and self.strategy != "stock")
        return self.attention or ("blockwise" if blockwise else "unfused")

    @model_validator(mode="after")
    def _decide_decay_steps(self) -> RunConfig:
        if self.optimizer.decay_steps is None:
            self.optimizer = self.optimizer.model_copy(update={"decay_steps": self.steps})
        return self

    @model_validator(mode="after")
    def _require_a_step_to_trace(self) -> RunConfig:
        if self.trace is not None and self.trace.steps is None:
            raise ValueError("trace.steps is missing: give it")
        if self.trace is not None and self.trace.steps and min(self.trace.steps) >= self.steps:
            last = self.steps - 1
            raise ValueError(f"trace.steps={shown(self.trace.steps)}: the last of steps={self.steps} is {last}")
        return self

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    @property
    def layout(self) -> str:
        """The sizes that the number of ranks is the product of, as text."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "dp": self.dp}
        shown = {name: size for name, size in sizes.items() if name != "cp" or size > 1}
        return f"{' * '.join(shown)} = {' * '.join(map(str, shown.values()))}"

    @property
    def expert_tp(self) -> int:
        """Tensor parallelism of experts."""
        return self.etp or self.tp

    @property
    def order_free(self) -> bool:
        """Whether sums over the batch have no order."""
        return self.batch == "order-free"

    @property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp)
