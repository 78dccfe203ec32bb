"""The configuration of one run: its keys (`schema`), and how a run file becomes one (`load`)."""

from tpcheck.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TraceConfig,
    check,
    load_run,
    load_run_or_preset,
    parse_run,
    read_yaml,
    unknown_key,
)

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "TraceConfig",
    "check",
    "load_run",
    "load_run_or_preset",
    "parse_run",
    "read_yaml",
    "unknown_key",
]
