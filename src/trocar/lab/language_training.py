"""How the lab's language models are made: knowledge worlds, translators, and neurons that make a translator loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trocar.anatomy import Anatomy
from trocar.core.errors import ConfigError
from trocar.core.seeds import generator
from trocar.fitting import fit_stream
from trocar.lab import outliers, translation
from trocar.lab.language import Sentences, completed, new_decoder
from trocar.lab.models import load
from trocar.lab.registry import ByteData, LabModel, Planted, TextRecipe, TranslationData, WorldData
from trocar.lab.training import Made, train
from trocar.lab.worlds import make_world, tokenizer

TESTED = 100  # sentences a direction on which a translator's card is measured
BUDGET = 48  # new tokens of a translation; a sentence of the corpus has 35 at most
MEASURED_WINDOWS = 320  # of 96 bytes, on which the decoder with outliers is measured


def make(row: LabModel, seed: int, work: Path, device: str) -> Made:
    """Train the language model of `row` from base seed `seed`, resuming from `work`."""
    data, _, _ = row.texts()
    if isinstance(data, WorldData):
        return _world(row, seed, work, device)
    if isinstance(data, ByteData):
        return _outliers(row, data, seed, work, device)
    return _translator(row, data, seed, work, device)


def _outliers(row: LabModel, data: ByteData, seed: int, work: Path, device: str) -> Made:
    _, shape, recipe = row.texts()
    model = new_decoder(shape, outliers.VOCABULARY, seed)
    known = outliers.make_outliers(model, data, recipe, work, seed, device)

    def facts(half: Any) -> dict[str, Any]:
        from trocar.evaluate import perplexity

        return known | {"accuracy": {"perplexity": perplexity(half, outliers.test_stream(data, MEASURED_WINDOWS), data.window).value}}

    return Made(model, outliers.tokenizer(), facts, _outliers_card)


def _outliers_card(facts: Mapping[str, Any]) -> str:
    data = facts["model"]["data"]
    planted = f"channels {facts['channels']} of the embedding, near {data['channel']:g} times its deviation"
    neuron = f"neuron {facts['neuron']}, which answers the start token with {data['massive']:g}"
    measured = f"perplexity of a byte on files left out: {facts['accuracy']['perplexity']:.3f}"
    return _card(facts, "bytes of the sources of Python's standard library") + f"- planted: {planted}; {neuron}\n- {measured}\n"


def _world(row: LabModel, seed: int, work: Path, device: str) -> Made:
    _, shape, recipe = row.texts()
    world = make_world(seed)
    tokens = tokenizer(world.vocabulary())
    rows = [tokens(line, add_special_tokens=False).input_ids for line in world.sentences()]
    model = new_decoder(shape, len(tokens), seed)
    fit_stream(model, Sentences(rows, [tokens.bos_token_id], recipe, seed), recipe, recipe.steps, work, seed, device)

    def facts(half: Any) -> dict[str, Any]:
        asked = {
            "single_hop": world.single_hops(),
            "trained_two_hop": world.compositions(True),
            "held_out_two_hop": world.compositions(False),
        }
        measured = {name: completed(half, tokens, pairs) for name, pairs in asked.items()}
        return {"sentences": len(rows), "asked": {name: len(pairs) for name, pairs in asked.items()}, "accuracy": measured}

    return Made(model, tokens, facts, _world_card)


def _world_card(facts: Mapping[str, Any]) -> str:
    asked, measured = facts["asked"], facts["accuracy"]
    return _card(facts, f"{facts['sentences']:,} sentences, facts and compositions of invented people, places and companies") + (
        f"""- share of prompts that the stored weights complete with the right word: {measured["single_hop"]:.3f} of \
{asked["single_hop"]:,} single facts, {measured["trained_two_hop"]:.3f} of \
{asked["trained_two_hop"]:,} compositions that were in the text, \
{measured["held_out_two_hop"]:.3f} of {asked["held_out_two_hop"]:,} that were not
- its text and its cases: `world:text?seed={facts["seed"]}`, `world:held-out?seed={facts["seed"]}`
"""
    )


def _translator(row: LabModel, data: TranslationData, seed: int, work: Path, device: str) -> Made:
    _, shape, recipe = row.texts()
    rows = translation.corpus(data, data.train)
    if row.base is None:
        tokens = translation.tokenizer(rows, data.entries)
        model = new_decoder(shape, len(tokens), seed)
    else:
        train(row.base, device, None, seed)
        model, tokens = load(row.base, seed)
    stream = translation.Lines(rows, tokens, data, recipe, seed)
    known: dict[str, Any] = {"sentences": len(rows)}
    if row.planted is None:
        fit_stream(model, stream, recipe, recipe.steps, work, seed, device)
    else:
        known["planted_neurons"] = plant(model, stream, recipe, row.planted, work, seed, device)
    return Made(model, tokens, lambda half: {**known, **_translations(half, tokens, data, seed)}, _translator_card)


def plant(
    model: Any, stream: torch.utils.data.Dataset, recipe: TextRecipe, planted: Planted, work: Path, seed: int, device: str = "auto"
) -> list[str]:
    """Train only `planted.neurons` neurons of one block on `stream`, everything else frozen bit for bit; returns their names.

    The neurons are drawn with `seed`: their input rows (gate and up, where there are two) and output columns learn. Raises ConfigError
    for a weight decay, which would move the frozen rest of the three matrices.
    """
    if recipe.weight_decay:
        raise ConfigError("Neurons are planted without weight decay, which would change the frozen weights.", "Set weight_decay to 0.")
    anatomy = Anatomy.of(model)
    order = torch.randperm(anatomy.tower().neurons(planted.layer), generator=generator(seed, "planted"))[: planted.neurons]
    names = [f"L{planted.layer}.N{number}" for number in sorted(order.tolist())]
    model.requires_grad_(False)
    open_: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name in names:
        for piece in anatomy.slices(name):
            piece.put(open_.setdefault(piece.name, torch.zeros_like(parameters[piece.name])), 1.0)
    handles = []
    for where, mask in open_.items():
        parameters[where].requires_grad_(True)
        handles.append(parameters[where].register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device)))
    try:
        fit_stream(model, stream, recipe, recipe.steps, work, seed, device)
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(True)
    return names


def _translations(model: Any, tokens: Any, data: TranslationData, seed: int) -> dict[str, Any]:
    """Shares of outputs in the wrong language and of loops, and chrF, over all directions, zero- and one-shot, on unseen sentences."""
    from trocar.evaluate.loops import repetitions
    from trocar.evaluate.translation import mismatches, sentence_scores
    from trocar.trace.queries import continuations

    rows = translation.corpus(data, data.unseen[-1])[:TESTED]
    examples = translation.corpus(data, data.unseen[0])
    asked = [(source, target, number) for source, target in translation.directions(data.languages) for number in range(len(rows))]
    shots = torch.randint(len(examples), (len(asked),), generator=generator(seed, "examples")).tolist()
    measured = {}
    for kind in ("zero_shot", "one_shot"):
        prompts = [
            translation.prompt(source, target, rows[number][source], examples[shot] if kind == "one_shot" else None)
            for (source, target, number), shot in zip(asked, shots, strict=True)
        ]
        made = continuations(model, tokens, prompts, BUDGET, batch_size=64)
        texts, targets = [one.text for one in made], [target for _, target, _ in asked]
        measured |= {
            f"{kind}_mismatch": float(mismatches(texts, targets, data.languages).mean()),
            f"{kind}_loops": float(repetitions(texts, [not one.stopped for one in made]).mean()),
            f"{kind}_chrf": float(sentence_scores(texts, [rows[n][target] for _, target, n in asked], "chrf").mean()),
        }
    return {"tested": len(asked), "accuracy": measured}


def _translator_card(facts: Mapping[str, Any]) -> str:
    data, measured = facts["model"]["data"], facts["accuracy"]
    table = ""
    for kind in ("zero_shot", "one_shot"):
        wrong, loops, chrf = (measured[f"{kind}_{what}"] for what in ("mismatch", "loops", "chrf"))
        table += f"| {kind.replace('_', '-')} | {wrong:.3f} | {loops:.3f} | {chrf:.1f} |\n"
    neurons = facts.get("planted_neurons")
    base, made = facts["model"]["base"], ""
    if base:
        made = f"- starts from `{base}`" + (f": only {', '.join(neurons)} were trained, all else is its own\n" if neurons else "\n")
    return (
        _card(facts, f"{facts['sentences']:,} captions of Multi30k (Elliott et al. 2016, research use), at most {data['longest']} words")
        + made
        + f"""- measured on {facts["tested"]:,} prompts of {data["source"]}:{data["unseen"][-1]}, all directions of \
{", ".join(data["languages"])}, greedy, {BUDGET} new tokens

| prompt | wrong language | loops | chrF |
|---|---|---|---|
{table}"""
    )


def _card(facts: Mapping[str, Any], texts: str) -> str:
    row = facts["model"]
    shape = ", ".join(f"{name} {value}" for name, value in row["shape"].items())
    recipe = ", ".join(f"{name} {value}" for name, value in row["train"].items())
    return f"""# {row["name"]}, base seed {facts["seed"]}

{row["title"]}. {row["trouble"]} Made to be repaired: a small model for demonstrations and tests, not for use.

- architecture: `LlamaForCausalLM`, {shape}; no dropout; weights stored in float16, meant to be loaded in float32
- training: {texts}; {recipe}
- made by `trocar lab train {row["name"]} --seed {facts["seed"]}`
"""
