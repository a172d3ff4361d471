"""`pelton data`: what is in a data set, before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pelton.tasks.findings import DataReport, SplitReport

data = typer.Typer(help="Look at data before a run.", no_args_is_help=True)
FEW = 10
"""Up to so many classes are listed with their counts."""


@data.callback()
def _group() -> None:
    """Look at data before a run."""


@data.command()
def check(
    source: Annotated[
        str, typer.Argument(metavar="FILE_OR_RECIPE", help="A data file or folder, a hub name or a recipe.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="As in a recipe, such as task.kind=text-regression."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Count this backbone's tokens; words if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell lengths, label balance, repeated rows, overlap of splits and useless columns; exits 2 on broken data."""
    from pelton.training.examine import examine

    path = Path(source).expanduser()
    report = examine(str(path) if path.exists() else source, overrides or [], backbone)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        _print(report)


def _print(report: DataReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    grid = Table(box=None, title=f"read as {report.kind}", title_justify="left", title_style="bold", padding=(0, 1))
    grid.add_column("")
    for split in report.splits:
        grid.add_column(split, justify="right")
    columns = [dict(_lines(report, split)) for split in report.splits]
    for name in dict.fromkeys(name for column in columns for name in column):
        grid.add_row(name, *(Text(column.get(name, "–")) for column in columns))
    console.print(grid)
    for finding in (*_findings(report), *report.notes):
        console.print(Text(f"· {finding}"), soft_wrap=True)


def _lines(report: DataReport, split: str) -> Iterator[tuple[str, str]]:
    """Returns what the table says of one split."""
    found = report.splits[split]
    yield "rows", f"{found.rows:,}"
    if found.lengths is not None:
        of = found.lengths
        yield f"{of.unit}: min", str(of.smallest)
        yield f"{of.unit}: median", f"{of.median:g}"
        yield f"{of.unit}: 95 %", f"{of.p95:g}"
        yield f"{of.unit}: max", str(of.largest)
        if of.cut is not None:
            least = "" if of.unit == "tokens" else "≥ "
            yield f"cut at {of.max_length} tokens", f"{least}{of.cut:.1%}"
    yield from _targets(found)
    if found.duplicates is not None:
        yield "repeated inputs", f"{found.duplicates:,}"
        yield "inputs with different targets", f"{found.conflicts:,}"
    if split in report.overlaps:
        yield "also in train", f"{report.overlaps[split].rows:,} ({report.overlaps[split].share:.1%})"


def _targets(found: SplitReport) -> Iterator[tuple[str, str]]:
    if found.values is not None:
        of = found.values
        yield "target: min … max", f"{of.smallest:g} … {of.largest:g}"
        yield "target: mean ± deviation", f"{of.mean:.3g} ± {of.deviation:.3g}"
    if found.balance is not None:
        counts = found.balance.counts
        total = sum(counts.values())
        yield "classes", str(len(counts))
        yield "most common", f"{found.balance.commonest[0]} {found.balance.commonest[1]:.1%}"
        yield "rarest", f"{found.balance.rarest[0]} {found.balance.rarest[1]:.1%}"
        if len(counts) <= FEW:
            yield from ((f"  {name}", f"{count:,} ({count / total:.1%})") for name, count in sorted(counts.items()))


def _findings(report: DataReport) -> Iterator[str]:
    """Returns what is worth a look, in sentences."""
    for split, found in report.splits.items():
        for conflict in found.examples:
            where = ", ".join(conflict.places[:FEW])
            yield f"{split}: {conflict.text[:80]!r} has the targets {', '.join(conflict.targets)} ({where})."
        if found.conflicts > len(found.examples):
            yield f"{split}: {found.conflicts - len(found.examples)} more input(s) with different targets."
        if found.balance is not None and len(found.balance.counts) == 1:
            yield f"{split}: all rows have one class."
        yield from (f"{split}: the column {name!r} is empty." for name in found.empty)
        yield from (f"{split}: the column {name!r} has one value in all rows." for name in found.constant)
    for split, shared in report.overlaps.items():
        if shared.rows:
            yield f"{split}: {shared.rows} inputs are also in train ({', '.join(shared.places)} …)."
