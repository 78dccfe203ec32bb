"""The proof itself, on two kinds of machines at once: one digest across architectures and tensor-parallel sizes."""

from __future__ import annotations

import json

from slurm import submissions
from tests.slurm.real.case import Case, need_node_names, together


@together
def test_two_architectures_two_sizes_one_of_them_on_two_nodes_have_one_digest(case: Case) -> list[str]:
    need_node_names()
    case.write({"strategy": ["tree"], "tp": [1, 2], "arch": ["h100", "b300"]})
    assert "HELD: tree" in case.submit("--wait")
    (group,) = json.loads((case.out / "verdict.json").read_text())["groups"]
    assert group["status"] == "identical"
    nodes = {cell: nodes_of(case, cell) for cell in group["cells"]}
    assert all(name.startswith("h") for cell in ("tree-tp1-h100", "tree-tp2-h100") for name in nodes[cell])
    assert len(nodes["tree-tp2-h100"]) == 1  # two tasks of one node
    assert nodes["tree-tp2-b300"] == ["b1", "b2"]
    assert case.tpcheck("verdict", str(case.out)).returncode == 0

    case.submit("--wait")  # nothing is left to do
    assert all(case.attempts(cell) == 1 for cell in nodes)
    return list(nodes)


def nodes_of(case: Case, cell: str) -> list[str]:
    (attempt,) = submissions.attempts(case.out / cell)
    return case.cluster.run("scontrol", "show", "hostnames", attempt.nodes).split()
