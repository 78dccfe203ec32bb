"""`patches.enable()`, `disable()`, `enabled()`, `status()` and `python -m patches`, as a user meets them."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch

import patches
from patches import registry
from patches.megatron import dot_product_attention as without_buffer
from patches.registry import REGISTRY, _resolve, attribute, check_versions
from tests.support import ROOT, STAND_IN, plain_megatron
from tests.support.megatron_runs import differences, run
from tests.support.ranks import on_ranks

SCRIPT = Path(plain_megatron.__file__)


def targets() -> dict[str, Any]:
    found = {}
    for patch in check_versions([patch for patch in patches._all_patches() if patch.library == "megatron-core"]):
        if patch.name not in ("local-kernels", "compiled-functions", "scores-buffer") and not patch.lazy:
            holder, attr = _resolve(patch.target)
            found[patch.target] = inspect.getattr_static(holder, attr)
    return found


def in_a_rank_of_its_own(function: Any) -> None:
    on_ranks(1, function)


def test_disable_restores_every_attribute_to_the_very_object():
    @in_a_rank_of_its_own
    def _() -> None:
        patches.cpu.enable()
        before = targets()
        for_order_free = {patch.target for patch in patches._all_patches() if patch.order_free}
        for batch in ("ordered", "ordered", "order-free"):
            patches.enable(batch=batch)
            for name, value in targets().items():
                if "fusion_available" not in name:
                    assert (value is before[name]) is (batch == "ordered" and name in for_order_free), name
            patches.disable()
            assert all(value is before[name] for name, value in targets().items())


def train_after_disable() -> dict[str, Any]:
    with patches.enabled("tree"):
        pass
    return plain_megatron.train(tp=2)


def train_when_model_outlives_the_patches() -> torch.Tensor:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=8, normalization="RMSNorm")
    with patches.enabled():
        norm = WrappedTorchNorm(config, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (64,), norm.weight, norm.eps))
    return x


def test_disabled_run_is_bit_identical_to_one_that_never_enabled():
    assert not differences(run("stock", 2), on_ranks(2, train_after_disable)[0])


def test_a_norm_built_under_the_patches_is_torchs_own_after_disable():
    on_ranks(1, train_when_model_outlives_the_patches)


def test_a_process_that_never_imported_patches_trains_the_same_stock_bits(tmp_path):
    """Patches disabled against patches never imported; the CPU shim is loaded from its file in both."""
    shim = f"import runpy; runpy.run_path({patches.cpu.__file__!r})['enable']()"
    code = f"import sys; {shim}; sys.argv = ['x']; sys.path.insert(0, {str(SCRIPT.parent)!r}); " \
           "import plain_megatron; plain_megatron.main(); assert 'patches' not in sys.modules"  # fmt: skip
    never = json.loads(python("-c", code).stdout.splitlines()[-1])
    stock = json.loads(python("-m", "patches", "--strategy", "stock", str(SCRIPT)).stdout.splitlines()[-1])
    assert not differences(never, stock)


def python(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], capture_output=True, text=True, env=env, timeout=120, check=check
    )


def test_python_m_patches_runs_an_unmodified_script_with_same_bits_at_every_tp():
    one = json.loads(python("-m", "patches", str(SCRIPT)).stdout.splitlines()[-1])
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533")
    two = python(*launch, "-m", "patches", "--strategy", "tree", "--leaves", "8", str(SCRIPT), "--tp", "2", "--sp")
    assert not differences(one, json.loads(two.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--leaves", "6", str(SCRIPT)), "leaves=6"),
        (("--strategy", "trees", str(SCRIPT)), "invalid choice: 'trees'"),
        (("missing.py",), "missing.py: no such script"),
        (("--strategy", "stock", "--batch", "order-free", str(SCRIPT)), "--batch is the patches'"),
        (("--strategy", "stock", "--symmetric-memory", str(SCRIPT)), "--symmetric-memory is the patches'"),
    ),
)
def test_python_m_patches_answers_bad_input_with_exit_2(arguments, message):
    done = python("-m", "patches", *arguments, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_fused_softmax_whose_use_depends_on_the_heads_of_a_rank_is_off():
    @in_a_rank_of_its_own
    def _() -> None:
        from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax

        patches.enable()
        assert FusedScaleMaskSoftmax.is_kernel_available(None, None, 1, 4, 64, 64) is False


def test_status_names_target_version_and_reason():
    @in_a_rank_of_its_own
    def _() -> None:
        assert not any(row.applied for row in patches.status())
        patches.enable()
        rows = {row.name: row for row in patches.status()}
        assert rows["row-parallel"].applied and rows["row-parallel"].version.startswith("0.1")
        assert rows["row-parallel"].target == "megatron.core.tensor_parallel.layers:RowParallelLinear.forward"
        assert "sum over input features" in str(patches.status())


def test_enabling_twice_is_fine_and_changing_the_contract_is_not():
    @in_a_rank_of_its_own
    def _() -> None:
        patches.enable("tree", 8)
        patches.enable("tree", 8)
        with pytest.raises(RuntimeError, match=r"already enabled.*call patches.disable\(\) first"):
            patches.enable("gather")
        patches.disable()
        patches.enable("gather")


@pytest.mark.parametrize("leaves", (0, 3, -8, 2.5))
def test_leaves_must_be_a_power_of_two(leaves):
    with pytest.raises(ValueError, match="power of two"):
        patches.enable(leaves=leaves)


def test_unknown_strategy_names_the_known_ones():
    with pytest.raises(ValueError, match="use one of tree, gather"):
        patches.enable("treee")  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ("0.13.0", "0.20.0", "1.0", None))
def test_unknown_megatron_version_is_refused_with_what_is_known(found, monkeypatch):
    monkeypatch.setattr(registry, "library_version", lambda package: found)
    with pytest.raises(patches.UnsupportedError, match="megatron-core .*0.14"):
        patches.enable()
    assert REGISTRY.contract is None


class Library:
    @staticmethod
    def known(x: int) -> int:
        return x

    @staticmethod
    def changed(x: int, new_argument: int = 0) -> int:
        return x


@pytest.mark.parametrize(
    ("target", "message"),
    ((f"{__name__}:Library.changed", "parameters that the patches do not know: new_argument"),
     (f"{__name__}:Library.gone", "does not exist here")),
)  # fmt: skip
def test_changed_target_is_refused_and_nothing_stays_half_patched(target, message):
    original = Library.__dict__["known"]
    good = attribute("good", f"{__name__}:Library.known", "", lambda f: lambda x: x + 1, parameters="x")
    bad = attribute("bad", target, "", lambda f: f, parameters="x")
    with pytest.raises(patches.UnsupportedError, match=message):
        REGISTRY.apply(patches.Contract(), [good, bad])
    assert Library.__dict__["known"] is original and REGISTRY.contract is None


TOKENIZER = "megatron.training.tokenizer.tokenizer"


def import_once_called_off(package: str) -> bool:
    finders = list(sys.meta_path)
    with patches.enabled():
        pass
    sys.path.insert(0, package)
    importlib.import_module(TOKENIZER)
    return sys.meta_path == finders and not any(row.applied for row in patches.status())


def test_a_module_that_comes_after_disable_is_left_alone():
    assert on_ranks(1, import_once_called_off, str(STAND_IN)) == [True]


def test_a_library_that_is_not_there_is_looked_for_once_however_many_patches_wait_for_it():
    @in_a_rank_of_its_own
    def _() -> None:
        asked = []

        class Finder:
            @staticmethod
            def find_spec(name: str, path: Any, target: Any = None) -> None:
                asked.append(name)

        sys.meta_path.append(Finder)
        waiting = [attribute(str(n), "no_such_module:f", "", lambda f: f, lazy=True) for n in range(12)]
        REGISTRY.apply(patches.Contract(), waiting)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module")
        assert len(asked) <= 2  # by this finder and by the import itself


def test_a_late_module_with_another_signature_is_refused_when_it_is_imported(tmp_path):
    (tmp_path / "late.py").write_text("def function(x, y): return x\n")
    patch = attribute("late", "late:function", "", lambda f: f, parameters="x", lazy=True)

    @in_a_rank_of_its_own
    def _() -> None:
        REGISTRY.apply(patches.Contract(), [patch])
        sys.path.insert(0, str(tmp_path))
        with pytest.raises(patches.UnsupportedError, match="do not know: y"):
            importlib.import_module("late")


def test_the_version_that_counts_is_that_of_the_imported_package(monkeypatch):
    """A checkout that pip knows nothing of, or with metadata of another copy."""

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(registry, "version", unknown)
    with patches.enabled():
        assert {row.version for row in patches.status() if row.library == "megatron-core"} == {
            megatron.core.__version__
        }
    monkeypatch.setattr(registry, "version", lambda name: "0.16.0")
    monkeypatch.setattr(megatron.core, "__version__", "0.13.1")
    with pytest.raises(patches.UnsupportedError, match="megatron-core 0.13.1 is not known"):
        patches.enable()


def test_a_package_that_megatron_misses_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(patches.UnsupportedError, match="needy needs no_such_package, which is not installed"):
        REGISTRY.apply(patches.Contract(), [attribute("needy", "needy:f", "", lambda f: f)])


def fused_norms(tp: int) -> dict[str, torch.Tensor]:
    """Apex's layer norm as Megatron builds it; its kernel itself is never called."""
    from megatron.core import parallel_state
    from megatron.core.fusions import fused_layer_norm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    patches.enable()
    parallel_state.initialize_model_parallel(tp)
    fused_layer_norm.HAVE_FUSED_LAYER_NORM = True
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=8, tensor_model_parallel_size=tp, sequence_parallel=tp > 1
    )
    x = torch.randn(16, 2, 64, generator=torch.Generator().manual_seed(0)).chunk(tp)[torch.distributed.get_rank()]
    found = {}
    for cls in (fused_layer_norm.FusedLayerNorm, WrappedTorchNorm):
        norm = cls(config, 64)
        y = norm(x)
        (y * x).sum().backward()
        found |= {f"{cls.__name__} {name}": p.grad for name, p in norm.named_parameters()}
    return found


