"""torch_dist checkpoints: read like torch reads them, refused with a way out when they are not what they should be."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.support.bits import raw
from tests.support.megatron_checkpoints import save_after_step
from tests.support.pickles import Touch
from tests.support.torch_dist import along, optimizer_step, save, whole
from tpcheck.checkpoint.digest import digest_checkpoint
from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.errors import TpcheckError

TENSORS = {
    "decoder.layers.weight": torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)),
    "embedding.weight": torch.randn(16, 8).bfloat16(),
    "optimizer.state.exp_avg.embedding.weight": torch.randn(16, 8),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.ones(0, 4),
}


def read(path: Path) -> dict[str, bytes]:
    checkpoint = Checkpoint(path)
    return {name: b"".join(map(bytes, checkpoint.blocks(tensor))) for name, tensor in checkpoint.tensors.items()}


def read_with_torch(path: Path) -> dict[str, bytes]:
    """Every tensor as torch's own reader puts it together."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return {name: raw(tensor) for name, tensor in tensors.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", TENSORS, along(1, 2))


@pytest.mark.parametrize("cut", [whole, along(0, 3), along(1, 2), along(2, 5)])
def test_every_tensor_has_the_bytes_it_was_saved_with(cut: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "x", TENSORS, cut)
    assert read(path) == {name: raw(tensor) for name, tensor in TENSORS.items()}


def test_what_torch_itself_saved_is_read(tmp_path: Path) -> None:
    dcp.save({**TENSORS, "transposed": torch.randn(3, 4).t(), "text": "x"}, checkpoint_id=tmp_path, no_dist=True)
    assert read(tmp_path) == read_with_torch(tmp_path)


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One state, saved by megatron-core in several ways."""
    settings: list[dict[str, Any]] = [
        {},
        {"tp": 2, "sequence_parallel": True},
        {"tp": 2, "dp": 2, "distributed_optimizer": True},
    ]
    return [save_after_step(tmp_path_factory.mktemp("way"), **way) for way in settings]


def test_what_megatron_saved_is_read_as_torch_reads_it(ways: list[Path]) -> None:
    found, expected = read(ways[-1]), read_with_torch(ways[-1])
    assert len(found) > 30
    assert sorted(found.values()) == sorted(expected.values())
    assert all(found[name] == expected[name] for name in found.keys() & expected.keys())


def test_one_state_has_one_digest_however_it_was_saved(ways: list[Path]) -> None:
    digests = [{**digest_checkpoint(way).to_json(), "beside": None} for way in ways]
    assert "optimizer.step" in digests[0]["tensors"]["optimizer"]
    assert digests[1:] == digests[:1] * 2


def test_tensors_that_older_megatron_flattened_get_their_shape_back(tmp_path: Path) -> None:
    """The distributed optimizer of megatron-core 0.14 and 0.15 cut each rank's flattened shard anywhere.

    tensor [4, 6], two ranks along dim 1      saved [1, 2, 12]: fragment (0, rank), flat
    """
    name = "optimizer.state.fp32_param.w"
    tensor = torch.arange(24.0).reshape(4, 6)
    flat = tensor.reshape(4, 2, 3).transpose(0, 1).reshape(1, 2, 12)

    def cut(_: str, __: torch.Tensor) -> list[Any]:
        return [((0, rank, low), (1, 1, high - low)) for rank in (0, 1) for low, high in ((0, 5), (5, 6), (6, 12))]

    extra = {name: {"nd_reformulated_orig_global_shape": (4, 6)}}
    path = save(tmp_path / "x", {name: flat}, cut, mcore_data=extra)
    assert read(path) == {"optimizer.state.param.w": raw(tensor)}
    assert Checkpoint(path).tensors["optimizer.state.param.w"].shape == (4, 6)


def test_reading_needs_no_torch(saved: Path) -> None:
    code = (
        "import pathlib, sys, tpcheck.checkpoint.digest as digest\n"
        "digest.digest_checkpoint(pathlib.Path(sys.argv[1]))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, saved], check=False).returncode == 0


def test_nothing_in_a_checkpoint_runs(saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = Touch(marker)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({**optimizer_step(1), "args": Touch(marker)}, saved / "common.pt")
    digests = digest_checkpoint(saved)
    assert "optimizer.step" in digests.tensors["optimizer"]
    assert not marker.exists()


def _truncate(path: Path) -> None:
    shard = path / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path / "__0_1.distcp", 0)


def _remove_shard(path: Path) -> None:
    (path / "__0_1.distcp").unlink()


def _garble_shard(path: Path) -> None:
    shard = path / "__0_0.distcp"
    shard.write_bytes(b"\0" * shard.stat().st_size)


def _garble_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(b"\x80\x04nonsense")


def _foreign_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def _garble_common(path: Path) -> None:
    (path / "common.pt").write_bytes(b"nonsense")


def _garble_json(path: Path) -> None:
    (path / "metadata.json").write_text("{")


def _other_backend(path: Path) -> None:
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))


def _no_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def _change_metadata(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def _drop_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["embedding.weight"].chunks.pop()


def _outside(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../checkpoint/__0_0.distcp"


def _compressed(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["zstd"]


def _huge(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.length = 1 << 60


def _no_tensors(metadata: Any) -> None:
    metadata.state_dict_metadata.clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cut short"),
        (_empty, "cut short"),
        (_remove_shard, "missing"),
        (_garble_shard, "not what torch.save writes"),
        (_garble_metadata, r"\.metadata can't be read"),
        (_foreign_metadata, "not a torch_dist index"),
        (_garble_common, "common.pt is not"),
        (_garble_json, "does not name a checkpoint format"),
        (_other_backend, "zarr checkpoint: only torch_dist"),
        (_no_metadata, "never came to an end"),
        (_change_metadata(_drop_chunk), "do not add up"),
        (_change_metadata(_outside), "not a file of the checkpoint"),
        (_change_metadata(_compressed), "zstd"),
        (_change_metadata(_huge), "cut short"),
        (_change_metadata(_no_tensors), "no tensors"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_what_and_where(
    damage: Callable[[Path], None], message: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(TpcheckError, match=message) as error:
        digest_checkpoint(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "empty"),
        (["model-00001-of-00002.safetensors", "config.json"], "Hugging Face"),
        (["mp_rank_00/model_optim_rng.pt"], "legacy format"),
        (["iter_0000010/.metadata", "latest_checkpointed_iteration.txt"], "it holds iter_0000010; give one of these"),
        (["notes.txt"], "no .metadata in it"),
    ],
)
def test_a_foreign_folder_is_refused_with_what_to_do(entries: list[str], message: str, tmp_path: Path) -> None:
    for entry in entries:
        (tmp_path / entry).parent.mkdir(exist_ok=True)
        (tmp_path / entry).touch()
    with pytest.raises(TpcheckError, match=message):
        Checkpoint(tmp_path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TpcheckError, match="no such folder"):
        Checkpoint(tmp_path / "x")
    (tmp_path / "x").touch()
    with pytest.raises(TpcheckError, match="not a folder"):
        Checkpoint(tmp_path / "x")


def test_damage_anywhere_in_the_index_is_refused_or_harmless(saved: Path, tmp_path: Path) -> None:
    good = (saved / ".metadata").read_bytes()
    for at in range(0, len(good), 3):
        shutil.copytree(saved, tmp_path / "broken", dirs_exist_ok=True)
        for broken in (good[:at], good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :]):
            (tmp_path / "broken" / ".metadata").write_bytes(broken)
            try:
                digest_checkpoint(tmp_path / "broken")
            except TpcheckError:
                continue
