"""Where there is accounting, sacct knows how those jobs ended that the controller has forgotten."""

from __future__ import annotations

from tests.slurm.real.case import Case, together
from tests.support.slurm_cluster import Cluster
from tests.support.waiting import wait_for


@together
def test_sacct_tells_how_jobs_ended_that_the_controller_has_forgotten(case: Case) -> list[str]:
    with Cluster(accounting=True, min_job_age=2) as accounting:
        case.cluster = accounting
        case.write({"strategy": ["tree"], "tp": [1], "seed": [1234, 5], "arch": ["h100"]})
        good, bad = "tree-tp1-seed1234-h100", "tree-tp1-seed5-h100"
        with case.slowed(bad):
            case.submit()
            case.wait_for_step(bad, 1)
            accounting.run("scancel", case.jobs(bad)[0])
            wait_for(lambda: not case.ranks(bad), 240, "it to be cancelled")
        case.wait_until_complete(good)
        wait_for(lambda: not accounting.run("squeue", "-h", "-t", "all"), 240, "the controller to forget its jobs")
        status = case.tpcheck("status", str(case.out)).stdout
        (row,) = (line for line in status.splitlines() if bad in line)
        assert "cancelled" in row
        assert case.jobs(bad)[0] in row
        assert "sacct" not in status
    return [good]
