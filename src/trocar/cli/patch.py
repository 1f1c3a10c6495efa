"""`trocar patch`: look at, apply, stack, compare, check and export changes; combine and prune adapters. Floor 7."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trocar.cli import complete

app = typer.Typer(
    help="Look at a patch, apply it to a checkpoint, stack, compare, check and export patches; combine and prune adapters.",
    no_args_is_help=True,
)

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


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders, or patches that hold an adapter, of one base.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PEFT folder to write; a patch if it ends in .safetensors.", show_default=False)
    ],
    how: Annotated[str, typer.Option(help="fusion (of factors), mixture (of updates), aligned (then fused) or lego.")] = "fusion",
    weights: Annotated[
        str | None,
        typer.Option(help="One for each adapter, as in .5,.5; made to add up to 1. [dim]default: equal[/dim]", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the result, for mixture and lego. [dim]default: as the way has it[/dim]", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Their base; needed for a patch.", autocompletion=complete.models, show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of lego's clusters.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done to each module as JSON.")] = False,
) -> None:
    """Make one LoRA adapter of several, module by module, and say how far the parts were apart.

    Example: [bold]trocar patch combine ./seed0 ./seed1 --how mixture --rank 16 -o ./merged[/bold]
    """
    from trocar.cli.combining import combine_adapters

    combine_adapters(adapters, output, how, weights, rank, model, seed, as_json)


@app.command()
def prune(
    adapter: Annotated[Path, typer.Argument(help="A PEFT folder, or a patch that holds an adapter.", show_default=False)],
    keep: Annotated[
        str, typer.Option(help="everyother, otherhalf, low, middle, high (blocks), or groups by name, as in L0,L2.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PEFT folder to write; a patch if it ends in .safetensors.", show_default=False)
    ],
    by: Annotated[str, typer.Option(help="What a group is: block, module, role (q_proj) or tower.")] = "block",
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Its base; needed for a patch.", autocompletion=complete.models, show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done to each module as JSON.")] = False,
) -> None:
    """Keep some parts of a LoRA adapter and leave the rest of the model as its base has it.

    Example: [bold]trocar patch prune ./adapter --keep everyother -o ./half[/bold]
    """
    from trocar.cli.combining import prune_adapter

    prune_adapter(adapter, keep, output, by, model, as_json)
