"""A cluster profile: what a site's Slurm wants to hear, and what its machines have. One YAML file, checked.

    clusters/mycluster.yaml ── load_profile("mycluster") ── Profile ── arch h100 ─┬─ partition, gres, environment
                                                                  └─ arch b300    └─ GPUs and memory a node

Every value ends in a shell script, so none may hold a line end or another control character; `slurm.script`
quotes the rest. Only `setup` is shell code, by purpose: it is the user's own.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from tpcheck.config.load import read_yaml, unknown_key
from tpcheck.errors import LETTERS, TpcheckError, shown

__all__ = ["Arch", "Container", "Profile", "load_profile", "plain"]

FOLDERS = (Path("slurm/clusters"), Path(__file__).parent / "clusters")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,4}):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
OURS = {  # sbatch options that the submit side decides
    "array": "throttle",
    "job-name": "the sweep's name",
    "output": "logs",
    "error": "logs",
    "nodes": "the cells' tp, cp, pp and dp",
    "ntasks-per-node": "the cells' tp, cp, pp and dp",
    "signal": "save_before_end",
    "time": "time",
    "requeue": "max_retries",
    "chdir": "the directory that you submit from",
    "open-mode": "append, always",
    "clusters": "SLURM_CONF: status and cancel ask that Slurm",
    "wait": "--wait of tpcheck sweep",
    **dict.fromkeys(("parsable", "quiet", "test-only", "wrap"), "tpcheck, which reads what sbatch answers"),
}


def plain(text: str) -> str:
    """`text`, which must be one line without control characters."""
    if CONTROL.search(text):
        raise ValueError(f"line ends and control characters are not allowed, found {shown(text)}")
    return text


def _text(value: Any) -> Any:
    """Numbers as YAML has them are as good as text; true and false are not, for nobody knows what a shell sees."""
    if isinstance(value, bool):
        raise ValueError(f"write 1, 0 or a word in quotes, not {str(value).lower()}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no text: write a word in quotes, or leave it out")
    return str(value) if isinstance(value, int | float) else value


def _something(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty: give it a value, or leave it out")
    return text


def _number(value: Any) -> Any:
    """pydantic would take true for 1 and "4" for 4."""
    if isinstance(value, bool | str):
        raise ValueError(f"write a number, not {str(value).lower() if isinstance(value, bool) else shown(value)}")
    return value


def _at_home(text: str) -> str:
    """`text`, whose ~ is the home of whoever submits, as in a shell."""
    return os.path.expanduser(text)


def _minutes(value: Any) -> int:
    found = DURATION.fullmatch(value) if isinstance(value, str) else None
    if not found:
        raise ValueError(f'write it in quotes as "4:00:00" or "1-12:00:00", not {shown(value)}')
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    if not (whole := (days * 24 + hours) * 60 + minutes + -(-seconds // 60)):
        raise ValueError("it must be at least a minute")
    return whole


def _option(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(f"{shown(name)} is no long option: write it without --, as in mail-type")
    return name


def _sbatch_option(name: str) -> str:
    if name in OURS:
        raise ValueError(f"{name} is decided by {OURS[name]}: leave it out here")
    return _option(name)


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{shown(name)} is no name of an environment variable")
    return name


def _value(value: Any) -> bool | str:
    """An option's value; true stands for a bare flag."""
    if value is True:
        return True
    if (
        value is None
        or isinstance(value, bool | list | dict)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ValueError(f"give it a value, or true for an option that takes none, not {shown(value)}; or leave it out")
    return plain(str(value))


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_text), AfterValidator(plain)]
Name = Annotated[Text, AfterValidator(_something)]
FilePath = Annotated[Name, AfterValidator(_at_home)]
Words = Annotated[list[FilePath], BeforeValidator(_list), Field(min_length=1)]
Whole = Annotated[int, BeforeValidator(_number)]
Measure = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Env = dict[Annotated[str, AfterValidator(_variable)], Text]
Value = Annotated[bool | str, PlainValidator(_value)]
Sbatch = dict[Annotated[str, AfterValidator(_sbatch_option)], Value]
Srun = dict[Annotated[str, AfterValidator(_option)], Value]


class Section(BaseModel):
    """A part of the profile; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=False)


class Container(Section):
    """An image that every rank runs in, by the pyxis plugin's options of srun."""

    image: FilePath
    mounts: list[FilePath] = []  # SRC:DST[:ro]; the sweep's output is added
    workdir: Name | None = None
    srun: Srun = {}  # more options: container-name: pytorch, no-container-mount-home: true


