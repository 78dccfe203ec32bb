"""The colours of every picture."""

from __future__ import annotations

__all__ = ["COLOURS", "FAINT", "INK"]

# Okabe and Ito's colours, which colour-blind readers tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT = "#222222", "#999999"
