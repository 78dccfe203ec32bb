"""What each kind of JSON that is read back must hold, checked before any of it is used.

Keys that are not named here are kept and may be anything; nothing else reads them.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tpcheck.errors import TpcheckError, shown

__all__ = [
    "AttemptRecord",
    "BenchRecord",
    "CodeRecord",
    "DigestsRecord",
    "EndRecord",
    "Json",
    "ManifestRecord",
    "Record",
    "StepRecord",
    "SweepRecord",
]

Json = dict[str, Any]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Record(BaseModel):
    """One object of JSON."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    @classmethod
    def require(cls, value: Json, where: str) -> Json:
        """`value`, which is such a record; `where` names its file in an error."""
        try:
            cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            found = "" if first["type"] == "missing" else f", not {shown(first['input'])}"
            raise TpcheckError(
                f"{where}: {shown(key)}: {first['msg']}{found}: not as tpcheck writes it; restore it, or train again"
            ) from error
        return value


class Data(Record):
    kind: str | None = None
    path: str | None = None
    digest: str | None = None
    tokens: int | None = None


class ManifestRecord(Record):
    """manifest.json."""

    config: Json
    versions: dict[str, str] = {}
    git: Json | None = None
    hardware: Json = {}
    data: Data | None = None
    patches: list[Json] = []
    products: Json | None = None


class Tensor(Record):
    dtype: str
    shape: list[Count]
    digest: Digest


class Parts(Record):
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class DigestsRecord(Record):
    """digests.json."""

    step: Count
    algorithm: str
    model: Digest
    optimizer: Digest | None
    tensors: Parts
    notes: list[str] = []


class StepRecord(Record):
    """A line of steps.jsonl."""

    step: Count
    loss: float
    loss_hex: str = ""
    grad_norm: float = 0.0
    grad_norm_hex: str = ""
    tokens: Count = 0
    seconds: float = 0.0


class SweepRecord(Record):
    """sweep.json, less what only a reader of cells can check."""

    name: str
    invariant: list[str]
    cells: list[Json]


class CodeRecord(Record):
    """What a copy of the code was made from."""

    digest: str


class BenchRecord(Record):
    """What `make gpu` has measured."""

    versions: Json
    products: list[Json]


class AttemptRecord(Record):
    """A line of attempts.jsonl."""

    job: str
    array_index: Count
    restart: Count
    nodes: str
    began: str
    job_name: str


class EndRecord(Record):
    """A line of ends.jsonl."""

    kind: str
    rank: Count = 0
    why: str = ""
