"""What tensor parallelism sends: counted on real ranks and on paper, timed, and what drops some of it.

loss         parameters and initial loss of the model   collectives  of a step and of a layer, against `tpcheck cost`
times        of each collective on this machine         sums         in bfloat16, in float32, by the tree
spd          a trained model with sums left out
"""

from __future__ import annotations

from tpcheck.study.communication.collectives import collectives, times
from tpcheck.study.communication.findings import findings
from tpcheck.study.communication.loss import initial_loss
from tpcheck.study.communication.page import page
from tpcheck.study.communication.settings import Communication
from tpcheck.study.communication.spd import spd
from tpcheck.study.communication.sums import sums
from tpcheck.study.study import Part, Study

__all__ = ["STUDY"]

SHAPE = ("layers", "hidden", "vocabulary", "seq_length")
TRAINED = ("trained_layers", "trained_hidden", "trained_length", "batch", "steps")

STUDY = Study(
    name="communication",
    question="What does tensor parallelism cost in communication, and what can be left out?",
    settings=Communication,
    requires=(),
    memory_gib=Communication.gib,
    parts=(
        Part("loss", initial_loss, (*SHAPE, "seeds")),
        Part("collectives", collectives, SHAPE),
        Part("times", times, ("seq_length", "hidden", "repeats")),
        Part("sums", sums, ("seq_length", "hidden")),
        Part("spd", spd, TRAINED),
    ),
    page=page,
    findings=findings,
)
