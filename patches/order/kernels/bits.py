"""What the bits of the kernels' results depend on besides their operands."""

from __future__ import annotations

from typing import Any

import torch
import triton

from patches.order.kernels.cross_entropy import CHUNK
from patches.order.kernels.embedding import CHUNK as TOKENS
from patches.order.kernels.golden import class_of, fingerprint
from patches.order.kernels.plans import NAMES
from patches.order.kernels.softmaxes import SHORT
from patches.order.kernels.tensor_core import K16_25
from patches.order.polynomials import EXP2
from patches.order.visible import WIDEST, keys_at_once

__all__ = ["provenance"]


def provenance(device: torch.device) -> dict[str, Any]:
    """Facts for the manifest: runs where they differ were never promised to be equal."""
    return {
        "kernel": "patches.order.gemm_gpu",  # its name when manifests began to tell; a run goes on only under it
        "revision": 2,
        "triton": triton.__version__,
        "class": class_of(device),
        "groups": f"{K16_25.group} of K from the start of a leaf",
        "accumulator": "float32",
        "float32": "ieee",
        "attention": {
            # Names are text, as they come back from a manifest.
            "keys at once": {
                name: {str(w): keys_at_once(w, dtype) for w in (128, WIDEST)} for dtype, name in NAMES.items()
            }
        },
        "exponentials": f"polynomial of degree {len(EXP2)}",
        "functions": fingerprint(device),
        "sums": {
            "order": "adjacent pairs",
            "chunk of exponentials": CHUNK,
            "longest row in one chunk": SHORT,
            "tokens added at once": TOKENS,
        },
    }
