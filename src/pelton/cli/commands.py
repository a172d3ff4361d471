"""The commands. What takes long to import is imported when a command runs, so that `pelton --help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pelton.cli import compress
from pelton.cli.autopelt import autopelt, profile
from pelton.cli.bench import bench
from pelton.cli.data import data as data_commands
from pelton.cli.drift import drift
from pelton.cli.search import recommend, search
from pelton.version import __version__

app = typer.Typer(
    help="Gated parameter-efficient fine-tuning for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]


def require_place(path: Path) -> None:
    """Raises BadParameter where no file can be written at a path, before anything long begins."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: expected a file for --output")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} for {path.name}. Make it, or name another --output")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pelton {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Gated parameter-efficient fine-tuning for Hugging Face Transformers."""


@app.command()
def fit(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe or a YAML file.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value, such as training.epochs=3."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the run's folder is made.")] = None,
) -> None:
    """Train a recipe, or go on with a run."""
    if (recipe is None) == (resume is None):
        raise typer.BadParameter("give either a recipe or --resume RUN")
    if resume is not None and (overrides or output):
        raise typer.BadParameter("--resume goes on as the run began: --set and --output do not go with it")
    from pelton.cli import show
    from pelton.training import fit as training
    from pelton.training.folder import is_main_process
    from pelton.training.loading import load_recipe

    try:
        if resume is not None:
            run = training.resume(resume, progress=True)
        else:
            added = [] if output is None else [f"output={output}"]
            run = training.fit(load_recipe(str(recipe), [*(overrides or []), *added]), progress=True)
    except training.Interrupted as error:
        print(f"pelton: {error}", file=sys.stderr)
        raise typer.Exit(130) from error
    if is_main_process():
        show.result(run.folder)


@app.command()
def predict(
    run: RunPath,
    text: Annotated[
        list[str] | None, typer.Option(help="A text, such as one to classify, or an image's path; may be repeated.")
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option(help="Goes with each --text: a pair's second text, a question's context.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the task's columns, or images in a zip.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Where JSON lines go instead of the terminal; a folder where there are pictures to see."),
    ] = None,
) -> None:
    """Say what a run's model makes of texts or images; prints JSON lines, or draws masks and reconstructions."""
    if (text is None) == (file is None):
        raise typer.BadParameter("give either --text or --file")
    if len(pair or text or []) != len(text or []):
        raise typer.BadParameter("give one --pair for each --text")
    from pelton.cli import show
    from pelton.tasks.files import read_table
    from pelton.training.run import Run

    trained = Run.load(run)
    task = trained.task
    if output is not None and not task.draws:
        require_place(output)
    inputs = task.check_inputs(read_table(file)) if file is not None else task.from_texts(text or [], pair)
    found = trained.predict(inputs)
    if output is not None and task.draws:
        from pelton.insight.sheets import save_predictions

        show.written(save_predictions(inputs, found, output))
    else:
        show.predictions(found, output)


@app.command(name="eval")
def evaluate(
    run: RunPath,
    data: Annotated[Path | None, typer.Option(help="A labelled file; the run's own test split if not given.")] = None,
) -> None:
    """Compute a run's metrics; prints JSON."""
    from pelton.cli import show
    from pelton.tasks.files import read_table
    from pelton.training.run import Run

    trained = Run.load(run)
    show.metrics(trained.evaluate(trained.examples() if data is None else trained.task.check(read_table(data))))


@app.command()
def recipes() -> None:
    """List the recipes that come with Pelton."""
    from pelton.cli import show
    from pelton.training.loading import load_recipe, shipped_recipes

    show.recipes({name: load_recipe(name).description for name in shipped_recipes()})


@app.command()
def gates(
    run: Annotated[Path, typer.Argument(help="A run's folder, or that of a saved adapter whose gates are constant.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the heat map block × method.")] = None,
) -> None:
    """Show how open each method is in each block of a run or a saved adapter."""
    from pelton.cli import show
    from pelton.insight.gates import gate_table, plot_gates
    from pelton.tuner.summary import saved_gates

    table = saved_gates(run) if (run / "adapter_config.json").is_file() else gate_table(run)
    show.gates(table)
    if plot is not None:
        plot_gates(table, plot)
        print(plot)


@app.command()
def pictures(
    run: RunPath,
    output: Annotated[Path | None, typer.Option(metavar="FILE.png", help="RUN/pictures.png if not given.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Examples, a row each.")] = 6,
) -> None:
    """Draw test images beside what a run makes of them: masks and truth, or what was hidden and its reconstruction."""
    from PIL import Image

    from pelton.insight.sheets import run_sheet
    from pelton.training.run import Run

    path = run / "pictures.png" if output is None else output
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise typer.BadParameter(f"{path} is no picture's name: expected an ending such as .png or .jpg")
    if output is not None:
        require_place(output)
    run_sheet(Run.load(run), count).save(path)
    print(path)


app.command()(compress.freeze)
app.command()(compress.prune)
app.command()(compress.shrink)
app.command()(compress.revive)
app.command()(compress.fold)
app.command()(compress.combine)
app.command()(compress.convert)
app.command()(drift)
app.command()(bench)
app.command()(search)
app.command()(recommend)
app.command()(profile)
app.command()(autopelt)
app.add_typer(data_commands, name="data")


@app.command()
def anatomy(
    model: Annotated[
        str, typer.Argument(help="A hub name, a local folder or pkg:package/folder; only its config is read.")
    ],
) -> None:
    """Show the blocks and sites of a model."""
    from pelton.anatomy import find_anatomy
    from pelton.cli import show
    from pelton.training.backbone import load_skeleton

    show.anatomy(model, find_anatomy(load_skeleton(model)))
