"""What the ranks of a run share, decided once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpcheck.config.schema import RunConfig

__all__ = ["Prepared"]


@dataclass(frozen=True)
class Prepared:
    """A run of which everything is decided that its ranks share; forked ranks inherit it.

    Attributes:
        model: the model in megatron-core's terms, a TransformerConfig.
        data: where its tokens come from, a `tpcheck.run.data.Source`.
    """

    config: RunConfig
    model: Any
    data: Any
