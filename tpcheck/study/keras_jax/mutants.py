"""The mutants of `rules`, and the rule that each breaks."""

from __future__ import annotations

__all__ = ["MUTANTS"]

MUTANTS = {
    "bias of a column layer not sharded": "a column layer's bias is sharded as its outputs are",
    "bias of a row layer added before the sum": "a row layer's bias is added once, after the sum over devices",
    "bias gradient of a row layer summed over devices": "a row layer's bias is replicated, and so is its gradient",
    "no sum in a row layer's forward": "a row layer sums its output over devices",
    "sum in a row layer's backward, too": "a row layer's backward passes the gradient on as it is",
    "no sum in a column layer's backward": "a column layer sums its input's gradient over devices",
    "vocabulary not masked": "an embedding masks the words of other devices",
    "embedding not summed": "an embedding's rows are summed over devices",
}
