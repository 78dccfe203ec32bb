"""The configuration of one run: a YAML file, checked, with `key=value` overrides from the command line.

`load_run` reads it and answers with a `RunConfig` in which everything is decided; what cannot work is one
`TpcheckError` that says what was found, what is allowed and what to do. Nothing here imports torch.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tpcheck.config.presets import PRESETS
from tpcheck.errors import TpcheckError

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TraceConfig",
    "check",
    "load_run",
    "parse_run",
    "read_yaml",
    "unknown_key",
]

VOCAB_MULTIPLE = 128  # never a function of the tensor-parallel size


class Section(BaseModel):
    """A part of the run file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


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
    rope_base: int = Field(gt=0)
    max_positions: int = Field(gt=0)
    init_std: float = Field(gt=0)
    tied: bool
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if isinstance(given, str):
            given = {"preset": given}
        if not isinstance(given, Mapping) or given.get("preset") is None:
            return given
        if given["preset"] not in PRESETS:
            raise ValueError(f"unknown preset {given['preset']!r}: use one of {', '.join(PRESETS)}")
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
    """What `tpcheck.trace` records of the run, into `trace` in its output; steps are counted from 0."""

    steps: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    modules: list[str] = Field(default=["*"], min_length=1)
    kinds: list[
        Literal["start", "input", "out", "mask", "again", "dout", "din", "grad", "clip", "weight", "state"]
    ] = []
    sample: int = Field(1, gt=0)
    perturb: int = Field(0, ge=0)


