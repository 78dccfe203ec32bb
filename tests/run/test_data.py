"""Batches are a function of (seed, step, global sample index), whatever the ranks and microbatches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.run.data import END_OF_DOCUMENT, global_batch, open_data, rank_batches

KINDS = ("text", "synthetic", "megatron")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron corpus of 30 documents, made with megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("corpus") / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    random = np.random.RandomState(0)
    for length in random.randint(5, 60, 30):
        builder.add_item(torch.from_numpy(random.randint(0, 250, length)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def run(kind: str = "synthetic", path: Path | None = None, **settings: object) -> RunConfig:
    data = {"kind": kind, "path": None if path is None else str(path)}
    return parse_run({"strategy": "stock", "seq_length": 16, "global_batch_size": 8, "data": data, **settings})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_ranks_and_microbatches_share_out_one_global_batch(kind: str, layout: tuple[int, int], corpus: Path) -> None:
    path = corpus if kind == "megatron" else None
    whole = global_batch(open_data(run(kind, path)), run(kind, path), step=3)
    config = run(kind, path, dp=layout[0], micro_batch_size=layout[1])
    source = open_data(config)
    ranks = [rank_batches(source, config, 3, rank) for rank in range(config.dp)]
    in_order = [ranks[rank][m] for m in range(config.microbatches) for rank in range(config.dp)]
    assert torch.equal(torch.cat(in_order), whole)
    assert whole.shape == (8, 17)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_seed_and_number_only(kind: str, corpus: Path) -> None:
    path = corpus if kind == "megatron" else None
    source, again, other = (open_data(run(kind, path, seed=seed)) for seed in (1, 1, 2))
    backwards = [again.sample(number) for number in reversed(range(100))][::-1]
    assert all(np.array_equal(source.sample(number), backwards[number]) for number in range(100))
    assert any(not np.array_equal(source.sample(number), other.sample(number)) for number in range(20))


@pytest.mark.parametrize("kind", ["text", "megatron"])
def test_every_pass_over_the_data_is_shuffled_anew(kind: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(250)) * 2)
    source = open_data(run(kind, corpus if kind == "megatron" else tmp_path / "text"))
    passes = [[tuple(source.sample(31 * p + i)) for i in range(31)] for p in range(2)]
    assert len(set(passes[0])) > 20
    assert passes[0] != passes[1]
    if kind == "text":
        assert set(passes[0]) == set(passes[1])


def test_text_folder_is_read_in_order_with_document_ends(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/a.txt", "B" * 20), ("a.txt", "A" * 20), (".hidden", "H")):
        (tmp_path / name).write_text(text)
    source = open_data(run("text", tmp_path))
    stream = np.concatenate([[ord("A")] * 20, [END_OF_DOCUMENT], [ord("B")] * 20, [END_OF_DOCUMENT]])
    assert source.tokens == len(stream)
    assert any(np.array_equal(source.sample(number), stream[:17]) for number in range(2))


def test_digest_follows_the_data_not_their_place(tmp_path: Path) -> None:
    digests = set()
    for name, text in (("one", "x" * 100), ("two", "x" * 100), ("three", "x" * 99 + "y")):
        (tmp_path / name).write_text(text)
        digests.add(open_data(run("text", tmp_path / name)).digest)
    assert len(digests) == 2


def test_default_text_is_the_standard_library() -> None:
    source = open_data(run("text"))
    assert source.tokens is not None
    assert source.tokens > 500_000


def test_megatron_corpus_folder_stays_as_it_was(corpus: Path) -> None:
    source = open_data(run("megatron", corpus))
    source.sample(500)
    assert len(source.digest) == 64
    assert {file.name for file in corpus.parent.iterdir()} == {"corpus.bin", "corpus.idx"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # IndexedDataset's own, half built
def test_data_that_cannot_be_used_are_refused(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "short").write_text("short")
    (tmp_path / "bad.idx").write_bytes(b"nothing")
    (tmp_path / "bad.bin").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    tiny = {"preset": "qwen3-tiny", "vocab_size": 100}
    for config, words in (
        (run("text", tmp_path / "missing"), "does not exist"),
        (run("text", tmp_path / "short"), "one sample needs 17"),
        (run("text", tmp_path / "empty"), "one sample needs 17"),
        (run("text", model=tiny), "text needs model.vocab_size of at least 257"),
        (run("megatron", tmp_path / "missing"), "there is no"),
        (run("megatron", tmp_path / "bad"), "is not an index that megatron-core reads"),
        (run("megatron", corpus, seq_length=5000), "one sample needs 5001"),
    ):
        with pytest.raises(TpcheckError, match=words):
            open_data(config)
    with pytest.raises(TpcheckError, match=r"model.vocab_size=100 ends below it"):
        global_batch(open_data(run("megatron", corpus, model=tiny)), run("megatron", corpus, model=tiny), 0)
