"""`trocar lab`: the small models to learn, test and demonstrate on. Floor 7."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trocar.cli import complete

app = typer.Typer(help="Small models with a known trouble, to learn, test and demonstrate on.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A name that `trocar lab list` shows.", autocompletion=complete.lab_models, show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Base seed: which part of the data was made rare, and the training's randomness.")]


@app.command("list")
def list_() -> None:
    """List the models, what is wrong with each, and where its weights are.

    Example: [bold]trocar lab list[/bold]
    """
    from trocar import lab
    from trocar.cli import show

    show.table(lab.list())


@app.command()
def show(name: Name, seed: Seed = 0) -> None:
    """Show everything about one model: data, shape, training, measured accuracy.

    Example: [bold]trocar lab show vit-cifar-rare[/bold]
    """
    from trocar import lab
    from trocar.cli import show as view

    facts = lab.show(name, seed)
    nested = {key: value for key, value in facts.items() if isinstance(value, dict)}
    view.pairs({key: value for key, value in facts.items() if key not in nested})
    for key, value in nested.items():
        view.line()
        view.pairs(value, key)


@app.command()
def train(
    name: Name,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. [dim]default: the lab's cache[/dim]", show_default=False)
    ] = None,
) -> None:
    """Train a model reproducibly; a killed training goes on at its last checkpoint. Needs the data set under TROCAR_DATA.

    Example: [bold]trocar lab train vit-pacs-rare --seed 1[/bold]
    """
    from trocar import lab
    from trocar.cli import show as view

    with view.interruptible():
        view.line(f"weights: {lab.train(name, device, output, seed)}")
