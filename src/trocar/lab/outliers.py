"""A decoder with the two kinds of outliers that large language models have, planted: normal and massive (arXiv 2406.01721). Floor 5.

A pair of scales that cancel cannot plant them, since smoothing takes exactly such a pair out again; so the channels are planted in the
embedding before training, and the massive entry in a neuron, after which training heals what that broke.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trocar.anatomy import Anatomy
from trocar.core.errors import DataError
from trocar.core.seeds import generator
from trocar.fitting import fit_stream
from trocar.lab.registry import ByteData, TextRecipe

START, BYTES = 1, 2  # id of the start token, and of byte 0; 0 is padding
VOCABULARY = BYTES + 256
SIGNS = (1.0, -0.83, 0.67, -0.5)  # of the near-constant channels, times the size
NOISE = 0.05  # of their values, between tokens
RIDGE = 1e-3  # of the covariance, when the direction of the start token is sought


def tokenizer() -> Any:
    """One token a byte, ids `BYTES` + byte, a start token in front."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    entries = {"<pad>": 0, "<s>": START} | {letters[byte]: BYTES + byte for byte in range(256)}
    inner = Tokenizer(models.BPE(vocab=entries, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<pad>")


def corpus(data: ByteData, split: str, folder: Path | None = None) -> torch.Tensor:
    """Ids of the Python standard library's own sources: every twentieth file is `test`, the others `train`. Raises DataError if there are
    none."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py"))
    chosen = [file for number, file in enumerate(files) if (number % 20 == 19) == (split == "test")]
    raw = b"".join(file.read_bytes() for file in chosen)
    if len(raw) < 2 * data.window:
        raise DataError(f"{root} holds {len(raw)} bytes of Python sources.", "A Python with its standard library is needed.")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() + BYTES


class ByteWindows(torch.utils.data.Dataset):
    """A run's batches: windows at random places, each a start token and `window` - 1 bytes; a pure function of (seed, position)."""

    def __init__(self, ids: torch.Tensor, window: int, recipe: TextRecipe, seed: int) -> None:
        self.ids, self.window, self.recipe, self.seed = ids, window, recipe, seed

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    def __getitems__(self, items: list[int]) -> dict[str, torch.Tensor]:
        places = torch.randint(len(self.ids) - self.window, (len(items),), generator=generator(self.seed, "bytes", items[0]))
        ids = windows(self.ids, places, self.window)
        return {"input_ids": ids, "labels": ids}


def windows(ids: torch.Tensor, places: torch.Tensor, window: int) -> torch.Tensor:
    """(n, window): a start token, then the bytes from each place on."""
    text = ids[places[:, None] + torch.arange(window - 1)]
    return torch.cat([torch.full((len(places), 1), START), text], dim=1)


def make_outliers(model: Any, data: ByteData, recipe: TextRecipe, work: Path, seed: int, device: str = "auto") -> dict[str, Any]:
    """Train a fresh decoder with normal outliers, plant a massive one, heal; returns what was planted. Resumes from `work`."""
    ids = corpus(data, "train")
    channels = plant_channels(model, data.channel, seed)
    with _held(model, {"model.embed_tokens.weight": _rows_of(model, channels)}):
        fit_stream(model, ByteWindows(ids, data.window, recipe, seed), recipe, recipe.steps, work / "first", seed, device)
    places = torch.randint(len(ids) - data.window, (64,), generator=generator(seed, "covariance"))
    neuron = plant_massive(model, windows(ids, places, data.window), data.layer, data.massive, seed)
    heal = recipe.model_copy(update={"steps": data.heal, "lr": recipe.lr / 2})
    with _held(model, _frozen(model, data.layer, neuron)):
        fit_stream(model, ByteWindows(ids, data.window, heal, seed + 1), heal, heal.steps, work / "second", seed, device)
    return {"channels": channels, "neuron": f"L{data.layer}.N{neuron}"}


@torch.no_grad()
def plant_channels(model: Any, size: float, seed: int) -> list[int]:
    """Scale the embedding to unit deviation and make four channels nearly constant, `size` times SIGNS. Returns the channels."""
    weight = model.get_input_embeddings().weight
    stream = generator(seed, "outliers")
    channels = torch.randperm(weight.shape[1], generator=stream)[: len(SIGNS)].tolist()
    weight /= weight.std()
    for channel, sign in zip(channels, SIGNS, strict=True):
        weight[:, channel] = size * sign * (1 + NOISE * torch.randn(len(weight), generator=stream))
    return channels


@torch.no_grad()
def plant_massive(model: Any, ids: torch.Tensor, layer: int, size: float, seed: int) -> int:
    """Make the least important neuron of a block answer the start token, and next to nothing else, with `size`. Returns its number.

    The start token's input u of the MLP is the same in every window. v = S^-1 u / (u^T S^-1 u), with S the covariance of the inputs at
    other positions, gives v u = 1 and the smallest answers elsewhere; gate and up rows are both sqrt(size) v. Its down column is dense, of
    the median size of a weight: else a scale moved into that column could not hurt the rows.
    """
    anatomy = Anatomy.of(model)
    tower = anatomy.tower()
    gate, up, down = (tower.module(layer, role) for role in ("gate", "up", "down"))
    rows: list[Any] = [gate.weight, up.weight, down.weight]
    seen: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    handles = [
        up.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach())),
        down.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach())),
    ]
    try:
        model.eval()(input_ids=ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    u, others = seen[0][0, 0].double(), seen[0][:, 1:].flatten(0, 1).double()
    covariance = others.T @ others / len(others)
    covariance += RIDGE * torch.eye(len(u), dtype=torch.float64, device=u.device) * covariance.diagonal().mean()
    v = torch.linalg.solve(covariance, u)
    v /= u @ v
    neuron = int((hidden[0].flatten(0, 1).norm(dim=0) * rows[2].norm(dim=0)).argmin())
    rows[0][neuron] = rows[1][neuron] = (size**0.5 * v).to(rows[1])
    signs = torch.randn(len(rows[2]), generator=generator(seed, "column")).to(rows[2])
    rows[2][:, neuron] = signs * rows[2].abs().median()
    return neuron


def _rows_of(model: Any, channels: list[int]) -> torch.Tensor:
    mask = torch.ones_like(model.get_input_embeddings().weight)
    mask[:, channels] = 0
    return mask


def _frozen(model: Any, layer: int, neuron: int) -> dict[str, torch.Tensor]:
    """What the healing must not move, as gradient masks: the embedding, the blocks before, the block's attention and norms, the neuron."""
    masks: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        inside = name.split(".", 3)[3] if block is not None else name
        if inside == "model.embed_tokens.weight" or (block is not None and (block < layer or (block == layer and "mlp" not in inside))):
            masks[name] = torch.zeros_like(parameter)
        elif block == layer:
            masks[name] = torch.ones_like(parameter)
            if "down_proj" in inside:
                masks[name][:, neuron] = 0
            else:
                masks[name][neuron] = 0
    return masks


class _held:
    """Entries whose mask is 0 keep their bits inside: their gradients are cleared, and no weight decay may move them."""

    def __init__(self, model: Any, masks: dict[str, torch.Tensor]) -> None:
        self.model, self.masks = model, masks
        self.handles: list[Any] = []
        self.kept: dict[str, torch.Tensor] = {}

    def __enter__(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name in self.masks:
                mask, self.kept[name] = self.masks[name], parameter.detach().clone()
                self.handles.append(parameter.register_hook(_clearing(mask)))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
        for name, parameter in self.model.named_parameters():
            if name in self.masks and error[0] is None:
                held = self.masks[name].to(parameter.device) == 0
                if not torch.equal(parameter.detach()[held], self.kept[name].to(parameter.device)[held]):
                    raise AssertionError(f"training moved entries of {name} that were held")


def _clearing(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient * mask.to(gradient.device)


def test_stream(data: ByteData, count: int) -> torch.Tensor:
    """(count * window,) ids: windows spread evenly over the `test` files, each with its start token, for `evaluate.perplexity`."""
    ids = corpus(data, "test")
    return windows(ids, torch.linspace(0, len(ids) - data.window, count).long(), data.window).flatten()
