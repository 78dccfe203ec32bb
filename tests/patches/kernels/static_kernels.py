"""What the compiler makes of every GPU kernel, without a GPU: registers, stack, shared memory, tensor cores.

    python -m tests.patches.kernels.static_kernels            compile all, compare with static.json
    python -m tests.patches.kernels.static_kernels --write    compile all, write that table

One Triton version holds one compiler and one assembler, so the numbers are the same on every machine; the table
names the version. `variants.py` lists the kernels.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patches.kernels.variant import Variant

# Instructions of tensor cores, and those that `kernels.tensor_core` describes: 16 products at a time, into float32.
MMAS = re.compile(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\.[\w.:]+")
MODELLED = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(?:bf16\.bf16|f16\.f16)"
    r"|tcgen05\.mma\.cta_group::1\.kind::f16"
    r"|mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?:bf16\.bf16|f16\.f16)\.f32"
)
# Additions and multiplications that the assembler may contract to one rounding.
CONTRACTIBLE = re.compile(r"\b(?:add|sub|mul)(?:\.ftz)?\.f32")
TABLE = Path(__file__).with_name("static.json")
SHARED_LIMIT = 227 * 1024  # bytes that a block may have on sm_90 and sm_100
STACK_LIMIT = {90: 256}
# Registers are given to a warp in eights, so fewer than that change nothing; stack means spills, to the byte.
TOLERANCE = {"registers": 7, "stack": 0, "shared": 0}


@dataclass(frozen=True)
class Facts:
    """Registers and bytes of stack per thread, bytes of shared memory per block, instructions of tensor cores.

    `waits` are the assembler's wgmma waits for everything in flight: more than the compiler asked for (`asked`)
    mean that it found the asynchronous instructions unsafe and put them one after the other. `contractible` are
    float additions and multiplications that may still become one.
    """

    registers: int
    stack: int
    shared: int
    mma: tuple[str, ...]
    asked: int = 0
    waits: int = 0
    contractible: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of comparing with it")
    write = parser.parse_args().write
    import triton

    from tests.patches.kernels.variants import all_variants

    cases = [(variant, family) for variant in all_variants() for family in variant.families]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        found = dict(zip(map(row, cases), pool.imap(measured, range(len(cases))), strict=True))
    wrong = [problem for case in cases for problem in broken_rules(row(case), case, found[row(case)])]
    if write:
        TABLE.write_text(as_json(triton.__version__, found))
    else:
        table = json.loads(TABLE.read_text())
        if table["triton"] != triton.__version__:
            wrong.append(f"{TABLE.name} is for Triton {table['triton']}, this is {triton.__version__}")
        wrong += differences(table["kernels"], found)
    print("\n".join([*wrong, f"{len(found)} kernel variants, {len(wrong)} problems"]))
    return 1 if wrong else 0


def as_json(version: str, found: dict[str, Facts]) -> str:
    """One line per kernel, so that a diff reads well."""
    facts = ({fact: getattr(row, fact) for fact in TOLERANCE} for row in found.values())
    lines = [
        f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}" for name, row in zip(found, facts, strict=True)
    ]
    return f'{{"triton": "{version}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"


def row(case: tuple[Variant, int]) -> str:
    variant, family = case
    return f"sm_{family} {variant.name}"


def broken_rules(name: str, case: tuple[Variant, int], facts: Facts) -> list[str]:
    """What no table may excuse."""
    variant, family = case
    rules = {
        f"has {facts.stack} bytes of stack": facts.stack <= STACK_LIMIT.get(family, sys.maxsize),
        f"takes {facts.shared} bytes of shared memory": facts.shared <= SHARED_LIMIT,
        "does not use the tensor cores": bool(facts.mma) or variant.expects != "mma",
        f"adds otherwise than the tensor core on paper: {', '.join(facts.mma)}": all(
            map(MODELLED.fullmatch, facts.mma)
        ),
        "spills": facts.stack == 0 or variant.expects != "mma",
        "waits for every wgmma": facts.waits <= facts.asked,
        "may round a multiplication and an addition as one": variant.fp_fusion or not facts.contractible,
    }
    return [f"{name} {rule}" for rule, kept in rules.items() if not kept]


def differences(table: dict[str, dict[str, int]], found: dict[str, Facts]) -> list[str]:
    """How `found` differs from the committed numbers by more than the tolerance."""
    wrong = [f"{name} is not in the table: --write" for name in found if name not in table]
    wrong += [f"{name} is in the table only: --write" for name in table if name not in found]
    for name in found.keys() & table.keys():
        for fact, tolerance in TOLERANCE.items():
            was, now = table[name][fact], getattr(found[name], fact)
            if abs(now - was) > tolerance:
                wrong.append(f"{name}: {fact} {now}, was {was}")
    return sorted(wrong)


def measured(index: int) -> Facts:
    from tests.patches.kernels.variants import all_variants

    variant, family = [(variant, family) for variant in all_variants() for family in variant.families][index]
    return facts_of(variant, family)


def facts_of(variant: Variant, family: int) -> Facts:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    source_of = GluonASTSource if variant.kernel.is_gluon() else ASTSource
    source = source_of(variant.kernel, variant.signature, variant.constexprs, variant.attrs)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", family, 32), options=variant.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _printed(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        code = _printed(tools / "nvdisasm", "-c", cubin.name) if family == 90 else ""  # wgmma is Hopper's alone
    ptx = compiled.asm["ptx"]
    return Facts(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        shared=compiled.metadata.shared,
        mma=tuple(sorted(set(MMAS.findall(ptx)))),
        asked=ptx.count("wgmma.wait_group.sync.aligned 0"),
        contractible=len(CONTRACTIBLE.findall(ptx)),
        waits=len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", code)),
    )


def _printed(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
