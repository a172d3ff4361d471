"""What the commands print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

if TYPE_CHECKING:
    import pandas as pd

    from pelton.anatomy import Anatomy, Block
    from pelton.compress.runs import Change
    from pelton.insight.drift import GateDrift
    from pelton.search.final import Final
    from pelton.search.recommend import Recommendation
    from pelton.search.study import Study
    from pelton.training.folder import RunFolder

# viridis from 0 to 1, as in the picture.
PLAIN = ("loss", "perplexity", "rmse", "loss_per_char", "bits_per_char")
RAMP = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


def result(folder: RunFolder) -> None:
    """Prints what a training gave: scores, trainable share, gates, where it is."""
    from pelton.insight.gates import gate_table

    console, values = Console(), folder.read("metrics")
    for split in ("validation", "test", "test_mismatched"):
        if split in values:
            console.print(f"{split:<11}{_scores(values[split])}", highlight=False)
    counts = values["parameters"]
    share = f"{counts['share']:.2%} ({counts['trainable']:,} of {counts['total']:,} parameters)"
    console.print(f"{'trainable':<11}{share}", highlight=False)
    if "pruning" in values:
        _pruned(console, values["pruning"])
    if folder.gate_values.is_file():
        console.print()
        gates(gate_table(folder.path), brief=True)
    for note in folder.read("data")["notes"]:
        console.print(Text(f"· {note}"), soft_wrap=True)
    console.print(f"\n{'run':<11}{folder.path}", highlight=False, soft_wrap=True)


def _pruned(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what went while a model learned."""
    (before, after), (most, left) = found["methods"], found["parameters"]
    console.print(f"{'pruned':<11}{before} → {after} methods, {most:,} → {left:,} parameters", highlight=False)
    for entry in found["rounds"]:
        gone = ", ".join(f"{one['kind']} in block {one['block']}" for one in entry["gone"])
        if gone:
            console.print(f"{'':<11}step {entry['step']}: {gone}", highlight=False, soft_wrap=True)


def _scores(values: Mapping[str, float]) -> str:
    """Writes shares as percentages, and what is no share (losses, perplexity, errors in the data's units) as it is."""
    shown = {name: value for name, value in values.items() if name != "score"}
    return "  ".join(f"{name} {value:.4g}" if name in PLAIN else f"{name} {value:.2%}" for name, value in shown.items())


def gates(table: pd.DataFrame, *, brief: bool = False) -> None:
    """Prints the effective weight of every method in every block; `brief` leaves the gate's kind out."""
    from pelton.insight.gates import block_labels, methods_of

    methods, original = methods_of(table), [name for name in ("original",) if name in table]
    grid = Table(box=None, title="mean gate value", title_justify="left", title_style="bold", padding=(0, 1))
    grid.add_column("block")
    for name in (*methods, *original, "sum"):
        grid.add_column(name, justify="right")
    for name in () if brief else ("requires_grad", "is_buffer"):
        grid.add_column(name)
    for label, (_, row) in zip(block_labels(table), table.iterrows(), strict=True):
        cells = [_gate_cell(float(row[name])) for name in (*methods, *original)]
        extra = () if brief else (str(row["requires_grad"]), str(row["is_buffer"]))
        grid.add_row(label, *cells, f"{row['sum']:.2f}", *extra)
    Console().print(grid)


def change(found: Change) -> None:
    """Prints what a pass did to a run: its metrics before and after, its parameters, what went."""
    console = Console()
    for when, values in (("before", found.before), ("after", found.after)):
        console.print(f"{when:<11}{_scores(values)}  ({found.split})", highlight=False, soft_wrap=True)
    before, after = found.parameters
    console.print(f"{'adapter':<11}{before:,} → {after:,} parameters", highlight=False)
    if found.latency is not None:
        times = f"{found.latency.before} → {found.latency.after} times the plain backbone"
        console.print(f"{'inference':<11}{times}", highlight=False, soft_wrap=True)
    for entry in found.gone:
        what = f"{entry.parameters:,} parameters, importance {entry.importance:.3g}"
        console.print(f"{'gone':<11}{entry.kind} in block {entry.block} ({what})", highlight=False, soft_wrap=True)


def drift(found: GateDrift) -> None:
    """Prints how far each gate has moved, the level, and what is due."""
    from pelton.insight.gates import block_labels

    grid = Table(box=None, padding=(0, 1))
    for name in ("block", "method"):
        grid.add_column(name)
    for name in ("then", "now", "PSI", "KS", "p"):
        grid.add_column(name, justify="right")
    grid.add_column("level")
    colours = {"stable": "", "watch": "yellow", "act": "red"}
    for block, row in zip(block_labels(found.table), found.table.to_dict("records"), strict=True):
        method = f"{row['method']} (pruned)" if row["pruned"] else str(row["method"])
        numbers = [f"{row[name]:.2f}" for name in ("reference", "live", "psi", "ks")]
        level = Text(str(row["level"]) if found.level != "unknown" else "–", style=colours[str(row["level"])])
        grid.add_row(block, method, *numbers, f"{row['p']:.2g}", level)
    console = Console()
    console.print(grid)
    before, now = found.examples
    console.print(f"\n{'examples':<11}{before:,} then, {now:,} now", highlight=False)
    console.print(f"{'level':<11}{found.level}", highlight=False)
    console.print(found.says, highlight=False, soft_wrap=True)


