"""What a Gluon kernel does, without a GPU: its partitions as threads, what is asynchronous done at any later time.

Triton's interpreter does not take Gluon. Here the kernel's own functions run as Python, with the names that they know
of Gluon replaced. One thread runs at a time; where a barrier lets it wait, `Machine` draws who goes on: a partition, a
load by TMA that is under way (in any order), or the tensor core's next product (in order). Loads and products read and
write buffers when they are drawn, so a buffer that is filled or freed too early gives wrong numbers, and barriers that
do not fit each other a `Stuck`. Some of them are drawn a thousand times as often as others, in each run others, so that
one is far ahead or behind as far as barriers let it. Products are those of `tensor_core`: bit by bit what the kernel
has to give.

Not modelled: layouts, registers, the order of memory operations within a partition, warps of one partition.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from patches.order.kernels.tensor_core import K16_25

__all__ = ["Descriptor", "Pointer", "Stuck", "run"]


class Stuck(Exception):
    """Nobody can go on, something arrives where nothing was awaited, or a program ends before what it began."""


class _Over(BaseException):
    """Ends the threads of a machine that failed."""


class Barrier:
    """An mbarrier of one arrival."""

    def __init__(self) -> None:
        self.phase, self.missing, self.bytes = 0, 1, 0

    def arrive(self, expected: int = 0) -> None:
        if not self.missing:
            raise Stuck("a second arrival within a phase")
        self.missing, self.bytes = 0, self.bytes + expected
        self._end()

    def brought(self, count: int) -> None:
        self.bytes -= count
        self._end()

    def _end(self) -> None:
        if not self.missing and not self.bytes:
            self.phase, self.missing = self.phase ^ 1, 1


@dataclass
class Block:
    """A view of shared or of tensor memory."""

    data: Tensor

    def index(self, i: int) -> Block:
        return Block(self.data[i])

    def reshape(self, shape: list[int]) -> Block:
        return Block(self.data.view(shape))

    def permute(self, order: list[int]) -> Block:
        return Block(self.data.permute(order))

    def load(self, layout: object) -> Tensor:
        return self.data.clone()


class Barriers(list[Barrier]):
    def index(self, i: int) -> Barrier:
        return self[i]


@dataclass
class Descriptor:
    """[parts, rows, K] or with the last two swapped, and what one load brings; zeros beyond its ends."""

    data: Tensor
    block: list[int]
    layout: object = None

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def read(self, at: list[int]) -> Tensor:
        block = torch.zeros(self.block, dtype=self.dtype)
        found = self.data[tuple(slice(i, i + size) for i, size in zip(at, self.block, strict=True))]
        block[tuple(slice(0, size) for size in found.shape)] = found
        return block


@dataclass
class Pointer:
    data: Tensor
    at: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.data.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset)


@dataclass
class Partition:
    call: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    over: bool = False


class Machine:
    """One program at a time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.loads: list[Callable[[], None]] = []
        self.products: deque[Callable[[], None]] = deque()
        self.ended = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.now: Partition | None = None
        self.program, self.programs = 0, 1

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """In a partition: let others go on."""
        me = self.now
        assert me is not None
        me.ready = ready
        self.ended.release()
        me.turn.acquire()
        if self.failure:
            raise _Over

    def specialise(self, calls: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        parts = [Partition(lambda of=of, args=args: of(*args)) for of, args in calls]  # type: ignore[misc]
        threads = [threading.Thread(target=self._live, args=(part,), daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        speeds = [10 ** self.random.uniform(-3, 0) for _ in parts]
        of_load, of_product = (10 ** self.random.uniform(-3, 0) for _ in range(2))
        while not self.failure and not all(part.over for part in parts):
            able = [(part, speed) for part, speed in zip(parts, speeds, strict=True) if not part.over and part.ready()]
            choices: list[tuple[Any, float]] = [*able, *((load, of_load) for load in self.loads)]
            choices += [(self.products, of_product)] if self.products else []
            if not choices:
                self.failure = Stuck(f"{sum(not part.over for part in parts)} partitions wait for each other")
                break
            ((chosen, _),) = self.random.choices(choices, [speed for _, speed in choices])
            if isinstance(chosen, Partition):
                self._let(chosen)
            elif chosen is self.products:
                self.products.popleft()()
            else:
                self.loads.remove(chosen)
                chosen()
        for part in parts:
            while not part.over:
                self._let(part)
        for thread in threads:
            thread.join(60)
        if not self.failure and (self.loads or self.products):
            self.failure = Stuck("a program ends before its loads or products")
        if self.failure:
            raise self.failure

    def _let(self, part: Partition) -> None:
        self.now = part
        part.turn.release()
        self.ended.acquire()

    def _live(self, part: Partition) -> None:
        part.turn.acquire()
        try:
            if not self.failure:
                part.call()
        except _Over:
            pass
        except BaseException as error:  # raised again where the machine runs
            self.failure = error
        part.over = True
        self.ended.release()


@dataclass
class Multiplying:
    """An accumulator in registers; `groups` of products were begun and not awaited."""

    data: Tensor


def run(kernel: Any, programs: int, seed: int, *args: Any, **constants: Any) -> None:
    """Every program of a Gluon kernel, each with an order of its own among what may happen at once."""
    machine = Machine(seed)
    known = _gluon(machine)
    functions = {name: of.fn for name, of in kernel.fn.__globals__.items() if hasattr(of, "fn")}
    known |= {name: FunctionType(of.__code__, known, name) for name, of in functions.items()}
    machine.programs = programs
    for machine.program in range(programs):
        known[kernel.fn.__name__](*args, **constants)


def _gluon(machine: Machine) -> dict[str, Any]:
    """What takes the place of Gluon's modules."""
    begun: dict[int, int] = {}  # groups of wgmma of a partition that were not awaited

    def allocate(dtype: torch.dtype, shape: list[int], layout: object, value: object = None) -> Any:
        if layout is Barrier:
            return Barriers(Barrier() for _ in range(shape[0]))
        return Block(torch.full(shape, torch.nan, dtype=dtype))

    def load(descriptor: Descriptor, at: list[int], barrier: Barrier, result: Block) -> None:
        def done() -> None:
            result.data.copy_(descriptor.read(at))
            barrier.brought(result.data.numel() * result.data.element_size())

        machine.loads.append(done)

    def multiplied(x: Tensor, y: Tensor, acc: Tensor, use_acc: bool) -> None:
        total = acc.clone() if use_acc else torch.zeros_like(acc)
        for k in range(0, x.shape[1], K16_25.group):
            total = K16_25.mma(x[:, k : k + K16_25.group], y[k : k + K16_25.group], total)
        acc.copy_(total)

    def warpgroup_mma(x: Block, y: Block, acc: Multiplying, use_acc: bool, is_async: bool) -> Multiplying:
        me = id(machine.now)
        begun[me] = begun.get(me, 0) + 1

        def done() -> None:
            multiplied(x.data, y.data, acc.data, use_acc)
            begun[me] -= 1

        machine.products.append(done)
        return acc

    def warpgroup_mma_wait(count: int, deps: tuple[Multiplying]) -> Tensor:
        me = id(machine.now)
        machine.wait_until(lambda: begun.get(me, 0) <= count)
        return deps[0].data

    def tcgen05_mma(x: Block, y: Block, acc: Block, use_acc: bool, mbarriers: list[Barrier]) -> None:
        machine.products.append(lambda: multiplied(x.data, y.data, acc.data, use_acc))
        machine.products.extend(barrier.arrive for barrier in mbarriers)

    def store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        at = pointer.at if mask is None else pointer.at[mask]
        pointer.data.view(-1)[at] = value if mask is None else value[mask]

    gl = SimpleNamespace(
        float32=torch.float32, int64=torch.int64, static_range=range, minimum=min,
        program_id=lambda axis: torch.tensor(machine.program), num_programs=lambda axis: machine.programs,
        arange=lambda start, end, layout: torch.arange(start, end),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        convert_layout=lambda x, layout: x, load=lambda pointer: pointer.data.view(-1)[pointer.at], store=store,
        allocate_shared_memory=allocate, warp_specialize=machine.specialise,
        SliceLayout=_nothing, BlockedLayout=_nothing, NVMMADistributedLayout=_nothing,
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: Barrier, init=lambda barrier, count: None,
        wait=lambda barrier, phase: machine.wait_until(lambda: barrier.phase != phase),
        expect=lambda barrier, count: barrier.arrive(count),
        arrive=lambda barrier, pred=True: barrier.arrive() if pred else None,
    )  # fmt: skip
    blackwell = SimpleNamespace(
        TensorMemoryLayout=_nothing, get_tmem_reg_layout=_nothing, allocate_tensor_memory=allocate,
        tcgen05_mma=tcgen05_mma, tcgen05_commit=lambda barrier: machine.products.append(barrier.arrive),
    )  # fmt: skip
    return {
        "__builtins__": __builtins__, "gl": gl, "mbarrier": mbarrier, "blackwell": blackwell,
        "tma": SimpleNamespace(async_copy_global_to_shared=load), "fence_async_shared": _nothing,
        "warpgroup_mma": warpgroup_mma, "warpgroup_mma_init": Multiplying, "warpgroup_mma_wait": warpgroup_mma_wait,
    }  # fmt: skip


def _nothing(*args: object, **kwargs: object) -> None:
    return None
