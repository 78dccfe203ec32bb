"""A step of a one-layer Qwen3 at several TP sizes, whose ranks share one device: every bit of what comes out, as JSON.

    python tp_on_one_device.py --device cuda --layouts 1,2sp,8 --model '{"hidden_size": 1024, …}' --options '{…}'

A process of its own, for ranks are forked, and CUDA does not survive a fork: here nothing touches it before. `2sp` is
TP=2 with sequence parallelism.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--strategy", choices=("tree", "gather"), default="tree")
    parser.add_argument("--layouts", default="1,2sp,4,8sp")
    parser.add_argument("--model", type=json.loads, default={})
    parser.add_argument("--options", type=json.loads, default={})
    options = parser.parse_args()
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")
    from tests.support.staged import stage

    if options.device == "cuda":
        stage()
    else:
        pass
    from tests.support.ranks import on_ranks

    records = {}
    for layout in options.layouts.split(","):
        arguments = {**options.options, "model": options.model, "tp": int(layout.removesuffix("sp"))}
        arguments["sp"] = layout.endswith("sp")
        records[layout] = on_ranks(arguments["tp"], one_rank, options.device, options.strategy, arguments)
        assert all(record == records[layout][0] for record in records[layout]), f"ranks of {layout} differ"
    print(json.dumps({layout: found[0] for layout, found in records.items()}))


def one_rank(device: str, strategy: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    import torch

    import patches
    from tests.support import plain_megatron

    if device == "cuda":
        torch.cuda.set_device(0)
    patches.enable(strategy)
    return plain_megatron.train(**arguments)


if __name__ == "__main__":
    main()
