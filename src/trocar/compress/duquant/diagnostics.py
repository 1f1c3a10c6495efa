"""Where a model's outliers are and what becomes of them: maps of channels by tokens, peaks, the evenness of blocks. Floor 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trocar.method import Figure
from trocar.patch.quantised import Transform
from trocar.patch.quantised.transform import rotate

CELLS = 40  # most rows and columns of a map; a cell shows the largest of its entries
SHOWN = 12  # inputs in the table of peaks


def captured(model: nn.Module, paths: Sequence[str], inputs: Mapping[str, torch.Tensor], rows: int = 1) -> dict[str, torch.Tensor]:
    """The inputs of modules on the first `rows` rows of `inputs`, (T, C) float32 each."""
    found: dict[str, torch.Tensor] = {}

    def hook(path: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[path] = args[0].detach().reshape(-1, args[0].shape[-1]).float().cpu()

        return seen

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        with torch.no_grad():
            model(**{name: value[:rows] for name, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return found


def stages(x: torch.Tensor, transform: Transform) -> dict[str, torch.Tensor]:
    """`x` (T, C) as the layer receives it and after each step of its transform, by the name of the step (`2 permuted`)."""
    found = {"0 received": x}
    if transform.scale is not None:
        x = x / transform.scale.to(x)
        found[f"{len(found)} scaled"] = x
    for step in transform.steps:
        turned = step.is_floating_point()
        x = rotate(x, step) if turned else x[..., step.to(x.device)]
        found[f"{len(found)} {'rotated' if turned else 'permuted'}"] = x
    return found


def block_variance(x: torch.Tensor, size: int) -> float:
    """How unevenly outliers lie on blocks: the variance over blocks of the mean of the channels' largest magnitudes."""
    return float(x.abs().amax(0).reshape(-1, size).mean(1).var(correction=0))


def prominence(x: torch.Tensor) -> float:
    """The largest magnitude as a multiple of the median one."""
    return float(x.abs().max() / x.abs().median().clamp(min=1e-12))


def outlier_map(x: torch.Tensor, identity: str, title: str, caption: str) -> Figure:
    """Channels by tokens as a figure: magnitudes in powers of ten above the median, neighbours joined to at most CELLS a side."""
    sizes = x.abs()
    tokens, channels = (-(-count // min(CELLS, count)) for count in sizes.shape)
    padded = nn.functional.pad(sizes, (0, -sizes.shape[1] % channels, 0, -sizes.shape[0] % tokens))
    cells = padded.unflatten(1, (-1, channels)).amax(2).unflatten(0, (-1, tokens)).amax(1)
    powers = (cells / sizes.median().clamp(min=1e-12)).clamp(min=1).log10()

    def span(index: int, width: int, count: int) -> str:
        first, last = index * width, min(count, (index + 1) * width) - 1
        return str(first) if first == last else f"{first}–{last}"

    rows = [
        {"channel": span(j, channels, sizes.shape[1]), "token": span(i, tokens, sizes.shape[0]), "powers of ten": float(powers[i, j])}
        for i in range(len(powers))
        for j in range(powers.shape[1])
    ]
    return Figure(identity, title, "heatmap", "channel", "token", rows, "powers of ten", caption=caption)


def outlier_figures(
    floats: Mapping[str, torch.Tensor], received: Mapping[str, torch.Tensor], transforms: Mapping[str, Transform]
) -> list[Figure]:
    """Maps of the input with the largest outliers in the float model, smoothed, and after all steps; a table of the most prominent ones.

    floats, received: inputs (T, C) of one layer of each group in the float and in the quantised model; transforms: of the same layers.
    """
    order = sorted(floats, key=lambda path: -prominence(floats[path]))
    worst = order[0]
    steps = stages(received[worst], transforms[worst])
    last = list(steps)[-1]
    shown = {
        "float": (floats[worst], "in the float model"),
        "received": (steps["0 received"], "as the quantised layer receives it, scales folded away"),
        "turned": (steps[last], "after all rotations and permutations"),
    }
    caption = "A cell is the largest of its entries, in powers of ten above the median of the whole input; one window of held-out text."
    found = [outlier_map(x, f"outliers_{name}", f"Input of {worst} {what}", caption) for name, (x, what) in shown.items()]
    table = []
    for path in order[:SHOWN]:
        row: dict[str, Any] = {"input of": path, "in the float model": f"{prominence(floats[path]):.3g}"}
        through = stages(received[path], transforms[path])
        row |= {"received": f"{prominence(through['0 received']):.3g}"}
        row["after the first step"] = f"{prominence(list(through.values())[min(1, len(through) - 1)]):.3g}"
        row["after all steps"] = f"{prominence(list(through.values())[-1]):.3g}"
        size = next((step.shape[-1] for step in transforms[path].steps if step.is_floating_point()), received[path].shape[1])
        row["block variance, received"] = f"{block_variance(through['0 received'], size):.3g}"
        row["block variance, after all steps"] = f"{block_variance(list(through.values())[-1], size):.3g}"
        table.append(row)
    caption = "Largest magnitude as a multiple of the median; variance over blocks of the mean of their channels' largest magnitudes."
    found.append(Figure("outliers", "Outliers before and after", "table", "input of", "after all steps", table, caption=caption))
    return found
