"""`tpcheck study NAME`: refuse what cannot work, run the parts that are not on record, write the page.

output/<part>.json    a part's result, written when it is done: what was interrupted goes on from there
output/page.html      made from these, as README.md and picture.png
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from tpcheck.config.load import override, validated
from tpcheck.config.schema import directory
from tpcheck.errors import TpcheckError
from tpcheck.files import lock
from tpcheck.files.names import LOCK, STUDY_PAGE, STUDY_PICTURE, STUDY_README
from tpcheck.study import record
from tpcheck.study.display import Display
from tpcheck.study.html import to_html
from tpcheck.study.markdown import to_markdown
from tpcheck.study.study import Settings, Study

__all__ = ["command", "run_study"]

RESULTS = Path("results/studies")


def command(name: str, overrides: Sequence[str], output: Path | None, quick: bool) -> int:
    """Run the study called `name`, of `STUDIES`; 0 when its page is written."""
    folder = output or RESULTS / (f"{name}-quick" if quick else name)
    with warnings.catch_warnings():  # megatron-core's, that neither Apex nor Transformer Engine is installed
        warnings.simplefilter("ignore")
        study: Study = importlib.import_module(f"tpcheck.study.{name.replace('-', '_')}").STUDY
        run_study(study, overrides, folder, quick)
    print(f"page  {folder / STUDY_PAGE}")
    return 0


def run_study(study: Study, overrides: Sequence[str], output: Path, quick: bool) -> None:
    """Run `study` into the folder `output`.

    Raises:
        TpcheckError: settings that make no sense, a package that is missing, too little memory: before any work.
    """
    settings = _settings(study, overrides, quick)
    _require(study, settings, output)
    versions = record.versions(study)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with lock.hold(output / LOCK), Display(len(study.parts)) as display:
            records = _parts(study, settings, versions, output, display)
            _write_page(study, settings, records, output)
    except BlockingIOError:
        raise TpcheckError(f"{output} is being written by another study: wait for it, or name another") from None


def _settings(study: Study, overrides: Sequence[str], quick: bool) -> Settings:
    chosen = study.settings.quick() if quick else study.settings()
    values = chosen.model_dump()
    for text in overrides:
        override(values, text)
    return validated(study.settings, values, study.name)


def _require(study: Study, settings: Settings, output: Path) -> None:
    try:
        directory(str(output))
    except ValueError as error:
        raise TpcheckError(str(error)) from error
    if output.exists() and not output.is_dir():
        raise TpcheckError(f"{output} is a file: name another directory")
    if missing := [name for name in study.requires if find_spec(name) is None]:
        raise TpcheckError(f"{study.name} needs {', '.join(missing)}: pip install 'tpcheck[studies]'")
    needed, free = study.memory_gib(settings), psutil.virtual_memory().available / 2**30
    if needed > free:
        raise TpcheckError(
            f"{study.name} with these settings takes about {needed:.1f} GiB of memory and {free:.1f} are free: "
            f"use --quick, or smaller settings of {', '.join(study.settings.model_fields)}"
        )


def _parts(
    study: Study, settings: Settings, versions: Mapping[str, str], output: Path, display: Display
) -> dict[str, dict[str, Any]]:
    records = {}
    for part in study.parts:
        file = output / f"{part.name}.json"
        found = record.read(file, part, settings, versions)
        with display.part(part.name, on_record=found is not None) as progress:
            if found is None:
                started = time.monotonic()
                result = part.run(settings, progress)
                record.write(file, part, settings, versions, time.monotonic() - started, result)
                found = record.read(file, part, settings, versions)
                assert found is not None
        records[part.name] = found
    return records


def _write_page(study: Study, settings: Settings, records: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    results = {name: found["result"] for name, found in records.items()}
    page, findings = study.page(settings, results), study.findings(results)
    footer = record.footer(study, settings, records)
    (output / STUDY_PICTURE).write_bytes(page.picture.png)
    (output / STUDY_PAGE).write_text(to_html(study, page, findings, footer), encoding="utf-8")
    (output / STUDY_README).write_text(to_markdown(study, page, findings, footer), encoding="utf-8")