class RunConfig(Section):
    """One training run. Everything that its bits may depend on stands here."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig.model_validate("qwen3-tiny"))
    strategy: Literal["stock", "tree", "gather"] = "tree"
    leaves: int = Field(8, gt=0)
    layers: Literal["te", "local"] | None = None  # Transformer Engine's or Megatron's; null: te on a GPU that has it
    attention: Literal["unfused", "flash", "fused"] | None = None  # null: unfused; in a stock run what TE chooses
    symmetric_memory: bool = False  # ranks read each other's sums instead of sending them; the same bits
    tp: int = Field(1, gt=0)
    pp: int = Field(1, gt=0)
    vpp: int = Field(1, gt=0)  # pieces of the model that each pipeline stage holds: virtual stages
    dp: int = Field(1, gt=0)
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

    @model_validator(mode="after")
    def _decide_decay_steps(self) -> RunConfig:
        if self.optimizer.decay_steps is None:
            self.optimizer = self.optimizer.model_copy(update={"decay_steps": self.steps})
        return self

    @model_validator(mode="after")
    def _require_a_step_to_trace(self) -> RunConfig:
        if self.trace is not None and min(self.trace.steps) >= self.steps:
            raise ValueError(f"trace.steps={self.trace.steps}: the last of steps={self.steps} is {self.steps - 1}")
        return self

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def microbatches(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.dp)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run file at `path`, apply `key=value` and `nested.key=value` overrides, check everything."""
    settings = read_yaml(Path(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise TpcheckError(f"{path} holds a {type(settings).__name__}, not a mapping of settings")
    return parse_run(settings, str(path), overrides)


def load_run_or_preset(target: str, overrides: Sequence[str], of_preset: Mapping[str, Any]) -> RunConfig:
    """The run file `target`, or the run `of_preset` of the model of that name, with `overrides`."""
    if target in PRESETS:
        return parse_run({"model": target, **of_preset}, target, overrides)
    if not Path(target).is_file():
        raise TpcheckError(f"{target}: neither a preset ({', '.join(PRESETS)}) nor a run file")
    return load_run(target, overrides)


def read_yaml(path: Path) -> Any:
    """What the YAML file at `path` holds."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TpcheckError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the second for dates that no calendar has
        raise TpcheckError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def unknown_key(location: Sequence[str | int], where: str, allowed: Sequence[str]) -> str:
    """What to say of pydantic's `location`, shown as `where`, whose last key is none of `allowed`."""
    close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"unknown key {where}: {hint}allowed are {', '.join(allowed)}"


def parse_run(settings: Mapping[str, Any], origin: str = "run", overrides: Sequence[str] = ()) -> RunConfig:
    """`settings` with `overrides` as a checked `RunConfig`; `origin` names them in errors."""
    overridden = copy.deepcopy(dict(settings))
    for override in overrides:
        _override(overridden, override)
    try:
        config = RunConfig.model_validate(overridden)
    except ValidationError as error:
        raise TpcheckError(f"{origin}: {_explain(error)}") from error
    check(config)
    return config


def check(config: RunConfig) -> None:
    """Refuse what cannot run, before a process is started for it."""
    model, tp, problems = config.model, config.tp, []

    def must_divide(name: str, divisor: int, value_name: str, value: int, remedy: str) -> None:
        if value % divisor:
            problems.append(f"{name}={divisor} does not divide {value_name}={value}: {remedy}")

    if config.strategy == "tree" and config.leaves & (config.leaves - 1):
        problems.append(f"leaves={config.leaves} is not a power of two")
    elif config.strategy == "tree" and config.leaves % tp:
        problems.append(
            f"tp={tp} does not divide leaves={config.leaves}: use a power of two up to {config.leaves}, "
            'or strategy="gather"'
        )
    must_divide("tp", tp, "num_attention_heads", model.num_attention_heads, "use another tp")
    must_divide("tp", tp, "ffn_hidden_size", model.ffn_hidden_size, "use another tp or width")
    must_divide("tp", tp, "the padded vocabulary", model.padded_vocab_size, "use another tp")
    must_divide("num_query_groups", model.num_query_groups, "num_attention_heads", model.num_attention_heads, "")
    if model.num_query_groups % tp and tp % model.num_query_groups:
        problems.append(f"tp={tp} and num_query_groups={model.num_query_groups}: one must be a multiple of the other")
    if config.sequence_parallel:
        must_divide("tp", tp, "seq_length", config.seq_length, "sequence_parallel cuts the sequence")
    problems += _of_the_pipeline(config)
    if config.global_batch_size % (config.micro_batch_size * config.dp):
        problems.append(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size * dp = "
            f"{config.micro_batch_size} * {config.dp}"
        )
    if config.seq_length > model.max_positions:
        problems.append(f"seq_length={config.seq_length} is above max_positions={model.max_positions}")
    if config.data.kind == "megatron" and config.data.path is None:
        problems.append("data.kind=megatron needs data.path, the prefix of a .bin/.idx pair")
    if config.strategy != "stock" and model.dropout:
        problems.append(f"model.dropout={model.dropout} depends on tp: use 0, or strategy=stock")
    if config.attention in ("flash", "fused"):
        if config.layers == "local":
            problems.append(f"attention={config.attention} is Transformer Engine's: use layers=te")
        if config.dtype != "bf16":
            problems.append(f"attention={config.attention} has no {config.dtype}: use dtype=bf16")
    if problems:
        raise TpcheckError("; ".join(problem.rstrip(": ") for problem in problems))


def _of_the_pipeline(config: RunConfig) -> Iterator[str]:
    """What pipeline stages cannot be made of."""
    model, pp, vpp = config.model, config.pp, config.vpp
    if model.num_layers % (pp * vpp):
        yield f"pp * vpp = {pp} * {vpp} does not divide num_layers={model.num_layers}: every stage has as many layers"
    if pp == 1 and vpp > 1:
        yield f"vpp={vpp} cuts pipeline stages and pp=1 makes none: use vpp=1, or a larger pp"
    if pp > 1 and model.tied and config.strategy != "stock":
        yield (
            f"model.tied=true with pp={pp} is not covered, the embedding's gradient is then a sum over stages: "
            "use model.tied=false, pp=1, or strategy=stock"
        )
    if pp > 1 and config.trace is not None:
        yield f"trace records whole models, not pp={pp} stages of one: use pp=1, or trace=null"
    if vpp > 1 and config.microbatches % pp:
        yield (
            f"pp={pp} does not divide the {config.microbatches} microbatches of a step, which vpp={vpp} needs: "
            "use another global_batch_size or micro_batch_size, or vpp=1"
        )


def _override(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise TpcheckError(f"{override!r} is not an override: write key=value, for example tp=4")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise TpcheckError(f"the value in {override!r} is not YAML") from error
    *parents, key = name.split(".")
    target = settings
    for parent in parents:
        inner = target.get(parent)
        if parent == "model" and isinstance(inner, str):
            inner = {"preset": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise TpcheckError(f"{override!r}: {parent} is a value, it has no keys")
        target[parent] = target = inner
    target[key] = value


def _explain(error: ValidationError) -> str:
    """The first problem that pydantic found, as one line that names what is allowed."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(first["loc"], where, _keys(first["loc"][:-1]))
    if first["type"] == "missing":
        preset = f", or name a preset ({', '.join(PRESETS)})" if first["loc"][0] == "model" else ""
        return f"{where} is missing: give it{preset}"
    found = "" if first["type"] == "value_error" or isinstance(first["input"], dict) else f", not {first['input']!r}"
    prefix = f"{where}: " if where else ""
    return f"{prefix}{first['msg'].removeprefix('Value error, ')}{found}"


def _keys(location: Sequence[str | int]) -> list[str]:
    section: Any = RunConfig
    for part in location:
        section = section.model_fields[str(part)].annotation
        section = next((one for one in get_args(section) if one is not type(None)), section)  # Section | None
    return list(section.model_fields)
