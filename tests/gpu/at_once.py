"""A pytest plugin: what failed is printed at once, for the run may be killed before its end."""

from __future__ import annotations

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed after {report.duration:.0f} s\n{report.longreprtext}", flush=True)
