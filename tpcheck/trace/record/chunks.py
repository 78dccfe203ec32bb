"""Parts of a model that one rank holds, under the names that they have in the whole model.

    pipeline of 2, virtual pipeline of 2      rank 0  embedding, layers.0 │ layers.0          stages 0 and 2
                                              rank 1  layers.0            │ layers.0, output  stages 1 and 3
                                              whole   decoder.layers.0 … decoder.layers.3

Megatron's layers know their number in the model. What a part of a model has under the name of the whole, such as the
hidden states that it hands to the next, or an embedding that only multi-token prediction looks into, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpcheck.trace.module_names import canonical
from tpcheck.trace.record.rank_layout import RankLayout

__all__ = ["Chunk", "chunks_of"]

EXPERT = re.compile(r"(.*\.local_experts)\.(\d+)(?=\.|$)")
GROUPED = re.compile(r"(.*\.experts)\.(.*?)(\d+)")  # a parameter of one layer that holds all of a rank's experts
LAYER = re.compile(r"(?:^|.*?\.)layers\.\d+(?=\.|$)")
# Its output is the main hidden states and the predicted ones, one after the other in every rank's share.
JOINED = "MultiTokenPredictionBlock"


@dataclass(frozen=True)
class Chunk:
    """One part; `stage` counts them as data flows, `first` and `last` say whether it is at an end."""

    model: torch.nn.Module
    stage: int = 0
    first: bool = True
    last: bool = True
    ep_rank: int = 0

    def modules(self) -> dict[str, torch.nn.Module]:
        """Modules by canonical name; of several that share one, as wrappers do with what they wrap, the innermost."""
        found = {canonical(name): module for name, module in self.model.named_modules()}
        whole_model = "whole model" if "model" in found else "model"  # Hugging Face's have a part of that name
        numbers = self._numbers()
        return {
            self._expert(_renumbered(name, numbers)) or whole_model: module
            for name, module in found.items()
            if not self._foreign(name) and type(module).__name__ != JOINED
        }

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by canonical name; the last stage's copy of tied embeddings is the first stage's parameter."""
        numbers, found = self._numbers(), {}
        for name, parameter in self.model.named_parameters():
            name = _renumbered(canonical(name), numbers)
            grouped = None if EXPERT.match(name) else GROUPED.fullmatch(name)
            if grouped:
                name = f"{grouped[1]}.local_experts.{grouped[3]}.{grouped[2]}"
            short = self._expert(name)
            tied = short == "output_layer.weight" and getattr(parameter, "shared_embedding", False)
            found["embedding.word_embeddings.weight" if tied and not self.first else short] = parameter
        return found

    def _expert(self, name: str) -> str:
        """`name` with an expert's number among those of all ranks."""
        found = EXPERT.match(name)
        if found is None or not self.ep_rank:
            return name
        own = self._experts_of_a_rank()
        return f"{found[1]}.{self.ep_rank * own + int(found[2])}{name[found.end() :]}"

    def _experts_of_a_rank(self) -> int:
        return next(int(m.num_local_experts) for m in self.model.modules() if hasattr(m, "num_local_experts"))  # type: ignore[arg-type]

    def _foreign(self, name: str) -> bool:
        if not self.last and name in ("", "decoder"):
            return True
        return not self.first and (name == "embedding" or name.startswith("embedding."))

    def _numbers(self) -> dict[str, int]:
        """The layers' numbers in the whole model, from 0, by their names in this part of it."""
        if self.first and self.last:
            return {}
        named = ((canonical(name), module) for name, module in self.model.named_modules())
        return {
            name: module.layer_number - 1
            for name, module in named
            if LAYER.fullmatch(name) and isinstance(getattr(module, "layer_number", None), int)
        }


def chunks_of(models: Sequence[torch.nn.Module], layout: RankLayout) -> list[Chunk]:
    """The parts of a model that this rank trains."""
    return [
        Chunk(
            model,
            number * layout.pp + layout.pp_rank,
            _end(model, "pre_process"),
            _end(model, "post_process"),
            layout.ep_rank,
        )
        for number, model in enumerate(models)
    ]


def _end(model: torch.nn.Module, flag: str) -> bool:
    return next((bool(getattr(module, flag)) for module in model.modules() if hasattr(module, flag)), True)


def _renumbered(name: str, numbers: dict[str, int]) -> str:
    found = LAYER.match(name)
    if found is None or found[0] not in numbers:
        return name
    return f"{found[0].rpartition('.')[0]}.{numbers[found[0]]}{name[found.end() :]}"
