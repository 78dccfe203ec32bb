"""Megatron-LM's issue 1736, answered with its own pretrain_gpt.py: what `results/megatron_lm_1736/` shows.

python -m tests.studies.megatron_lm_1736 MEGATRON_LM      a checkout; minutes on two cores; writes pages and texts there

Megatron-LM wants six, triton and pybind11, and compiles its data helpers in the checkout.

Losses differ between one rank and TP=2: expected, or a silent failure? The script runs unmodified, stock and under the
patches, and stock once more from weights and a vocabulary that are the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.support import ROOT
from tpcheck.trace.compare.command import compare, to_json
from tpcheck.trace.compare.judge import Comparison
from tpcheck.trace.compare.report import write
from tpcheck.trace.compare.text import lines, sentence

OUTPUT = ROOT / "results" / "megatron_lm_1736"
MODEL = (
    "--num-layers 6 --hidden-size 128 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 "
    "--make-vocab-size-divisible-by 1 --micro-batch-size 1 --global-batch-size 1 --train-iters 2 --lr 1e-3 "
    "--min-lr 1e-3 --lr-decay-style constant --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 50256 --attention-dropout 0 --hidden-dropout 0 --transformer-impl local --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion "
    "--no-rope-fusion --use-cpu-initialization --distributed-backend gloo --eval-iters 0 "
    "--eval-interval 100 --log-interval 1 --num-workers 0"
).split()
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel".split()
LOAD = "--load start --finetune --no-load-optim --no-load-rng --ckpt-format torch_dist".split()
# Both pad to 50258, a multiple of this number times TP.
SAME = {1: "--make-vocab-size-divisible-by 2".split(), 2: "--make-vocab-size-divisible-by 1".split()}
TIMEOUT = 1800


class Script:
    """pretrain_gpt.py of a checkout, run in a scratch folder; remembers losses and commands."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.path, self.folder = checkout / "pretrain_gpt.py", folder
        self.losses: dict[str, list[str]] = {}
        self.commands: list[str] = []

    def run(self, ranks: int, patched: list[str], arguments: list[str]) -> None:
        """One run of `ranks`; `patched` are options of `python -m patches`."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "29517"]
        command = [*launcher, "-m", "patches", *patched, str(self.path), *MODEL, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True,
            timeout=TIMEOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        name = " ".join(patched[patched.index("--trace") + 1 :]) if "--trace" in patched else "start"
        self.losses[name] = re.findall(r"lm loss: (\S+)", done.stdout)
        words = ["-m patches", *patched, "pretrain_gpt.py $MODEL", *arguments]
        self.commands.append(f"torchrun --nproc-per-node {ranks} {' '.join(words)}")


def main(checkout: Path) -> None:
    if not (checkout / "pretrain_gpt.py").is_file():
        raise SystemExit(f"{checkout} has no pretrain_gpt.py: name a checkout of Megatron-LM")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        script = Script(checkout.resolve(), folder)
        stock, tree = ["--strategy", "stock"], ["--strategy", "tree"]
        script.run(1, [*stock, "--trace", "stock/tp1"], [])
        script.run(2, [*stock, "--trace", "stock/tp2"], TP2)
        script.run(1, stock, [*SAME[1], "--save", "start", "--save-interval", "1", "--ckpt-format", "torch_dist"])
        script.run(1, [*stock, "--trace", "same/tp1"], [*SAME[1], *LOAD])
        for seed in ("1", "2", "3"):
            script.run(1, [*stock, "--trace", "same/tp1", "--perturb", seed], [*SAME[1], *LOAD])
        script.run(2, [*stock, "--trace", "same/tp2"], [*SAME[2], *LOAD, *TP2])
        script.run(1, [*tree, "--trace", "tree/tp1"], [])
        script.run(2, [*tree, "--trace", "tree/tp2"], TP2)
        found = {name: _judge(name, folder) for name in ("stock", "same", "tree")}
    (OUTPUT / "README.md").write_text(_readme(script, found, checkout), encoding="utf-8")


def _judge(name: str, folder: Path) -> Comparison:
    a, b = (folder / name / side for side in ("tp1", "tp2"))
    found = compare(a, b)
    write(found, a, b, OUTPUT / f"{name}.html")
    page = (OUTPUT / f"{name}.html").read_text(encoding="utf-8")
    (OUTPUT / f"{name}.html").write_text(page.replace(f"{folder}/", ""), encoding="utf-8")
    text = "\n".join(lines(found)).replace(f"{folder}/", "")
    (OUTPUT / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    summary = {**to_json(found), "a": f"{name}/tp1", "b": f"{name}/tp2"}
    tensors = [row for row in summary.pop("tensors") if row["verdict"] != "identical"]
    (OUTPUT / f"{name}.json").write_text(json.dumps({**summary, "tensors": tensors[:40]}, indent=1) + "\n")
    return found


def _readme(script: Script, found: dict[str, Comparison], checkout: Path) -> str:
    core = re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", (checkout / "megatron/core/package_info.py").read_text(), re.M)
    commands = [command for command in script.commands if "--perturb 2" not in command and "--perturb 3" not in command]
    rows = [("stock", "as the script comes"), ("same", "stock, from the same weights, padded alike"), ("tree", "tree")]
    table = [
        f"| {what} | {', '.join(script.losses[f'{name}/tp1'])} | {', '.join(script.losses[f'{name}/tp2'])} "
        f"| {found[name].verdict} | [{name}.txt]({name}.txt), [page]({name}.html) |"
        for name, what in rows
    ]
    return "\n".join(
        [
            "# Loss differs between one rank and TP=2: expected, or a silent failure?",
            "",
            "[Megatron-LM's issue 1736](https://github.com/NVIDIA/Megatron-LM/issues/1736) asks. Here its own "
            "`pretrain_gpt.py`, unmodified: 6 layers, hidden size 128, a vocabulary of 50257, float32, two steps on "
            f"mock data. Megatron-LM core {'.'.join(core)}, torch {version('torch')}, on two CPU cores (gloo); no GPU "
            "has been used. `python -m tests.studies.megatron_lm_1736 MEGATRON_LM` makes all of it, where six, triton "
            "and pybind11 are, which Megatron-LM wants.",
            "",
            "| run | losses at TP=1 | losses at TP=2 | verdict | |",
            "|---|---|---|---|---|",
            *table,
            "",
            "**As the script comes, the two runs are of different models**, so that the question of rounding does not "
            "arise: initial weights are other ones at another TP size, and a vocabulary that TP does not "
            "divide is padded to another size, whose padded logits are in the loss.",
            "",
            *(f"- {name}: {sentence(one)}" for name, one in found.items()),
            "",
            "Under `tree`, weights and padding do not depend on TP either, and both runs are the same bit for bit.",
            "",
            "## Commands",
            "",
            "A trace with `--perturb` 1, 2 and 3 says what rounding may do; where the verdict needs no estimate, it is "
            "not needed.",
            "",
            f'    MODEL="{" ".join(MODEL)}"',
            *(f"    {command}" for command in commands),
            *(f"    tpcheck compare {name}/tp1 {name}/tp2 --report {name}.html" for name in found),
            "",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
