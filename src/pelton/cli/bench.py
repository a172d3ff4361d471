"""`pelton bench`: methods against each other, on tasks at several data sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

TASKS = "mrpc,rte,cola,sst2,stsb,conll2003,banking77"
METHODS = "full,head,lora,lora-all,lora-all-equal,bottleneck,prefix,ia3,bitfit,unipelt,pelton"


def bench(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with one folder a task; else GLUE from the hub.")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks, by comma.")] = TASKS,
    examples: Annotated[str, typer.Option(help="Training examples, by comma.")] = "100,500,1000",
    methods: Annotated[str, typer.Option(help="Methods, by comma.")] = METHODS,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 to this, without it.")] = 5,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Finished runs, one JSON line each.")] = Path("bench.jsonl"),
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Where tables and plots go.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Of every run; all-MiniLM-L6-v2 if not given.")] = None,
    precision: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of every run.")] = "fp32",
    attention: Annotated[str | None, typer.Option(help="Of every run: eager, sdpa …")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of every run; they grow with the data if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Train at most so many runs; 0 only reports.")] = None,
) -> None:
    """Compare methods; goes on where it was interrupted, and shares its work with others on the same file."""
    from pelton.bench.grid import Grid
    from pelton.bench.journal import Journal
    from pelton.bench.protocol import MINILM, Protocol
    from pelton.bench.report import markdown, write
    from pelton.bench.worker import progress, work

    place = None if data is None else str(data)
    protocol = Protocol(place, backbone or MINILM, precision=precision, attention=attention, fixed_steps=steps)
    grid = Grid(protocol, _names(tasks), _counts(examples), _names(methods), range(seeds))
    journal = Journal(out, needs=("task", "fingerprint"))
    if report is not None:
        _make(report)

    def tell(line: str) -> None:
        done, every = progress(grid, journal.records())
        print(f"[{done}/{every}] {line}", file=sys.stderr, flush=True)

    failed = work(grid, journal, tell, limit=limit).failed
    if not out.is_file():
        print(f"pelton: {out} is {'a folder' if out.is_dir() else 'no file yet'}: no run is finished.", file=sys.stderr)
    print(markdown(grid, journal.records()))
    if report is not None:
        for path in write(grid, journal.records(), report):
            print(path, file=sys.stderr)
    if failed:
        runs = "1 run" if len(failed) == 1 else f"{len(failed)} runs"
        why = "; ".join(dict.fromkeys(failed.values()))
        print(f"pelton: {runs} could not be trained: {why} The same command tries again.", file=sys.stderr)
        raise typer.Exit(1)


def _make(folder: Path) -> None:
    """Makes the report's folder before anything is trained for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(
            f"--report {folder} is no folder and cannot become one ({error.strerror}): name another."
        ) from error


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _counts(text: str) -> list[int]:
    for count in _names(text):
        if not count.isdecimal() or int(count) < 1:
            raise typer.BadParameter(f"expected numbers of examples such as 100,500, but got {text!r}")
    return [int(count) for count in _names(text)]
