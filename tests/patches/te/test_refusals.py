"""Settings of Transformer Engine that the promise does not cover are refused by name when they are first met."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import patches
from patches import registry
from patches.registry import REGISTRY, _resolve, check_versions
from patches.te import PATCHES
from tests.support import plain_megatron
from tests.support.ranks import on_ranks

X = torch.ones(4, 2, 16)


def linear(**options: Any) -> Any:
    import transformer_engine.pytorch as te

    return te.Linear(16, 16, params_dtype=torch.float32, **options)


def in_context(name: str, *args: Any, **kwargs: Any) -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.export import onnx_export

    context = onnx_export if name == "onnx_export" else getattr(te, name)
    opened = context(*args, **kwargs)
    with opened[0] if isinstance(opened, tuple) else opened:
        linear()(X)


def with_attribute(name: str, value: Any) -> None:
    module = linear()
    setattr(module, name, value)
    module(X)


def attention(backend: str | None = None, **options: Any) -> None:
    import transformer_engine.pytorch as te

    call = {name: options.pop(name) for name in ("core_attention_bias_type",) if name in options}
    module = te.DotProductAttention(2, 8, attn_mask_type="causal", **{"attention_dropout": 0.0, **options})
    q = torch.ones(4, 2, 2, 8)
    getattr(module, backend)(q, q, q) if backend else module(q, q, q, **call)


def grouped_linear() -> None:
    import transformer_engine.pytorch as te

    te.GroupedLinear(2, 16, 16, params_dtype=torch.float32)(X, [2, 2])


def grouped_of_experts(call: dict[str, Any], **attributes: Any) -> None:
    import transformer_engine.pytorch as te

    layer = te.GroupedLinear(2, 16, 16, bias=False, params_dtype=torch.float32)
    vars(layer).update({"_patches_grouped": None, **attributes})
    layer(X, [2, 2], **call)


def fused_ops() -> None:
    import transformer_engine.pytorch as te

    te.ops.Sequential(te.ops.Linear(16, 16, device=X.device, dtype=torch.float32))(X)


def cross_entropy() -> None:
    from transformer_engine.pytorch import cross_entropy

    cross_entropy.parallel_cross_entropy(X, torch.zeros(4, 2, dtype=torch.long))


def mlp(**options: Any) -> None:
    import transformer_engine.pytorch as te

    te.LayerNormMLP(16, 16, params_dtype=torch.float32, **options)(X)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "FP8": (lambda: in_context("fp8_autocast", enabled=True), "FP8 or FP4 .autocast. is not covered.*bf16 or fp32"),
    "FP8 calibration": (lambda: in_context("fp8_autocast", enabled=False, calibrating=True), "FP8 calibration"),
    "torch.autocast": (lambda: autocast(), "torch.autocast is not covered"),
    "ONNX export": (lambda: in_context("onnx_export", enabled=True), "ONNX export is not covered"),
    "CPU offload": (lambda: in_context("get_cpu_offload_context", True, 1, 2), "CPU offload is not covered"),
    "userbuffers": (lambda: with_attribute("ub_overlap_rs_fprop", True), "userbuffer overlap .ub_overlap_rs_fprop."),
    "symmetric": (lambda: with_attribute("symmetric_ar_type", "two_shot"), "symmetric_ar_type is not covered"),
    "delayed wgrad": (lambda: linear(delay_wgrad_compute=True)(X), "delay_wgrad_compute is not covered"),
    "float16 input": (lambda: linear()(X.half()), "float32 parameters and a torch.float16 input"),
    "unequal split": (lambda: linear(parallel_mode="column", parameters_split={"q_": 12, "k_": 4})(X), "unequal sizes"),
    "grouped": (grouped_linear, "GroupedLinear: use outside of Megatron's MoELayer is not covered.*Linear"),
    "grouped biases": (lambda: grouped_of_experts({}, use_bias=True), "GroupedLinear: bias=True is not covered"),
    "grouped weights in one": (
        lambda: grouped_of_experts({}, single_grouped_weight=True),
        "single_grouped_weight=True is not covered",
    ),
    "grouped into a buffer": (lambda: grouped_of_experts({"out": X}), "a preallocated result is not covered"),
    "op fuser": (fused_ops, "te.ops other than norms is not covered"),
    "cross-entropy": (cross_entropy, "its cross-entropy is not covered.*'native'"),
    "flash": (lambda: attention("flash_attention"), "chose its flash-attention backend.*attention_backend=AttnBackend"),
    "cuDNN": (lambda: attention("fused_attention"), "chose its fused .cuDNN. backend.*NVTE_FUSED_ATTN=0"),
    "dropout": (lambda: attention(attention_dropout=0.1), "attention dropout is not covered: set it to 0"),
    "packed": (lambda: attention(qkv_format="thd"), "packed sequences. is not covered: use 'sbhd'"),
    "bias": (lambda: attention(core_attention_bias_type="alibi"), "core_attention_bias_type='alibi' is not covered"),
    "activation": (lambda: mlp(activation="glu"), "activation='glu' is not covered: use one of gelu"),
}  # fmt: skip


def autocast() -> None:
    with torch.autocast(X.device.type, dtype=torch.bfloat16):
        linear()(X)


def refused(name: str) -> str:
    with patches.enabled(), contextlib.suppress(NotImplementedError):
        try:
            REFUSED[name][0]()
        except patches.UnsupportedError as error:
            return str(error)
    return "not refused"


@pytest.mark.parametrize("name", REFUSED)
def test_setting_is_refused_by_name(name):
    message = on_ranks(1, refused, name)[0]
    assert re.search(REFUSED[name][1], message), message


def train(options: dict[str, Any]) -> None:
    patches.enable()
    plain_megatron.train(te=True, **options)


@pytest.mark.parametrize(
    ("size", "function", "arguments", "message"),
    (
        (3, train, ({"tp": 3, "model": {"num_attention_heads": 6, "num_query_groups": 6}},), "tp=3"),
        (1, train, ({"model": {"fp8": "hybrid"}},), "fp8='hybrid' is not covered"),
        (1, train, ({"model": {"cross_entropy_fusion_impl": "te"}},), "cross_entropy_fusion_impl='te' is not covered"),
    ),
)
def test_run_is_refused_by_name(size, function, arguments, message):
    with pytest.raises(AssertionError, match=message):
        on_ranks(size, function, *arguments)


@pytest.mark.parametrize("found", ("2.8.0", "2.21.0", "3.0"))
def test_unknown_version_is_refused_with_what_is_known(found, monkeypatch):
    real = registry.library_version
    monkeypatch.setattr(registry, "library_version", lambda name: found if name == "transformer-engine" else real(name))
    with pytest.raises(patches.UnsupportedError, match=f"transformer-engine {found} is not known.*>=2.9"):
        patches.enable()
    assert REGISTRY.contract is None


def targets() -> dict[str, Any]:
    found = {}
    for patch in check_versions(PATCHES):
        holder, attr = _resolve(patch.target)
        found[patch.target] = vars(holder).get(attr) if isinstance(holder, type) else getattr(holder, attr)
    return found


def enable_and_disable() -> None:
    before = targets()
    for _ in range(2):
        patches.enable()
        assert all(value is not before[name] for name, value in targets().items())
        assert all(row.applied for row in patches.status() if row.library == "transformer-engine")
        patches.disable()
        assert all(value is before[name] for name, value in targets().items())


def test_disable_restores_tes_own_functions():
    on_ranks(1, enable_and_disable)


def test_status_shows_tes_version():
    from tests.support import te_cpu

    rows = [row for row in patches.status() if row.library == "transformer-engine"]
    assert rows and all(row.version == te_cpu.te_version() for row in rows)
