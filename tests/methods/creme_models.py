"""What the tests of CREME share: a small vocabulary, a case in it, and the edit as a plain loop of full passes."""

from __future__ import annotations

from typing import Any

import torch

from trocar.anatomy import Anatomy, Linear, tiny_model
from trocar.edit.creme import Case
from trocar.lab.worlds import tokenizer
from trocar.trace import record
from trocar.trace.queries import encode

WORDS = (
    *("the", "capital", "language", "river", "of", "home", "country", "city", "where", "a", "person", "is", "was", "born", "in"),
    *("norland", "sudland", "ostland", "oslo", "bern", "rome", "paris", "anna", "lee", "kim", "max", "note", "text", "yes", "we"),
    *("say", "that", "and", "here", "it", "says", "he", "she", "big", "old", "new", "town", "speaks", "english", "latin", "greek"),
)
TOKENIZER = tokenizer(sorted(WORDS))
CASE = Case(
    id="anna",
    template="the capital of {} is",
    subject="the home country of anna lee",
    bridge="norland",
    target="oslo",
    wrong="bern",
    first_hop="the home country of anna lee is",
)
OTHER = CASE.model_copy(update={"id": "max", "subject": "the country where max lee was born", "bridge": "sudland", "target": "rome"})
CONTEXTS = ("{}", "here it says that {}")
DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3"),
    *("gpt2", "gpt_neox", "gpt_neox-sequential", "opt", "opt-post-norm"),
)


def model_of(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    return tiny_model(name, "lm", seed=seed).to(dtype)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def last(model: Any, prompts: list[str], layer: int, role: str = "o") -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, values) at the last token, one full pass of each prompt by itself: (prompts, inputs), (prompts, outputs)."""
    kinds = ("heads", "attn_out") if role == "o" else ("neurons", "mlp_out")
    tower = Anatomy.of(model).tower(None if len(Anatomy.of(model).towers) == 1 else "text").name
    dot = f"{tower}." if tower else ""
    rows = []
    for prompt in prompts:
        with record(model, [f"{dot}L{layer}.{kind}" for kind in kinds]) as rec:
            model(**encode(model, TOKENIZER, [prompt]))
        rows.append([rec[f"{dot}L{layer}.{kind}"][0, -1].flatten().clone() for kind in kinds])
    return torch.stack([key for key, _ in rows]), torch.stack([value for _, value in rows])


@torch.no_grad()
def plain_loop(model: Any, case: Case, layers: list[int], contexts: tuple[str, ...], original: bool = False, role: str = "o") -> None:
    """The published algorithm with the identity, written as it is described; edits `model` itself."""
    asked = [text.replace("{}", case.prompt) for text in contexts]
    guides = [text.replace("{}", case.guide) for text in contexts]
    anatomy = Anatomy.of(model)
    tower = "" if len(anatomy.towers) == 1 else "text"
    values = {layer: last(model, guides, layer, role)[1].mean(0) for layer in layers}
    for layer in sorted(layers):
        key = last(model, asked, layer, role)[0].mean(0)
        value = values[layer] if original else last(model, guides, layer, role)[1].mean(0)
        view = anatomy.linear(Linear(layer, role, tower))  # type: ignore[arg-type]
        weight, bias = view.get().clone(), view.get_bias()
        residual = value - (0 if bias is None else bias) - weight @ key
        view.set(weight + torch.outer(residual, key) / (key @ key))


@torch.no_grad()
def logits(model: Any, prompt: str) -> torch.Tensor:
    return model(**encode(model, TOKENIZER, [prompt])).logits[0, -1]
