"""`trocar patch`: look at, apply, combine, compare, check and export changes. Floor 7."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trocar.cli import complete

app = typer.Typer(help="Look at a patch, apply it to a checkpoint, stack, compare, check and export patches.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="A patch file (.safetensors).", show_default=False)]
Model = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, name under TROCAR_MODELS, lab:NAME or hub id.", autocompletion=complete.models, show_default=False
    ),
]


@app.command()
def show(
    patch: File,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole header as JSON.")] = False,
) -> None:
    """Show what a patch changes, on which base, and what was measured when it was made. Reads the header only.

    Example: [bold]trocar patch show runs/where-to-edit/patch.safetensors[/bold]
    """
    from trocar.cli.patching import show_patch

    show_patch(patch, as_json)


@app.command()
def apply(
    patch: File,
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder of the new checkpoint.", show_default=False)],
) -> None:
    """Write a checkpoint with the patch merged in, shard by shard; the source stays as it is.

    Example: [bold]trocar patch apply patch.safetensors ./my-model ./my-model-fixed[/bold]
    """
    from trocar.cli.patching import apply_patch

    apply_patch(patch, model, output)


@app.command()
def stack(
    patches: Annotated[
        list[Path], typer.Argument(help="Two or more patches of one base, in the order of application.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Their base.", autocompletion=complete.models, show_default=False)],
    on_overlap: Annotated[str, typer.Option(help="refuse, or order: the later patch acts on what the earlier left.")] = "refuse",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write them as one patch.", show_default=False)] = None,
) -> None:
    """Report where patches of one base write the same place, and try them together. Exit code 2 if they overlap and that is refused.

    Example: [bold]trocar patch stack a.safetensors b.safetensors --model ./my-model -o both.safetensors[/bold]
    """
    from trocar.cli.patching import stack_patches

    stack_patches(patches, model, on_overlap, output)


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The model before.", autocompletion=complete.models, show_default=False)],
    edited: Annotated[str, typer.Argument(help="The model after.", autocompletion=complete.models, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The patch to write.")] = Path("patch.safetensors"),
) -> None:
    """Write the difference of two models of equal shape as a patch.

    Example: [bold]trocar patch diff ./base ./finetuned -o change.safetensors[/bold]
    """
    from trocar.cli.patching import diff_models

    diff_models(base, edited, output)


@app.command()
def check(
    patch: File,
    model: Model,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Also measure accuracy on the data roles of this recipe, before and after.", show_default=False),
    ] = None,
) -> None:
    """Apply the patch to the model, take it back, and compare: right base, something changed, base restored bit for bit.

    With a recipe, its data are measured before and after, and its checks judge them; exit code 1 if one does not hold.

    Example: [bold]trocar patch check patch.safetensors ./my-model[/bold]
    """
    from trocar.cli.patching import check_patch

    check_patch(patch, model, recipe)


@app.command()
def export(
    patch: File,
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="checkpoint (Hugging Face) or peft (an adapter, where the patch is one).")] = "checkpoint",
) -> None:
    """Write a patch in a form that loads without Trocar.

    Example: [bold]trocar patch export patch.safetensors ./my-model ./adapter --to peft[/bold]
    """
    from trocar.cli.patching import export_patch

    export_patch(patch, model, output, to)
