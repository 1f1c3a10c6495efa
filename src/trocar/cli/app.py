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
def quantise(
    model: Model,
    target: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration", "-c", help="Text to find scales and rotations on: a file, or a set as in wikitext2:valid.", show_default=False
        ),
    ],
    bits: Annotated[str, typer.Option(help="Of weights and activations: W4A4, W4A8, W6A6, W8A8, W4A16, ...")] = "W4A4",
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(complete.QUANTISERS)}. [dim]default: duquant-gptaq; of other forms duquant-gptq, folded or export[/dim]",
            autocompletion=complete.quantisers,
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="trocar (loads with load_quantised, loses nothing), compressed-tensors (transformers, vLLM), or float (rounded weights in "
            "a plain checkpoint)."
        ),
    ] = "trocar",
    transforms: Annotated[
        bool, typer.Option("--transforms", help="Of compressed-tensors: allow one rotation in front of each layer (vLLM only).")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Of calibration text.")] = 16,
    window_tokens: Annotated[int, typer.Option(min=2, help="Length of a window.")] = 512,
    column: Annotated[str, typer.Option(help="Of the calibration text, where it has several.")] = "text",
    block_size: Annotated[
        str | None, typer.Option(help="Of rotated blocks of channels. [dim]default: auto, up to 128[/dim]", show_default=False)
    ] = None,
    search_steps: Annotated[
        int | None, typer.Option(min=0, help="Of each search for a rotation. [dim]default: 16[/dim]", show_default=False)
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Other bits for a layer, 16 for float: L11.mlp.down=8. Repeatable.", metavar="LAYER=BITS")
    ] = None,
    attention: Annotated[
        int | None,
        typer.Option(min=2, max=15, help="Bits of queries, keys and values. [dim]default: float[/dim]", show_default=False),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change any setting, as in --set smoothing.alpha=0.5. Repeatable.", metavar="KEY=VALUE"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="To compute in; auto is the checkpoint's.", autocompletion=complete.dtypes)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto (the first accelerator).")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of the rotations.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantise weights and activations block by block, in the memory of one block; killed, the same command goes on where it stopped.

    Example: [bold]trocar quantise ./my-model ./my-model-w4a8 --calibration wikitext2:valid --bits W4A8[/bold]
    """
    from trocar.cli.quantising import Request, quantise_model

    asked = Request(
        model, target, calibration, bits, method, form, transforms, windows, window_tokens, column, block_size, search_steps,
        keep or [], attention, settings or [], dtype, device, seed,
    )  # fmt: skip
    quantise_model(asked, as_json)


@app.command("quantise-check")
def quantise_check(
    folder: Annotated[Path, typer.Argument(help="A folder that `trocar quantise` made, of any form.", show_default=False)],
    model: Annotated[str, typer.Argument(help="The float model.", autocompletion=complete.models, show_default=False)],
    text: Annotated[str, typer.Option("--text", "-t", help="Text that neither has seen: a file, or a set as in wikitext2:test.")],
    column: Annotated[str, typer.Option(help="Of the text, where it has several.")] = "text",
    windows: Annotated[int, typer.Option(min=1, help="Of the text.")] = 12,
    window_tokens: Annotated[int, typer.Option(min=2, help="Length of a window.")] = 512,
    execute: Annotated[str, typer.Option(help="How quantised layers compute: auto, simulated, integer, packed or float8.")] = "auto",
    prompt: Annotated[list[str] | None, typer.Option(help="Show how both go on from here. Repeatable.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a continuation.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of the float model.", autocompletion=complete.dtypes)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto (the first accelerator).")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of the interval.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure a quantised folder beside the float model: perplexity, speed, and what both write.

    Example: [bold]trocar quantise-check ./my-model-w4a8 ./my-model --text wikitext2:test --prompt "The capital of France is"[/bold]
    """
    from trocar.cli.quantised import Request, check_quantised

    asked = Request(folder, model, text, column, windows, window_tokens, execute, prompt or [], max_new_tokens, dtype, device, seed)
    check_quantised(asked, as_json)


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
