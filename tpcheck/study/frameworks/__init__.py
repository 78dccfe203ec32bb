"""Four frameworks, one model: do they compute the same?

study.py         settings and parts; findings.py, page.py: what came of them
recipe.py        what a run is; runs.py: on ranks, one traced step or a training
hugging_face.py  DDP, DeepSpeed AutoTP, FSDP2 + DTensor; megatron.py: stock and patched
compare.py       traced steps, tensor by tensor (names.py: Megatron's among Hugging Face's)
"""

from tpcheck.study.frameworks.study import STUDY

__all__ = ["STUDY"]
