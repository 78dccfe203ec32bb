"""Memory and time of cells: known models' sizes, what is refused before the queue, what would fit."""

from __future__ import annotations

from typing import Any

import pytest

from slurm import preflight
from slurm.allocation import allocation_of
from slurm.preflight import flops
from slurm.profile import Profile
from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.cost.memory import GIB, memory
from tpcheck.errors import TpcheckError
from tpcheck.sweep.spec import Cell

B8 = {"model": "qwen3-8b", "seq_length": 2048, "micro_batch_size": 1, "global_batch_size": 8, "recompute": True}


def profile(**changes: Any) -> Profile:
    h100 = {"nodes": 2, "gpus_per_node": 8, "memory_gib": 79}
    return Profile.model_validate(
        {"time": "4:00:00", "architectures": {"h100": h100 | changes.pop("h100", {})}} | changes
    )


def run(**settings: Any) -> RunConfig:
    return parse_run(B8 | settings)


def cell(**settings: Any) -> Cell:
    return Cell("tree", {}, {}, run(**settings), "h100")


def check(cells: list[Cell], of: Profile) -> list[str]:
    return preflight.check(cells, {cell.name: allocation_of(cell, of) for cell in cells}, of)


@pytest.mark.parametrize(("model", "billions"), [("qwen3-8b", 8.19), ("qwen3-0.6b", 0.596), ("gpt2-124m", 0.124)])
def test_the_parameters_of_published_models_are_counted(model: str, billions: float) -> None:
    size = memory(parse_run({"model": model}), on_gpu=True).model * GIB / 18 / 1e9
    assert size == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "bytes_per_parameter"),
    [
        ({}, 18),
        ({"dtype": "fp32"}, 16),
        ({"batch": "order-free"}, 22),
        ({"batch": "order-free", "dtype": "fp32"}, 20),
        ({"dp": 4, "distributed_optimizer": True}, 9),
        ({"dp": 4}, 18),
        ({"tp": 4}, 4.5),
        ({"tp": 2, "dp": 4, "distributed_optimizer": True}, 4.5),
        ({"pp": 2}, 9),
        ({"tp": 2, "pp": 4, "vpp": 3}, 2.59),  # (6.95 / 4 + 0.62) of 8.19 billion, times 18 / 2
    ],
)
def test_adam_takes_its_bytes_per_parameter(settings: dict[str, Any], bytes_per_parameter: float) -> None:
    assert memory(run(**settings), on_gpu=True).model * GIB / 8.19e9 == pytest.approx(bytes_per_parameter, rel=0.01)


def test_recompute_keeps_fewer_activations_and_sequence_parallel_fewer_yet() -> None:
    sizes = [
        memory(run(tp=4, recompute=False), True).activations,
        memory(run(tp=4, recompute=True), True).activations,
        memory(run(tp=4, recompute=True, sequence_parallel=True), True).activations,
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[1]


def test_a_stage_keeps_the_activations_of_the_microbatches_that_later_stages_have_not_given_back() -> None:
    whole, two, virtual = (memory(run(recompute=False, **s), True) for s in ({}, {"pp": 2}, {"pp": 2, "vpp": 2}))
    assert two.activations == pytest.approx(whole.activations)  # half the layers, twice
    assert virtual.activations == pytest.approx(whole.activations * 5 / 4)
    assert memory(run(pp=2, global_batch_size=1), True).activations < two.activations


def test_qwen3_8b_on_one_80_gb_card_is_refused_with_what_would_fit() -> None:
    with pytest.raises(TpcheckError) as error:
        check([cell()], profile())
    message = str(error.value)
    assert "cell tree needs at least 141 GiB a rank (137 for weights, gradients and Adam at 18 bytes" in message
    assert "one h100 GPU has 79: tp=2 (74 GiB) or dp=4 distributed_optimizer=true (75 GiB) would fit" in message
    for settings in ({"tp": 2}, {"dp": 4, "distributed_optimizer": True}):
        assert check([cell(**settings)], profile()) == []


def test_where_nothing_fits_the_refusal_says_so() -> None:
    with pytest.raises(TpcheckError, match="nothing would fit here; or exclude the cell"):
        check([cell()], profile(h100={"nodes": 1, "gpus_per_node": 1}))


def test_activations_that_may_not_fit_are_a_warning() -> None:
    [warning] = check([cell(tp=8, recompute=False, seq_length=8192)], profile(h100={"memory_gib": 30}))
    assert warning.startswith("tree: may run out of memory: about")


def test_cpu_nodes_share_their_memory_among_ranks() -> None:
    nodes = {"gpus_per_node": 0, "ranks_per_node": 8, "memory_gib": 200}
    with pytest.raises(TpcheckError, match="h100 nodes have for each rank 25"):
        check([cell(tp=8, dp=1, dtype="fp32", model={"preset": "qwen3-8b", "num_layers": 72})], profile(h100=nodes))
    assert check([cell(tp=8)], profile(h100=nodes)) == []


def test_a_tp_group_that_spans_nodes_is_warned_of() -> None:
    [warning] = check([cell(tp=2)], profile(h100={"gpus_per_node": 1}))
    assert warning.startswith("tree: tp=2 spans nodes (1 ranks on each)")


def test_fused_attention_keeps_no_scores() -> None:
    unfused, flash = (memory(run(layers="te", attention=kernel), on_gpu=True) for kernel in ("unfused", "flash"))
    scores = (4 + 2) * 2048 * 2048 * 32  # in float32 and bf16, as tests/cost/test_attention.py counts them
    assert unfused.activations - flash.activations == pytest.approx(scores / GIB)
    assert memory(run(), on_gpu=True).activations == flash.activations  # attention by blocks, where none is named


def test_flops_are_six_per_parameter_and_token_and_about_a_third_more_with_recompute() -> None:
    tokens = 20 * 8 * 2048
    plain = flops(run(recompute=False))
    assert plain == pytest.approx(6 * 8.19e9 * tokens, rel=0.1)
    assert 1.25 * plain < flops(run()) < 4 / 3 * plain  # the output layer is not run again


def test_ranks_share_the_flops_of_tree_and_repeat_some_under_gather() -> None:
    alone = flops(run())
    assert flops(run(tp=8)) == pytest.approx(alone / 8)
    assert flops(run(tp=8, dp=2)) == pytest.approx(alone / 16)
    assert flops(run(tp=8, pp=2)) == pytest.approx(alone / 16)
    assert flops(run(tp=8, strategy="gather")) > 3 * flops(run(tp=8))


def test_a_run_that_cannot_come_to_its_end_is_warned_of() -> None:
    slow = profile(h100={"tflops": 100}, max_retries=1)
    assert check([cell(tp=2)], slow) == []
    [warning] = check([cell(tp=2, steps=20000)], slow)
    assert "times the limit of 240 minutes, and may start 2 times: raise time or max_retries" in warning


def test_relative_data_paths_mean_nothing_in_a_container() -> None:
    data = {"kind": "megatron", "path": "data/corpus"}
    assert check([cell(tp=2, data=data)], profile()) == []
    with pytest.raises(TpcheckError, match="data.path=data/corpus is relative"):
        check([cell(tp=2, data=data)], profile(container={"image": "x"}))