def test_apexs_layer_norm_sums_in_the_order_of_torchs_at_every_tp():
    one, two = on_ranks(1, fused_norms, 1)[0], on_ranks(2, fused_norms, 2)[1]
    for name in ("weight", "bias"):
        expected = one[f"WrappedTorchNorm {name}"]
        assert all(torch.equal(found[f"FusedLayerNorm {name}"], expected) for found in (one, two))


COMPILED = """
import torch
from patches.aten.compiler import without_compiler

calls = []

def counted(graph, inputs):
    calls.append(graph)
    return graph.forward

f = torch.compile(lambda x: x * x + x, backend=counted)
undo = without_compiler()
assert f(torch.ones(3)).eq(2).all() and torch.compile(lambda x: x + 1, backend=counted)(torch.ones(3)).eq(2).all()
assert not calls
undo()
f(torch.ones(3))
assert len(calls) == 1
"""


def test_nothing_is_compiled_until_the_patches_are_off() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, env=env, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr


def test_scores_take_no_buffer_and_keep_their_bits() -> None:
    from megatron.core.transformer import dot_product_attention

    with patches.enabled():
        buffer = dot_product_attention.parallel_state.get_global_memory_buffer().get_tensor(
            (4, 64, 64), torch.bfloat16, "mpu"
        )
        assert buffer.shape == (4, 64, 64) and buffer.untyped_storage().nbytes() == 2
        q, k = torch.randn(2, 4, 64, 32).bfloat16()
        scores = torch.baddbmm(buffer, q, k.mT, beta=0.0, alpha=0.125)
        assert scores.equal(torch.baddbmm(torch.full_like(scores, torch.nan), q, k.mT, beta=0.0, alpha=0.125))
        assert scores.equal((torch.bmm(q.float(), k.float().mT) * 0.125).bfloat16())
    assert not isinstance(dot_product_attention.parallel_state, without_buffer._ParallelState)
