"""The commands that do not belong to a group, and the groups. Floor 7. Import inside the commands: this file is read for `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trocar.cli import complete, lab, patch

app = typer.Typer(
    name="trocar",
    help="Keyhole surgery for pretrained transformers: find the few parts that matter, change only those, "
    "prove that the rest stayed as it was.",
    epilog="Start with: trocar demo. Shell completion: trocar --install-completion.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(patch.app, name="patch")
app.add_typer(lab.app, name="lab")


def _version(asked: bool) -> None:
    if asked:
        from trocar import __version__

        typer.echo(f"trocar {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also TROCAR_DEBUG=1).")] = False,
) -> None:
    pass  # `main` reads --debug itself, wherever it stands


Model = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, name under TROCAR_MODELS, lab:NAME or hub id.", autocompletion=complete.models, show_default=False
    ),
]


@app.command()
def inspect(
    model: Model,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", autocompletion=complete.dtypes)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show what a model is made of: blocks, heads, neurons, dtype, fingerprint.

    Example: [bold]trocar inspect lab:vit-cifar-rare[/bold]
    """
    from trocar.cli.inspect import inspect_model

    inspect_model(model, dtype, as_json)


@app.command()
def methods() -> None:
    """List the methods that a recipe can name.

    Example: [bold]trocar methods[/bold]
    """
    from trocar.cli import show
    from trocar.recipe.registry import METHODS

    show.table({"method": name, "kind": entry.kind, "what it does": entry.summary} for name, entry in METHODS.items())


@app.command()
def new(
    method: Annotated[str, typer.Argument(help="A name that `trocar methods` lists.", autocompletion=complete.methods, show_default=False)],
) -> None:
    """Print a commented recipe to start from.

    Example: [bold]trocar new where-to-edit > recipe.yaml[/bold]
    """
    from trocar.recipe.registry import get_method

    typer.echo(get_method(method).starter.rstrip())


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Run folder. [dim]default: the recipe's own, else runs/NAME[/dim]", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be loaded and predict memory and time.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one key, as in --set method.keep=0.1. Repeatable.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Run a recipe into a run folder; a killed run goes on where it stopped, a finished one is only shown.

    Exit code 1 if a check does not hold, 2 for bad input.

    Example: [bold]trocar run recipe.yaml --dry-run && trocar run recipe.yaml[/bold]
    """
    from trocar.cli.run import run_recipe

    run_recipe(recipe, output, dry_run, settings or [])


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write. [dim]default: report.html in the run folder[/dim]", show_default=False),
    ] = None,
) -> None:
    """Make the report again, from the run folder alone.

    Example: [bold]trocar report runs/where-to-edit[/bold]
    """
    from trocar.cli.run import make_report

    make_report(folder, output)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show machine, versions, kernels, devices, extras, models and data, and which method works with which format and engine.

    Put its output into every bug report.

    Example: [bold]trocar doctor[/bold]
    """
    from trocar.cli.doctor import show_doctor

    show_doctor(as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("trocar-demo"),
) -> None:
    """Fix a small vision transformer on photographs that it gets wrong, and show the proof.

    Needs no network: model and pictures come with the package.

    Example: [bold]trocar demo[/bold]
    """
    from trocar.cli.run import run_demo

    run_demo(output)
