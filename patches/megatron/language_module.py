"""megatron.core.models.common.language_module: an embedding that two pipeline stages hold copies of.

stage 0      embedding (copy) ── its gradient as an embedding ┐
                                                              ├─ one sum over both, in the order of no tree
last stage   output layer (copy) ── its gradient as a weight ─┘

Where sums over the batch have no order, this one has none either.
"""

from __future__ import annotations

from typing import Any

from patches.call_site import contract
from patches.contract import UnsupportedError
from patches.registry import attribute

__all__ = ["PATCHES"]


def _setup_embeddings(original: Any) -> Any:
    def setup_embeddings_and_output_layer(self: Any) -> None:
        stages = self.config.pipeline_model_parallel_size
        if stages > 1 and getattr(self.config, "mtp_num_layers", None):
            raise UnsupportedError(
                f"mtp_num_layers={self.config.mtp_num_layers} with pipeline_model_parallel_size={stages} is not "
                "covered, the embedding's gradient is then a sum over stages: set it to None, or use one stage"
            )
        if stages > 1 and self.share_embeddings_and_output_weights and not contract().order_free:
            raise UnsupportedError(
                f"share_embeddings_and_output_weights=True with pipeline_model_parallel_size={stages} is not covered, "
                "the embedding's gradient is then a sum over stages: use patches.enable(batch='order-free') "
                "(--batch order-free), set it to False (--untie-embeddings-and-output-weights), or use one stage"
            )
        original(self)

    return setup_embeddings_and_output_layer


PATCHES = [
    attribute(
        "shared-embedding",
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
        "refuses an embedding whose gradient is a sum over pipeline stages",
        _setup_embeddings,
        parameters="",
    ),
]
