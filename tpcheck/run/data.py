"""Training tokens, as a pure function of (seed, step, global sample index).

    step s, sample j  ->  sample number s * global_batch_size + j  ->  seq_length + 1 tokens

Which rank asks, and in which microbatch, never matters. `open_data` gives one of three sources: text
(bytes, with an end-of-document token after every file), a Megatron `.bin/.idx` prefix read through
megatron-core's GPTDataset, or synthetic tokens. A source shuffles each pass over its samples anew.
"""

from __future__ import annotations

import sysconfig
from abc import ABC, abstractmethod
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import torch

from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError

__all__ = ["Source", "global_batch", "open_data", "rank_batches"]

END_OF_DOCUMENT = 256
BYTE_VOCAB = 257
STDLIB_FILES = (
    "argparse.py ast.py calendar.py codecs.py configparser.py copy.py csv.py datetime.py difflib.py dis.py "
    "fractions.py ftplib.py heapq.py inspect.py locale.py mailbox.py optparse.py os.py pdb.py "
    "pickle.py platform.py random.py shutil.py statistics.py subprocess.py tarfile.py threading.py typing.py"
).split()


class Source(ABC):
    """Numbered samples of seq_length + 1 tokens each."""

    path: str | None = None
    tokens: int | None = None  # how many there are, None when they never end

    @property
    @abstractmethod
    def digest(self) -> str:
        """A digest of the data themselves, equal wherever the data are equal."""

    @abstractmethod
    def sample(self, number: int) -> np.ndarray[Any, Any]:
        """The tokens of sample `number`, which may be any natural number."""


def open_data(config: RunConfig) -> Source:
    """The source that the run file names; `TpcheckError` when it is missing, too short or does not fit."""
    if config.data.kind == "synthetic":
        return Synthetic(config)
    if config.data.kind == "megatron":
        return Megatron(config)
    return Text(config)


def global_batch(source: Source, config: RunConfig, step: int) -> torch.Tensor:
    """All samples of `step` (counted from 0), in logical order: [global_batch_size, seq_length + 1]."""
    first = step * config.global_batch_size
    samples = [source.sample(first + j) for j in range(config.global_batch_size)]
    return _checked(np.stack(samples), config.model.vocab_size, step)


def rank_batches(source: Source, config: RunConfig, step: int, dp_rank: int) -> list[torch.Tensor]:
    """This rank's microbatches of `step`: [micro_batch_size, seq_length + 1] each.

    Microbatch m of data-parallel rank r holds samples (m * dp + r) * micro_batch_size and following.
    """
    size, batches = config.micro_batch_size, []
    for microbatch in range(config.microbatches):
        first = step * config.global_batch_size + (microbatch * config.dp + dp_rank) * size
        samples = [source.sample(first + j) for j in range(size)]
        batches.append(_checked(np.stack(samples), config.model.vocab_size, step))
    return batches


def _checked(tokens: np.ndarray[Any, Any], vocab_size: int, step: int) -> torch.Tensor:
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise TpcheckError(
            f"the data have token {tokens.max()} at step {step + 1}, model.vocab_size={vocab_size} ends below it"
        )
    return torch.from_numpy(tokens.astype(np.int64))


def _require_a_sample(path: str | None, tokens: int, length: int) -> None:
    if tokens <= length:
        raise TpcheckError(f"{path} has {tokens} tokens, one sample needs {length + 1}")


class Text(Source):
    """The bytes of a file, of all files in a folder, or of Python's standard library."""

    def __init__(self, config: RunConfig) -> None:
        self.path, self.seed, self.length = config.data.path, config.seed, config.seq_length
        if config.model.vocab_size < BYTE_VOCAB:
            raise TpcheckError(
                f"text needs model.vocab_size of at least {BYTE_VOCAB} (256 bytes and an end of document), "
                f"found {config.model.vocab_size}"
            )
        end = np.array([END_OF_DOCUMENT], np.uint16)
        parts = [part for file in _text_files(self.path) for part in (_read_bytes(file), end)]
        self.stream = np.concatenate(parts) if parts else end
        self.tokens = len(self.stream)
        self.windows = (self.tokens - 1) // self.length
        _require_a_sample(self.path, self.tokens, self.length)

    @cached_property
    def digest(self) -> str:
        return blake3.blake3(self.stream.astype("<u2").tobytes()).hexdigest()

    def sample(self, number: int) -> np.ndarray[Any, Any]:
        epoch, index = divmod(number, self.windows)
        start = int(_permutation(self.windows, self.seed, epoch)[index]) * self.length
        return self.stream[start : start + self.length + 1]


