"""`pelton profile` and `pelton autopelt`: what methods cost here, and which of them each block should keep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pelton.search.autopelt import Found
    from pelton.search.latency_table import LatencyTable


def profile(
    backbone: Annotated[
        str, typer.Argument(help="A hub name, a local folder or pkg:package/folder.", show_default=False)
    ],
    shapes: Annotated[str, typer.Option(help="Examples x tokens of the inputs, by comma.")] = "1x32,8x64",
    methods: Annotated[
        str | None, typer.Option(help="Only these methods, by comma; all that the backbone takes if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="How often each runs.")] = 11,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is in the cache.")] = False,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The table; in the cache ($PELTON_CACHE) if not given.")
    ] = None,
) -> None:
    """Measure what each method costs in time and memory on this machine, next to the plain backbone."""
    from pelton.errors import unknown
    from pelton.search.latency_table import table_path
    from pelton.search.profile import default_probes, machine_of, profile

    sizes, probes = [_shape(text) for text in shapes.split(",")], None
    if methods is not None:
        names, known = [name.strip() for name in methods.split(",")], default_probes()
        for name in names:
            if name not in (spec.kind for spec in known):
                raise unknown("method", name, {spec.kind for spec in known})
        probes = [spec for spec in known if spec.kind in names]
    model = _load(backbone)
    found = profile(model, probes, shapes=sizes, rounds=rounds, again=again, path=table, tell=_tell)
    _show(found, sizes)
    print(table or table_path(machine_of(model)))


def autopelt(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe or a YAML file.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value, such as training.epochs=3."),
    ] = None,
    budget_params: Annotated[
        float | None, typer.Option(help="The most parameters of methods; up to 1 a share of all, such as 0.5.")
    ] = None,
    budget_latency: Annotated[
        float | None, typer.Option(help="The longest inference time, as a ratio to the plain backbone's: 1.05.")
    ] = None,
    alpha: Annotated[float, typer.Option(min=0.0, help="Weight of the expected latency, without a budget.")] = 0.0,
    beta: Annotated[float, typer.Option(min=0.0, help="Weight of the expected parameters, without a budget.")] = 0.0,
    sizes: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=N,N", help="Candidate sizes, such as lora=2,4,8; repeatable.")
    ] = None,
    choose: Annotated[
        Literal["method", "block"], typer.Option(help="Decide over each method, or one method a block at most.")
    ] = "method",
    bilevel: Annotated[bool, typer.Option("--bilevel", help="Gates learn from validation rows.")] = False,
    second_order: Annotated[
        bool, typer.Option("--second-order", help="With --bilevel: they look one step of the weights ahead.")
    ] = False,
    shape: Annotated[str, typer.Option(help="Examples x tokens of the inputs whose time counts.")] = "1x32",
    train: Annotated[
        bool,
        typer.Option("--train", help="Then train it, from scratch and from the search's weights; the better counts."),
    ] = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted search.")] = None,
) -> None:
    """Search which of a recipe's methods each block should keep; writes a recipe for `pelton fit`."""
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("give either a recipe or --resume RUN")
    from pelton.search.autopelt import resume_search, search
    from pelton.search.supernet import SearchSettings
    from pelton.training.fit import Interrupted
    from pelton.training.loading import load_recipe

    settings = SearchSettings(
        sizes=dict(_sizes(text) for text in sizes or []),
        choose=choose,
        bilevel=bilevel,
        second_order=second_order,
        alpha=alpha,
        beta=beta,
        budget_parameters=budget_params,
        budget_latency=budget_latency,
        shape=_shape(shape),
    )
    if resume is not None and (overrides or settings != SearchSettings()):
        raise typer.BadParameter("--resume goes on as the search began: of the other options only --train goes with it")
    try:
        if resume is not None:
            found = resume_search(resume, progress=True)
        else:
            found = search(load_recipe(str(recipe), overrides or []), settings, progress=True, tell=_tell)
    except Interrupted as error:
        print(f"pelton: Interrupted. Go on with: pelton autopelt --resume {error.folder}", file=sys.stderr)
        raise typer.Exit(130) from error
    _found(found)
    if train:
        _train(found)


