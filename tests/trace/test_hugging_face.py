"""`tpcheck.trace` around plain Hugging Face models; skipped where transformers is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.support.hugging_face import language_model, reference, tokens, train
from tests.support.ranks import on_ranks
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.logical import Key, Logical
from tpcheck.trace.compare.reader import Trace

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_recorded_whole_its_loss_and_its_innermost_parts(tmp_path: Path, tied: bool) -> None:
    train(tmp_path / "run", language_model(tie_word_embeddings=tied), tokens())
    trace = Trace(tmp_path / "run")
    assert trace.steps == [0, 1]
    layer = "model.layers.1"
    expected = [
        ("input", "input input_ids", (4, 12)), ("weight", f"{layer}.self_attn.q_norm.weight", (8,)),
        ("out", "whole model", (1,)), ("out", "model.norm", (4, 12, 32)), ("out", "lm_head", (4, 12, 64)),
        ("dout", f"{layer}.mlp.act_fn", (4, 12, 48)), ("din", f"{layer}.self_attn.o_proj", (4, 12, 32)),
        ("grad", "model.embed_tokens.weight", (64, 32)), ("state.exp_avg", f"{layer}.mlp.down_proj.weight", (32, 48)),
    ]  # fmt: skip
    for kind, name, shape in expected:
        tensor = trace.logical(Key(1, kind, name))
        assert isinstance(tensor, Logical) and tensor.bits.shape == shape, (kind, name, tensor)
    assert (Key(1, "grad", "lm_head.weight") in trace.order) is not tied


def _data_parallel(path: str, broken: bool = False) -> None:
    model = language_model()
    if broken:
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: output * 1.01)
    train(Path(path), DistributedDataParallel(model), tokens(dist.get_rank(), dist.get_world_size()))


def test_ddp_is_rounding_away_from_one_process_and_a_wrong_projection_is_named(tmp_path: Path) -> None:
    one = reference(tmp_path / "one")
    on_ranks(2, _data_parallel, str(tmp_path / "two"))
    found = compare(one, tmp_path / "two")
    assert found.verdict == "rounding", found.first
    # Each rank's loss is the mean over its own samples, and positions have no batch.
    assert all("whole model" in note or "rotary_emb" in note for note in found.unmapped)
    on_ranks(2, _data_parallel, str(tmp_path / "broken"), True)
    wrong = compare(one, tmp_path / "broken").first
    assert wrong is not None and (wrong.key.kind, wrong.key.name) == ("out", "model.layers.1.mlp.up_proj")
