"""`python -m tests.silent_bugs`: the whole benchmark, or the cases whose names contain one of the arguments."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.silent_bugs import CASES
from tests.silent_bugs.benchmark import Answer, Benchmark, table, to_json

RESULTS = Path(__file__).parents[2] / "results" / "silent_bugs"


def main(wanted: list[str]) -> int:
    """Run, print as it goes, write the results if it was the whole benchmark; 1 if an answer is wrong or missing."""
    answers: list[Answer] = []
    ended = 0
    with tempfile.TemporaryDirectory(prefix="silent-bugs-") as folder:
        benchmark = Benchmark(Path(folder))
        for name, case in CASES.items():
            if not wanted or any(part in name for part in wanted):
                try:
                    answers.append(benchmark.answer(case))
                except Exception as error:
                    print(f"ERROR {name}: {str(error)[-300:]!r}", flush=True)
                    ended += 1
                    continue
                last = answers[-1]
                print(
                    f"{'ok   ' if last.right else 'WRONG'} {name}: {last.first_suspect or 'nothing'}; {last.why}",
                    flush=True,
                )
    if not wanted and not ended:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "table.md").write_text(table(answers), encoding="utf-8")
        (RESULTS / "results.json").write_text(json.dumps(to_json(answers), indent=1) + "\n", encoding="utf-8")
    return int(ended > 0 or not all(answer.right for answer in answers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
