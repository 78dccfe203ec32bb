"""Megatron-LM's own pretrain_gpt.py, unmodified, on a checkout: `make test-megatron-lm MEGATRON_LM=path`."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import megatron.core
import pytest
from packaging.version import Version

from tests.megatron_lm.runs import Case, Ended, cases, run_script
from tpcheck.checkpoint.digest import digest_checkpoint

CHECKOUT = Path(os.environ.get("MEGATRON_LM", ""))
STOCK = "--no-persist-layer-norm --no-masked-softmax-fusion"  # what Megatron's own layers want without CUDA and Apex
STEPS = re.compile(r"lm loss: (\S+) .*grad norm: (\S+)")

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("MEGATRON_LM"), reason="MEGATRON_LM names no checkout: make test-megatron-lm"
    ),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What every rank would import by itself, once."""
    assert Path(megatron.core.__file__).is_relative_to(CHECKOUT), "another megatron-core comes first on the path"
    importlib.import_module("megatron.training.training")


def trained(folder: Path, tp: int, flags: str, options: str = "", dp: int = 1) -> dict[str, Any]:
    """Losses and gradient norms as printed, and the digests of the checkpoint at the end."""
    save = f"--save {folder} --save-interval 1000 --ckpt-format torch_dist"
    done = run_script(CHECKOUT / "pretrain_gpt.py", tp, f"{flags} {save}", dp, options)
    assert done.code == 0, done.out[-4000:]
    (last,) = (path for path in folder.iterdir() if path.name.startswith("iter_"))
    digests = digest_checkpoint(last)
    return {"steps": STEPS.findall(done.out), "model": digests.model, "optimizer": digests.optimizer}


def ids(case: Case) -> str:
    return case.flags or "defaults"


def applicable(case: Case) -> None:
    from packaging.specifiers import SpecifierSet

    if case.versions and not SpecifierSet(case.versions).contains(megatron.core.__version__, prereleases=True):
        pytest.skip(f"for megatron-core {case.versions}")


@pytest.mark.parametrize("case", cases("same"), ids=ids)
def test_bits_are_the_same_at_every_tp(case: Case, tmp_path: Path) -> None:
    applicable(case)
    flags = case.all_flags
    one = trained(tmp_path / "1", 1, flags)
    assert len(one["steps"]) >= 3
    for tp in (tp for tp in case.tp if tp > 1):
        assert trained(tmp_path / str(tp), tp, flags) == one
    if "--pipeline-model-parallel-size" in flags:
        alone = re.sub(r"--(pipeline-model-parallel-size|num-layers-per-virtual-pipeline-stage) \d", "", flags)
        assert trained(tmp_path / "whole", 1, alone) == one


def test_bits_are_the_same_under_gather(tmp_path: Path) -> None:
    one, two = (trained(tmp_path / str(tp), tp, "", "--strategy gather") for tp in (1, 2))
    assert one == two


def assert_same(one: dict[str, Any], others: list[dict[str, Any]], optimizers: list[str | None]) -> None:
    """But for printed losses, which the script adds in float32; saved as it does by default, the distributed optimizer
    has no digest."""
    for other in others:
        assert [norm for _, norm in other["steps"]] == [norm for _, norm in one["steps"]]
        assert other["model"] == one["model"]
    assert [other["optimizer"] for other in others] == optimizers