def _text_files(path: str | None) -> list[Path]:
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        if missing := [name for name in STDLIB_FILES if not (folder / name).is_file()]:
            raise TpcheckError(
                f"the default text is Python's own source, {folder / missing[0]} is missing: set data.path"
            )
        return [folder / name for name in STDLIB_FILES]
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise TpcheckError(f"data.path={path} does not exist")
    files = [file.relative_to(root) for file in root.rglob("*") if file.is_file()]
    return [root / file for file in sorted(files) if not any(part.startswith(".") for part in file.parts)]


def _read_bytes(file: Path) -> np.ndarray[Any, Any]:
    try:
        return np.frombuffer(file.read_bytes(), np.uint8).astype(np.uint16)
    except OSError as error:
        raise TpcheckError(f"cannot read {file}: {error.strerror}") from error


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    # RandomState is frozen by numpy's policy; the newer generators may change between versions.
    return np.random.RandomState([seed, epoch]).permutation(size)


class Synthetic(Source):
    """Uniform random tokens, as many as anybody asks for."""

    def __init__(self, config: RunConfig) -> None:
        self.seed, self.length, self.vocab_size = config.seed, config.seq_length, config.model.vocab_size

    @property
    def digest(self) -> str:
        return blake3.blake3(f"uniform below {self.vocab_size} from seed {self.seed}".encode()).hexdigest()

    def sample(self, number: int) -> np.ndarray[Any, Any]:
        return np.random.RandomState([self.seed, number]).randint(0, self.vocab_size, self.length + 1)


class Megatron(Source):
    """A tokenized corpus in Megatron's format; every pass over it is one GPTDataset with its own seed."""

    def __init__(self, config: RunConfig) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        prefix = str(config.data.path).removesuffix(".bin").removesuffix(".idx")
        self.path, self.config = prefix, config
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise TpcheckError(f"data.path={prefix}: there is no {prefix}{suffix}")
        try:
            self.corpus = IndexedDataset(prefix)
        except Exception as error:
            raise TpcheckError(f"{prefix}.idx is not an index that megatron-core reads: {error}") from error
        self.tokens = int(np.sum(self.corpus.sequence_lengths))
        _require_a_sample(prefix, self.tokens, config.seq_length)

    @cached_property
    def digest(self) -> str:
        digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
        for suffix in (".idx", ".bin"):
            digest.update_mmap(f"{self.path}{suffix}")
        return digest.hexdigest()

    def sample(self, number: int) -> np.ndarray[Any, Any]:
        epoch, index = divmod(number, len(self._pass(0)))
        item = self._pass(epoch)[index]
        return np.concatenate([item["tokens"].numpy(), item["labels"].numpy()[-1:]])

    def _pass(self, epoch: int) -> Any:
        return _gpt_dataset(self, epoch)


@lru_cache(maxsize=4)
def _gpt_dataset(source: Megatron, epoch: int) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    # Without a blend, Megatron keeps the sample index in memory and writes no cache beside the data.
    settings = GPTDatasetConfig(
        random_seed=(source.config.seed + 1_000_003 * epoch) % 2**32,
        sequence_length=source.config.seq_length,
        tokenizer=_Tokenizer(source.config.model.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = np.arange(len(source.corpus.sequence_lengths), dtype=np.int32)
    return GPTDataset(source.corpus, source.path, documents, None, Split.train, settings)


class _Tokenizer:
    """What GPTDataset asks of a tokenizer; the corpus is tokenized already."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eod, self.pad = vocab_size, -2, -1
        self.unique_identifiers = {"class": "tpcheck"}
