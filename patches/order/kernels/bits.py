"""What the bits of the kernels' results depend on besides their operands."""

from __future__ import annotations

from typing import Any

import torch
import triton

from patches.order.kernels.cross_entropy import CHUNK
from patches.order.kernels.embedding import BLOCK
from patches.order.kernels.gemm import NAMES, family, tile_of
from patches.order.kernels.pairs import INTERPRETED
from patches.order.kernels.softmaxes import SHORT
from patches.order.polynomials import EXP2
from patches.order.visible import WIDEST, keys_at_once

__all__ = ["provenance"]


def provenance() -> dict[str, Any]:
    """Facts for the manifest: runs where they differ were never promised to be equal."""
    here = torch.cuda.is_available() and not INTERPRETED
    return {
        "kernel": "patches.order.gemm_gpu",  # its name when manifests began to tell; a run goes on only under it
        "revision": 1,
        "triton": triton.__version__,
        "family": f"sm_{family(torch.device('cuda'))}" if here else None,
        "accumulator": "float32",
        "float32": "ieee",
        "k_step": {name: tile_of(dtype, 1, False).k for dtype, name in NAMES.items()},
        "attention": {
            "keys at once": {name: {w: keys_at_once(w, dtype) for w in (128, WIDEST)} for dtype, name in NAMES.items()}
        },
        "exponentials": f"polynomial of degree {len(EXP2)}",
        "sums": {
            "order": "adjacent pairs",
            "chunk of exponentials": CHUNK,
            "longest row in one chunk": SHORT,
            "tokens added at once": BLOCK,
        },
    }
