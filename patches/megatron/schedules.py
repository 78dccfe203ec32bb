"""megatron.core.pipeline_parallel.schedules: what a loss function returns.

Two values are a mean over the micro-batch, which Megatron divides by the number of micro-batches before backward;
three are a sum over tokens, how many they are, and what to report. Only the latter is the same at every layout.
"""

from __future__ import annotations

from typing import Any

from patches.contract import UnsupportedError
from patches.registry import attribute

__all__ = ["PATCHES"]


def _calc_loss(original: Any) -> Any:
    def forward_step_calc_loss(
        model: Any, output_tensor: Any, loss_func: Any, config: Any, vp_stage: Any, collect_non_loss_data: bool,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        def sum_over_tokens(output: Any) -> Any:
            results = loss_func(output)
            if len(results) != 3:
                raise UnsupportedError(
                    f"batch='order-free': the loss function returned {len(results)} values, a mean over its "
                    "micro-batch: return three, the sum over tokens, their number (an integer tensor), what to report"
                )
            return results

        plain = loss_func is None or collect_non_loss_data
        function = loss_func if plain else sum_over_tokens
        return original(model, output_tensor, function, config, vp_stage, collect_non_loss_data, *args, **kwargs)

    return forward_step_calc_loss


PATCHES = [
    attribute(
        "loss-per-token",
        "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        "a mean over a micro-batch depends on its size",
        _calc_loss,
        parameters="model output_tensor loss_func config vp_stage collect_non_loss_data num_microbatches "
        "forward_data_store cp_group_size is_last_stage",
        order_free=True,
    )
]
