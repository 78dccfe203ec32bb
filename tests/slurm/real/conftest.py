"""A real Slurm for the tests in this folder, and those marked `@together` started at the same time.

Most of such a test goes by waiting: for a time limit, for Slurm to miss a node, for a requeued job to start. So they
are functions of a `Case` that run in threads; each test waits for its own, and compares digests with the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.slurm.real.case import Case, Digests, digests, train_here
from tests.support.slurm_cluster import Cluster, missing_programs

AT_ONCE = 6  # as many as two cores can bear


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_programs(accounting=True)
    for item in items:
        if item.path.parent.name == "real":
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1200))  # the first one waits for others, too
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"no Slurm on this machine: {missing[0]} is not installed"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Digests]]:
    """The digests that every cell must have: those of an uninterrupted run without Slurm."""
    folder = tmp_path_factory.mktemp("reference")
    run = train_here(folder)

    def get() -> Digests:
        assert run.wait(400) == 0
        return digests(folder / "run")

    yield get
    run.kill()


@pytest.fixture(scope="session")
def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[list[Digests]]]]:
    """The chosen scenarios, running or queued; the slowest stand first in their file."""
    chosen = [scenario for item in request.session.items if (scenario := getattr(item.obj, "scenario", None))]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {each.__name__: pool.submit(_run, each, tmp_path_factory.mktemp("sweep") / "s") for each in chosen}
        pool.shutdown(cancel_futures=True)


def _run(scenario: Callable[[Case], list[str]], folder: Path) -> list[Digests]:
    """Run it and read the digests of the cells that it names; when it fails, say all that is known."""
    with Cluster() as cluster:  # one for each: they break it
        case = Case(cluster, folder)
        try:
            return [digests(case.out / cell) for cell in scenario(case)]
        except pytest.skip.Exception:
            raise
        except BaseException as error:
            raise AssertionError(f"{error!r}\n{case.report()}") from error
