"""The logical digest: of the tensors alone, however they were cut, dealt out and saved."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.bits import raw
from tests.support.torch_dist import along, grid, optimizer_step, save, whole
from tpcheck.checkpoint import digest
from tpcheck.checkpoint.digest import Digests, digest_checkpoint
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir

TENSORS = {
    "embedding.weight": torch.arange(96, dtype=torch.float32).reshape(16, 6).bfloat16(),
    "decoder.norm.weight": torch.linspace(0, 1, 8),
    "optimizer.state.exp_avg.embedding.weight": torch.arange(96, dtype=torch.float32).reshape(16, 6),
}


def test_the_digest_is_what_its_definition_says(tmp_path: Path) -> None:
    found = digest_checkpoint(save(tmp_path / "x", TENSORS))
    step = torch.tensor([1.0], dtype=torch.float64)
    parts = {
        "model": {name: TENSORS[name] for name in ("decoder.norm.weight", "embedding.weight")},
        "optimizer": {name: TENSORS[name] for name in TENSORS if "optimizer" in name} | {"optimizer.step": step},
    }
    for part, tensors in parts.items():
        lines = ""
        for name, tensor in sorted(tensors.items()):
            dtype = str(tensor.dtype).removeprefix("torch.")
            expected = blake3(raw(tensor)).hexdigest()
            assert found.tensors[part][name].digest == expected
            lines += f'["{name}","{dtype}",{json.dumps(list(tensor.shape), separators=(",", ":"))},"{expected}"]\n'
        assert getattr(found, part) == blake3(lines.encode()).hexdigest()


def test_the_digest_never_changes_between_versions(tmp_path: Path) -> None:
    found = digest_checkpoint(save(tmp_path / "x", TENSORS, along(0, 2)))
    assert (found.model[:16], str(found.optimizer)[:16]) == ("112b7f2eb143791d", "1388589270a599c4")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_digest_does_not_depend_on_how_tensors_are_cut(data: st.DataObject) -> None:
    import tempfile

    def cut(name: str, tensor: torch.Tensor) -> list[Any]:
        edges = [[0, *data.draw(st.lists(st.integers(0, size), max_size=3)), size] for size in tensor.shape]
        return data.draw(st.permutations(list(grid(edges))))

    with tempfile.TemporaryDirectory() as folder:
        uncut = digest_checkpoint(save(Path(folder) / "uncut", TENSORS))
        files = data.draw(st.integers(1, 4))
        assert digest_checkpoint(save(Path(folder) / "cut", TENSORS, cut, files=files)) == uncut


@pytest.mark.parametrize(
    "change",
    [
        {"decoder.norm.weight": torch.linspace(0, 1, 8).neg().neg().reshape(2, 4)},
        {"decoder.norm.weight": torch.linspace(0, 1, 8).view(torch.int32)},
        {"decoder.norm.weight": torch.linspace(0, 1, 8).nextafter(torch.tensor(2.0))},
        {"other.weight": torch.ones(1)},
    ],
    ids=["shape", "dtype", "one ulp", "name"],
)
def test_shape_dtype_bits_and_names_all_count(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    before = digest_checkpoint(save(tmp_path / "before", TENSORS))
    after = digest_checkpoint(save(tmp_path / "after", {**TENSORS, **change}))
    assert before.model != after.model
    assert before.optimizer == after.optimizer


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    digests = [digest_checkpoint(save(tmp_path / str(zero), {"w": torch.tensor([zero])})).model for zero in (0.0, -0.0)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    "common",
    [
        {"optimizer": {"optimizer": {"state": {"common_step": torch.tensor(7.0)}}}},
        {"optimizer": {"optimizer": {"param_groups": [{"step": 7, "lr": 0.1}, {"step": torch.tensor(7)}]}}},
        {"optimizer": {0: {"optimizer": {"param_groups": [{"step": 7.0}]}}}, "iteration": 9},
    ],
)
def test_the_optimizer_step_counts_wherever_megatron_puts_it(common: Any, tmp_path: Path) -> None:
    seventh = digest_checkpoint(save(tmp_path / "7", TENSORS, common=common))
    assert seventh == digest_checkpoint(save(tmp_path / "other", TENSORS, common=optimizer_step(7)))
    assert seventh.optimizer != digest_checkpoint(save(tmp_path / "8", TENSORS, common=optimizer_step(8))).optimizer


def test_the_optimizer_step_is_found_where_newer_megatron_has_it(tmp_path: Path) -> None:
    old = save(tmp_path / "old", TENSORS, common=optimizer_step(7))
    new = save(tmp_path / "new", TENSORS, common=optimizer_step(7), common_in_shard=True)
    assert not (new / "common.pt").exists()
    assert digest_checkpoint(old) == digest_checkpoint(new)


def test_without_a_step_count_there_is_a_digest_and_a_note(tmp_path: Path) -> None:
    (save(tmp_path / "x", TENSORS) / "common.pt").unlink()
    found = digest_checkpoint(tmp_path / "x")
    assert found.optimizer
    assert "step count was not found" in found.notes[0]


def test_opaque_objects_and_extra_states_do_not_count(tmp_path: Path) -> None:
    extra = {"decoder._extra_state": torch.ones(3)}
    digests = [digest_checkpoint(save(tmp_path / str(len(t)), t)) for t in (TENSORS, {**TENSORS, **extra})]
    assert digests[0] == digests[1]


def test_flat_optimizer_buffers_have_no_digest_and_a_note_says_so(tmp_path: Path) -> None:
    flat = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.param": torch.ones(64)}
    model = {"w": torch.ones(2)}
    found = digest_checkpoint(save(tmp_path / "x", {**model, **flat}))
    assert found.optimizer is None
    assert "fully_reshardable" in found.notes[0]
    assert found.model == digest_checkpoint(save(tmp_path / "y", model)).model


def test_what_digests_json_holds_is_read_back(tmp_path: Path) -> None:
    found = digest_checkpoint(save(tmp_path / "x", TENSORS))
    assert Digests.from_json(json.loads(json.dumps(found.to_json())), "x") == found


@pytest.mark.parametrize("damage", [{"algorithm": "md5"}, {"tensors": {"model": {}}}, {"tensors": 3}])
def test_digests_json_that_is_damaged_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    found = digest_checkpoint(save(tmp_path / "x", TENSORS)).to_json()
    with pytest.raises(TpcheckError, match="x "):
        Digests.from_json({**found, **damage}, "x")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    digest_checkpoint(save(tmp_path / "x", TENSORS), lambda done, total: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in TENSORS.values())
    assert seen[-1] == (size, size)


def test_hash_of_a_result_directory_is_that_of_its_last_checkpoint(tmp_path: Path, capsys: Any) -> None:
    first = save(result_dir.checkpoint_path(tmp_path, 1), {"w": torch.ones(1)})
    last = save(result_dir.checkpoint_path(tmp_path, 2), TENSORS, whole)
    digest.command(tmp_path, tensors=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == str(last)
    assert found["model"] == digest_checkpoint(last).model != digest_checkpoint(first).model


def test_hash_of_a_run_without_checkpoints_is_the_one_on_record(tmp_path: Path, capsys: Any) -> None:
    found = digest_checkpoint(save(tmp_path / "x", TENSORS))
    run = tmp_path / "run"
    run.mkdir()
    result_dir.write_digests(run, {"step": 1, **found.to_json()})
    digest.command(run, tensors=True, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [f"{found.model}  model", f"{found.optimizer}  optimizer"]
    assert f"{found.tensors['model']['embedding.weight'].digest}  embedding.weight  bfloat16[16, 6]" in lines


def test_hash_says_when_the_last_checkpoint_is_not_where_the_run_has_come_to(tmp_path: Path, capsys: Any) -> None:
    found = digest_checkpoint(save(result_dir.checkpoint_path(tmp_path, 1), TENSORS))
    result_dir.write_digests(tmp_path, {"step": 2, **found.to_json()})
    digest.command(tmp_path, tensors=False, as_json=False)
    said = "# these are of step 1, the last checkpoint here; those on record are of 2"
    assert said in capsys.readouterr().out.splitlines()
    result_dir.write_digests(tmp_path, {"step": 1, **found.to_json()})
    digest.command(tmp_path, tensors=False, as_json=False)
    assert "of step" not in capsys.readouterr().out


def test_a_forked_process_digests_after_its_parent_did(tmp_path: Path) -> None:
    path = save(tmp_path / "x", {"w": torch.zeros(1 << 21)})
    digest_checkpoint(path)
    pid = os.fork()
    if pid == 0:
        digest_checkpoint(path)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_memory_stays_far_below_the_size_of_a_tensor(tmp_path: Path) -> None:
    """In a process of its own: 256 MiB in one tensor, whose every row is put together from four pieces."""
    path = save(tmp_path / "x", {"w": torch.zeros(8192, 8192)}, along(1, 4))
    pid = os.fork()
    if pid == 0:
        before = _anonymous_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (before + (64 << 20), before + (64 << 20)))
        digest_checkpoint(path)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmData:")[1].split()[0]) << 10
