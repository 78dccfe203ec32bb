"""The configuration of one run: its keys (`schema`), how a run file is read (`load`), what cannot work (`check`)."""

from tpcheck.config.check import check
from tpcheck.config.differences import settings_differences
from tpcheck.config.dotted import put
from tpcheck.config.load import load_run, load_run_or_preset, override, parse_run, parse_trace, read_yaml, unknown_key
from tpcheck.config.schema import KINDS, DataConfig, ModelConfig, OptimizerConfig, RunConfig, Strategy, TraceConfig

__all__ = [
    "KINDS",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "Strategy",
    "TraceConfig",
    "check",
    "load_run",
    "load_run_or_preset",
    "override",
    "parse_run",
    "parse_trace",
    "put",
    "read_yaml",
    "settings_differences",
    "unknown_key",
]
