"""A few cases of every kind: one line or a right answer, in ten seconds and 2 GiB, and nothing is executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import mutations
from tests.fuzz.cases import KINDS, Source, try_case

CASES = 15


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source.unpacked(tmp_path_factory.mktemp("source"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_is_told_in_a_line(kind: str, source: Source, tmp_path: Path) -> None:
    tried = [tried for seed in range(CASES) for tried in try_case(kind, seed, source, tmp_path)]
    assert [str(case) for case in tried if case.wrong] == []


@pytest.mark.parametrize("kind", ["run", "sweep", "profile", "trace"])
def test_what_is_not_mutated_is_no_error(
    kind: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("damage_yaml", "damage_bytes", "damage_json", "damage_lines"):
        monkeypatch.setattr(mutations, name, lambda content, rng: content)
    assert try_case(kind, 0, source, tmp_path)[0].code == 0
