"""A script with Megatron-LM's training loop, as far as tracing it goes."""

from __future__ import annotations

from pathlib import Path

LOOP = """
import torch

def train_step(forward_step_func, data_iterator, model, optimizer):
    optimizer.zero_grad()
    forward_step_func(data_iterator, model[0]).backward()
    torch.nn.utils.clip_grad_norm_(model[0].parameters(), 0.01)
    optimizer.step()

def train(iterations):
    torch.manual_seed(0)
    model = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))]
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    model[0](torch.randn(3, 4)).sum().backward()
    for _ in range(iterations):
        train_step(lambda data, model: model(data).square().mean(), torch.randn(3, 4), model=model, optimizer=optimizer)
    with torch.no_grad():
        model[0](torch.randn(3, 4))
"""
SCRIPT = """
import sys
from megatron.training import training

if __name__ == "__main__":
    training.train(int(sys.argv[1]))
    sys.exit(int(sys.argv[2])) if len(sys.argv) > 2 else None
"""


def checkout(folder: Path) -> Path:
    """The script, in a folder that has the loop as `megatron.training.training`."""
    package = folder / "megatron/training"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "training.py").write_text(LOOP)
    (folder / "pretrain.py").write_text(SCRIPT)
    return folder / "pretrain.py"