def _train(found: Found) -> None:
    """Trains what was found, and prints how it went."""
    from pelton.search.finish import finish

    finished = finish(found, progress=True)
    for start, run in finished.runs.items():
        score = f"{finished.scores[start]:.4f} (validation)  " if start in finished.scores else ""
        better = "  better" if start == finished.best and len(finished.runs) > 1 else ""
        print(f"{start:<11}{score}{run.folder.path}{better}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shape(text: str) -> tuple[int, int]:
    rows, cross, tokens = text.strip().partition("x")
    if not (cross and rows.isdecimal() and tokens.isdecimal() and int(rows) and int(tokens)):
        raise typer.BadParameter(f"expected examples x tokens such as 8x64, but got {text!r}")
    return int(rows), int(tokens)


def _sizes(text: str) -> tuple[str, tuple[int, ...]]:
    kind, equals, numbers = text.partition("=")
    if not equals or not all(number.strip().isdecimal() for number in numbers.split(",")):
        raise typer.BadParameter(f"expected sizes such as lora=2,4,8, but got {text!r}")
    return kind.strip(), tuple(int(number) for number in numbers.split(","))


def _load(backbone: str) -> Any:
    import torch

    from pelton.training.backbone import load_plain, quiet

    with quiet():
        model = load_plain(backbone)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _show(table: LatencyTable, shapes: list[tuple[int, int]]) -> None:
    """Prints what was measured at some shapes, and how well the model of times does."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, padding=(0, 1))
    for name in ("method", "sites", "size", "inputs"):
        grid.add_column(name)
    for name in ("time a block", "whole model", "spread", "parameters", "kept in training"):
        grid.add_column(name, justify="right")
    for entry in table.entries:
        if (entry.rows, entry.tokens) in shapes:
            size = next((entry.spec[k] for k in ("rank", "bottleneck_size", "prefix_length") if k in entry.spec), "")
            cells = (f"{entry.seconds * 1e6:.0f} µs", f"{entry.ratio - 1:+.1%}", f"{entry.spread:.1%}")
            sites = " ".join(entry.spec["sites"])
            memory = f"{entry.kept / 2**20:.2f} MiB"
            shape = f"{entry.rows}x{entry.tokens}"
            grid.add_row(str(entry.spec["kind"]), sites, str(size), shape, *cells, f"{entry.parameters:,}", memory)
    console = Console(width=max(100, Console().width))
    console.print(grid)
    errors = [abs(error) for error in table.errors()]
    if not errors:
        return
    mean = sum(errors) / len(errors)
    console.print(
        f"\nWhat was not measured is estimated from its FLOPs; each measurement predicted from the others is off by "
        f"{mean:.1%} of the backbone's time in the mean, {max(errors):.1%} at most.",
        highlight=False,
        soft_wrap=True,
    )


def _found(found: Found) -> None:
    """Prints what a search ended with."""
    from rich.console import Console
    from rich.table import Table

    from pelton.search.picture import label

    console, architecture = Console(), found.architecture
    grid = Table(box=None, padding=(0, 1))
    grid.add_column("block")
    for spec in architecture.methods:
        grid.add_column(spec.kind, justify="right")
    for block in sorted({*architecture.blocks, *range(max(architecture.blocks, default=-1) + 1)}):
        grid.add_row(str(block), *(label(architecture, spec, block) or "–" for spec in architecture.methods))
    console.print(grid)
    most, slowest = found.full
    console.print(f"\n{'methods':<11}{found.parameters:,} of {most:,} parameters", highlight=False)
    if found.latency is not None:
        times = f"{found.latency:.3f} of {slowest:.3f} times the plain backbone, expected"
        console.print(f"{'inference':<11}{times}", highlight=False)
    for name, value in found.metrics.items():
        console.print(f"{name:<11}{value:.4f} (validation, weights of the search)", highlight=False)
    folder = found.run.folder.path
    console.print(f"{'picture':<11}{folder / 'architecture.png'}", highlight=False, soft_wrap=True)
    console.print(f"{'train it':<11}pelton fit {folder / 'architecture.yaml'}", highlight=False, soft_wrap=True)
    if found.metrics or any(architecture.blocks.values()):
        start = f"--set adapter.start={folder / 'derived'}"
        console.print(
            f"{'or go on':<11}pelton fit {folder / 'architecture.yaml'} {start}", highlight=False, soft_wrap=True
        )