class Arch(Section):
    """One kind of machine. Whatever is defined here overrides the same key of the profile.

    `memory_gib` is that of one GPU (of a whole node where there are none); `tflops` what one GPU sustains in
    training, for the estimate of a cell's time.
    """

    partition: Name | None = None
    constraint: Name | None = None
    nodes: Whole = Field(gt=0)
    gpus_per_node: Whole = Field(0, ge=0)
    ranks_per_node: Whole | None = Field(None, gt=0)
    gres: Name | None = None  # gpu:h100 asks for --gres=gpu:h100:8 instead of --gpus-per-node=8
    request_gpus: Switch = True  # false where a node comes with all its GPUs and the site refuses to be asked
    memory_gib: Measure
    tflops: Measure | None = None
    sbatch: Sbatch = {}
    env: Env = {}

    @model_validator(mode="after")
    def _ranks(self) -> Arch:
        if not self.gpus_per_node and not self.ranks_per_node:
            raise ValueError("give gpus_per_node, or ranks_per_node for machines without GPUs")
        return self

    @property
    def per_node(self) -> int:
        """The most ranks that a node takes."""
        return self.ranks_per_node or self.gpus_per_node


class Profile(Section):
    """Everything a site's Slurm needs to know that a sweep file does not say."""

    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    reservation: Name | None = None
    exclusive: Switch = False
    time: Annotated[int, BeforeValidator(_minutes)]  # minutes; the limit of one start of a cell
    save_before_end: Whole = Field(
        300, ge=30, le=65535
    )  # seconds before the limit at which a cell saves and queues again
    max_retries: Whole = Field(10, ge=0, le=10_000)
    throttle: Whole = Field(8, gt=0)  # cells that run at once, per array
    launcher: Literal["srun", "torchrun"] = "srun"
    python: Words | None = None  # the command; default: this Python, or the container's `python`
    cpus_per_rank: Whole | None = Field(None, gt=0)
    logs: FilePath | None = None  # where scripts and output go; default: slurm/ in the sweep's output
    setup: list[Text] = []
    env: Env = {}
    sbatch: Sbatch = {}
    srun: Srun = {}
    container: Container | None = None
    architectures: dict[Name, Arch] = Field(min_length=1)

    @model_validator(mode="after")
    def _time_to_save(self) -> Profile:
        if self.save_before_end >= self.time * 60:
            raise ValueError(f"save_before_end={self.save_before_end} seconds is not below time={self.time} minutes")
        return self

    @model_validator(mode="after")
    def _machines_of_their_own(self) -> Profile:
        seen: dict[str, str] = {}
        for name, arch in self.architectures.items():
            asks = repr((arch.partition, arch.constraint, arch.gres, arch.sbatch))
            if asks in seen:
                raise ValueError(
                    f"architectures {seen[asks]} and {name} ask Slurm for the same machines: "
                    "give each a partition, constraint or gres of its own"
                )
            seen[asks] = name
        return self

    @property
    def command(self) -> list[str]:
        """What runs Python on a node."""
        return self.python or (["python"] if self.container else [sys.executable])

    def arch(self, name: str | None, who: str) -> tuple[str, Arch]:
        """The machines called `name`, for the cell `who`; without a name, the only ones. Also their name."""
        known = ", ".join(self.architectures)
        if name is None and len(self.architectures) == 1:
            return next(iter(self.architectures.items()))
        if name is None:
            raise TpcheckError(
                f"cell {who} may run anywhere, the cluster has {known}: add arch: [{known}] to the matrix"
            )
        if name not in self.architectures:
            raise TpcheckError(f"cell {who} wants arch {name}, the cluster has {known}")
        return name, self.architectures[name]


def load_profile(name: str) -> Profile:
    """The profile called `name` in slurm/clusters (here, then in the package), or the one in the file `name`."""
    path = _find(name)
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise TpcheckError(f"{path} holds a {type(content).__name__}, not a cluster profile: copy example.yaml")
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise TpcheckError(" ".join(f"{path}: {_explain(error)}".split())) from error


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    for folder in FOLDERS:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    found = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
    raise TpcheckError(
        f"unknown cluster {name}: slurm/clusters has {', '.join(found)}; copy example.yaml there, or give a file's path"
    )


def _explain(error: ValidationError) -> str:
    """The first problem that pydantic found, as one line that names what is allowed."""
    first = error.errors()[0]
    # pydantic names the branches of unions and validators in between; a user knows only keys.
    where = ".".join(str(part)[:LETTERS] for part in first["loc"] if not re.search(r"[\[\]()]", str(part)))
    if first["type"] == "extra_forbidden":
        return unknown_key(first["loc"], where, _keys(first["loc"][:-1]))
    if first["type"] == "missing":
        return f"{where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    found = (
        "" if first["type"] == "value_error" or isinstance(first["input"], dict) else f", not {shown(first['input'])}"
    )
    return f"{where}: {message}{found}" if where else f"{message}{found}"


def _keys(location: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[Section]] = {"architectures": Arch, "container": Container}
    section = sections.get(str(location[0]), Profile) if location else Profile
    return list(section.model_fields)