def test_bits_are_the_same_at_every_layout_where_the_batch_has_no_order(tmp_path: Path) -> None:
    """With tied embeddings."""
    layouts = [(1, 1, ""), (1, 2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
               (1, 1, "--micro-batch-size 4"), (2, 2, "--sequence-parallel --micro-batch-size 1"),
               (1, 1, "--pipeline-model-parallel-size 2 --micro-batch-size 1")]  # fmt: skip
    one, *others = (
        trained(tmp_path / str(number), tp, f"--calculate-per-token-loss {flags}", "--batch order-free", dp)
        for number, (tp, dp, flags) in enumerate(layouts)
    )
    assert_same(one, others, [None, *[one["optimizer"]] * 3])


def test_bits_are_the_same_at_every_context_parallel_size(tmp_path: Path) -> None:
    """Megatron's own script cuts the batch; it may name how its layers are to communicate, which has no say."""
    layouts = [(1, 1, ""), (1, 1, "--context-parallel-size 2"),
               (2, 1, "--context-parallel-size 2 --sequence-parallel --micro-batch-size 4 --cp-comm-type all_gather"),
               (1, 2, "--context-parallel-size 2 --use-distributed-optimizer"),
               (1, 1, "--context-parallel-size 4 --pipeline-model-parallel-size 2 --micro-batch-size 1")]  # fmt: skip
    one, *others = (
        trained(tmp_path / str(number), tp, f"--calculate-per-token-loss {flags}", "--batch order-free --chunks 8", dp)
        for number, (tp, dp, flags) in enumerate(layouts)
    )
    assert_same(one, others, [*[one["optimizer"]] * 2, None, one["optimizer"]])


MIXTURE = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-token-dispatcher-type alltoall "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01 --disable-bias-linear --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --no-rope-fusion --untie-embeddings-and-output-weights "
    "--calculate-per-token-loss"
)


@pytest.mark.skipif(Version(megatron.core.__version__) < Version("0.16"), reason="for megatron-core >=0.16")
def test_bits_of_a_mixture_of_experts_are_the_same_at_every_layout(tmp_path: Path) -> None:
    layouts = [
        (1, 1, ""),
        (2, 1, "--sequence-parallel --expert-tensor-parallel-size 1"),
        (1, 2, "--expert-model-parallel-size 2 --micro-batch-size 1"),
        (1, 2, "--expert-tensor-parallel-size 2 --use-distributed-optimizer"),
        (2, 2, "--sequence-parallel --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"),
    ]
    one, *others = (
        trained(tmp_path / str(number), tp, f"{MIXTURE} {flags}", "--batch order-free", dp)
        for number, (tp, dp, flags) in enumerate(layouts)
    )
    for other in others:
        assert [norm for _, norm in other["steps"]] == [norm for _, norm in one["steps"]]
        assert other["model"] == one["model"]
    # As the script saves it by default, the distributed optimizer has no digest.
    assert [other["optimizer"] for other in others] == [*[one["optimizer"]] * 2, None, one["optimizer"]]


def test_bits_of_stock_differ(tmp_path: Path) -> None:
    one, two = (trained(tmp_path / str(tp), tp, STOCK, "--strategy stock") for tp in (1, 2))
    assert one["steps"] != two["steps"] and one["model"] != two["model"]


def test_a_run_goes_on_at_another_tp_with_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    through = trained(tmp_path / "through", 1, "--train-iters 5 --lr-decay-iters 5")
    first = run_script(
        CHECKOUT / "pretrain_gpt.py",
        1,
        f"--train-iters 5 --lr-decay-iters 5 --exit-interval 3 --save {tmp_path / 'first'} --save-interval 3",
    )
    assert first.code == 0, first.out[-4000:]
    resumed = trained(tmp_path / "resumed", 2, f"--train-iters 5 --lr-decay-iters 5 --load {tmp_path / 'first'}")
    # Megatron-LM prints the mean loss of a resumed run's first two steps at its second: its norm tells.
    assert resumed["steps"][0] == through["steps"][3] and resumed["steps"][1][1] == through["steps"][4][1]
    assert (resumed["model"], resumed["optimizer"]) == (through["model"], through["optimizer"])


def refusal(case: Case) -> Ended:
    applicable(case)
    return run_script(CHECKOUT / "pretrain_gpt.py", max(case.tp), case.all_flags, case.dp, "", case.connections)


@pytest.mark.parametrize("case", cases("refused"), ids=ids)
def test_what_is_not_covered_is_refused_in_one_line(case: Case) -> None:
    done = refusal(case)
    lines = [line for line in done.out.splitlines() if line.startswith("python -m patches: ")]
    assert done.code == 2 and len(lines) == 1 and case.says in lines[0], done.out[-4000:]
    assert "Traceback" not in done.out


@pytest.mark.parametrize("case", cases("megatron"), ids=ids)
def test_what_megatron_itself_demands_is_its_own_error(case: Case) -> None:
    done = refusal(case)
    assert done.code == 1 and case.says in done.out and "python -m patches: " not in done.out, done.out[-4000:]