def predictions(found: Iterable[Any], output: Path | None) -> None:
    """Prints predictions as JSON lines, or writes them to a file."""
    from pelton.tasks.base import as_json

    lines = "".join(json.dumps(as_json(one), ensure_ascii=False) + "\n" for one in found)
    if output is None:
        sys.stdout.write(lines)
    else:
        output.write_text(lines, encoding="utf-8")


def written(paths: Sequence[Path]) -> None:
    """Prints what was written: the first path, and how many more."""
    more = f" and {len(paths) - 1} pictures" if len(paths) > 1 else ""
    print(f"{paths[0]}{more}")


def metrics(values: Mapping[str, float]) -> None:
    """Prints metrics as one JSON object."""
    print(json.dumps(values))


def recipes(found: Mapping[str, str]) -> None:
    """Prints the names of recipes and what they train."""
    grid = Table(box=None, padding=(0, 1))
    grid.add_column("recipe", style="bold")
    grid.add_column("what")
    for name, what in found.items():
        grid.add_row(name, Text(what))
    Console().print(grid)


def anatomy(name: str, found: Anatomy) -> None:
    """Prints the tree of blocks and sites; neighbours that look the same share a branch."""
    tree = Tree(Text(f"{name}: {len(found.blocks)} blocks"))
    for _, same in groupby(found.blocks, key=_appearance):
        blocks = list(same)
        span = blocks[0].name if len(blocks) == 1 else f"{blocks[0].name} … {blocks[-1].name} ({len(blocks)} blocks)"
        branch = tree.add(Text(f"{span}, {'causal' if blocks[0].causal else 'bidirectional'}", style="bold"))
        for site, places in blocks[0].sites.items():
            for place in places:
                branch.add(Text(f"{site:<9} {place.path}  {place.in_features} → {place.out_features}"))
        for site, reason in blocks[0].missing.items():
            branch.add(Text(f"{site:<9} none: {reason}", style="dim"))
    Console().print(tree, soft_wrap=True)


def _appearance(block: Block) -> tuple[object, ...]:
    return (block.stack, block.causal, tuple(block.sites.items()), tuple(block.missing.items()))


def _gate_cell(value: float) -> Text:
    """Writes a gate value on its colour; a method that the block lacks is a dash."""
    if value != value:
        return Text("–", style="dim")
    place = min(max(value, 0.0), 1.0) * (len(RAMP) - 1)
    return Text(f" {value:.2f} ", style=Style(color="black" if place > 3.0 else "white", bgcolor=RAMP[round(place)]))


def study(found: Study, final: Final | None) -> None:
    """Prints the best trials of a study, and beside them what fresh seeds give."""
    from pelton.search.report import describe

    console = Console()
    best = found.best()
    states: dict[str, int] = {}
    for lineage in found.trials():
        states[lineage.state] = states.get(lineage.state, 0) + 1
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    console.print(f"{'trials':<13}{counts}", highlight=False)
    for place, lineage in enumerate(best):
        name = "best" if len(best) == 1 else "front" if place == 0 else ""
        console.print(f"{name:<13}{describe(found, lineage)}", highlight=False, soft_wrap=True)
    if final is not None:
        seeds = f"{len(final.seeds)} fresh seeds"
        console.print(
            f"{'validation':<13}{final.metric} {final.validation} with {seeds}; the best trial's {final.best:.4f} was "
            "chosen for being high",
            highlight=False,
            soft_wrap=True,
        )
        if final.test is not None:
            console.print(f"{'test':<13}{final.metric} {final.test} with {seeds}", highlight=False)
        for seed, reason in final.failed.items():
            console.print(Text(f"· seed {seed} failed: {reason}"), soft_wrap=True)
    console.print(f"\n{'recipe':<13}{found.folder / 'best.yaml'}", highlight=False, soft_wrap=True)
    console.print(f"{'study':<13}{found.folder}", highlight=False, soft_wrap=True)


def recommendation(found: Recommendation) -> None:
    """Prints the rule by which a recipe was chosen, and the rows behind it."""
    console, grid = Console(), Table(box=None, padding=(0, 1))
    for line in found.rule:
        console.print(Text(f"· {line}"), soft_wrap=True)
    grid.add_column("method", style="bold")
    for name in ("score", "difference", "± error", "rate", "trainable"):
        grid.add_column(name, justify="right")
    for place, (method, row) in enumerate(found.rows.iterrows()):
        error = "–" if math.isnan(row["error"]) else f"{row['error']:.2f}"
        behind = ("", "") if place == 0 else (f"{row['difference']:+.2f}", error)
        grid.add_row(str(method), f"{row['score']:.2f}", *behind, f"{row['rate']:g}", f"{int(row['trainable']):,}")
    console.print(grid)
