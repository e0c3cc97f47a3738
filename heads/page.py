"""One run as one HTML page that needs no other file: what it is, what it reached, how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import pyarrow as pa
import pyarrow.parquet as pq

from featstore.errors import FormatError, InvalidInputError
from featstore.files import write_bytes
from featstore.store import locate
from heads import sections
from heads.evaluate import locate_run
from heads.runs import CURVES, Run
from heads.showcase import Scored, Showcase, choose, draw_showcase, read_scores
from heads.tasks import Task, build_task

PAGE = "page.html"
_PICTURES_A_GROUP = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PageReport:
    """The page that was written."""

    run_id: str
    path: str
    note: str  # what the reader of the page is told about its pictures, where there is something


def write_page(
    run: Run | str | Path,
    *,
    out: str | Path | None = None,
    store: str | Path | None = None,
    runs: str | Path | None = None,
    device: str = "auto",
) -> PageReport:
    """Write the page of a finished run.

    Args:
        run: A run, its folder, or with `store` or `runs` its id, the start of one, or "@last".
        out: Folder of the page, which is then named after the run; None: the run's own folder.
        store: The store; None: the one the run was trained from. Where it is gone, the pictures
            that the run itself holds are shown.
        runs: Folder of the runs, where it is not the store's own.
        device: Where to compute.

    Raises:
        NotFoundError: There is no such run.
        InvalidInputError: The run is not finished.
        FormatError: A file of the run is damaged.
        StorageError: The page cannot be written.
    """
    found = locate_run(run, store=store, runs=runs)
    if not found.is_finished:
        raise InvalidInputError(
            f"A page is made of a finished run. {found.run_id} is {found.status}; finish it with "
            f"`heads train --resume {found.run_id}`, or choose another."
        )
    task = build_task(found.record["task"], found.record["options"]["task"])
    scored: list[Scored] = []
    showcase = Showcase(pictures={}, note="Nothing was measured, so there is nothing to show.")
    if found.record["measured"] is not None:
        scored = read_scores(found, task)
        count = _PICTURES_A_GROUP
        chosen = choose(scored, is_lower_better=task.is_lower_better, count=count)
        named = None if store is None else locate(store)
        showcase = draw_showcase(found, chosen, store=named, device=device)
    text = page_html(found, task, scored, showcase)
    path = found.path / PAGE if out is None else Path(out) / f"{found.run_id}.html"
    write_bytes(path, text.encode())
    return PageReport(run_id=found.run_id, path=str(path), note=showcase.note)


def page_html(run: Run, task: Task, scored: Sequence[Scored], showcase: Showcase) -> str:
    """Put the page of a run together.

    Args:
        run: A finished run.
        task: Its task.
        scored: Its measured images.
        showcase: Their pictures.

    Raises:
        FormatError: The curves are missing or damaged.
    """
    record = run.record
    parts = [
        sections.metrics(record, task, scored),
        sections.curves(record, _read_curves(run)),
        sections.gallery(task, showcase),
        sections.configuration(record),
        sections.provenance(record),
    ]
    template = Template(files("heads").joinpath(PAGE).read_text(encoding="utf-8"))
    return template.substitute(
        title=sections.title(record),
        over=sections.over(record),
        heading=sections.heading(record),
        lead=sections.lead(record),
        score=sections.score(record, task),
        facts=sections.facts(record),
        sections="\n".join(part for part in parts if part),
    )


def _read_curves(run: Run) -> list[dict[str, object]]:
    try:
        lines: list[dict[str, object]] = pq.read_table(run.path / CURVES).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise FormatError(
            f"{run.path / CURVES} must hold the curves of a finished run. It is missing or damaged "
            f"({type(error).__name__}); train the run again."
        ) from error
    return lines
