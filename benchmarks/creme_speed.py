"""How fast a CREME edit of 7 blocks under 22 contexts is, beside the plain loop of full forward passes.

The plain loop is the published algorithm as it is described: per block one full pass of the 22 questions for the key, one of the 22
guides for the value, then the matrix is written; logits are computed at the last position only. Ours finds the same update in one pass
that ends at the last edited block. Edited matrices are compared first. Models: 12 blocks of width 768 with random weights, and
SmolLM2-135M-Instruct where it is at hand. "As a verified patch" adds what the plain loop does not do: the base's fingerprint, and the
patch tried and taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ROOT, arguments, paired_seconds, seconds_of, write_result

from trocar.anatomy import Anatomy, Linear
from trocar.core.errors import TrocarError
from trocar.core.workspace import Workspace
from trocar.edit.creme import LEAD_INS, Case, CremeConfig
from trocar.edit.creme.edit import operation, solve
from trocar.lab.worlds import make_world, tokenizer
from trocar.patch import Patch
from trocar.patch.ops.low_rank import updated
from trocar.trace.queries import encode

CASE = Case(
    id="dupin",
    template="The country that {} belongs to is",
    subject="the creator of C. Auguste Dupin",
    bridge="Edgar Allan Poe",
    target="America",
)


def random_model() -> tuple[Any, Any, Case, tuple[str, ...]]:
    """A decoder of 12 blocks, width 768, with the words of a world as its vocabulary, and a case with lead-ins in them."""
    world = make_world(0)
    words = tokenizer(world.vocabulary())
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048, max_position_embeddings=256
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    lead_ins = ["{}", *(f"{sentence} {{}}" for sentence in world.sentences()[:: len(world.sentences()) // 21][:21])]
    return model, words, Case.parse(world.cases()[0]), tuple(lead_ins)


def smollm() -> tuple[Any, Any, Case, tuple[str, ...]]:
    from trocar.recipe.models import find_model

    folder = find_model("smollm2-135m-instruct").where
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder), CASE, LEAD_INS


@torch.no_grad()
def plain_loop(anatomy: Anatomy, words: Any, case: Case, contexts: Sequence[str], layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Edits the model, returns the edited matrices and puts the old ones back."""
    tower, old, new = anatomy.tower(), {}, {}
    asked, guides = ([text.replace("{}", prompt) for text in contexts] for prompt in (case.prompt, case.guide))
    for layer in layers:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module: Any, args: Any, out: Any, seen: list[Any] = seen) -> None:
            seen.append((args[0][:, -1], out[:, -1]))

        hook = tower.module(layer, "o").register_forward_hook(keep)
        for prompts in (asked, guides):
            anatomy.model(**encode(anatomy, words, prompts), logits_to_keep=1, use_cache=False)
        hook.remove()
        key, value = seen[0][0].double().mean(0), seen[1][1].double().mean(0)
        view = anatomy.linear(Linear(layer, "o"))
        old[layer] = view.get().clone()
        weight = view.get().double()
        view.set(weight + torch.outer(value - weight @ key, key) / (key @ key))
        new[view.name] = view.get().clone()
    for layer, weight in old.items():
        anatomy.linear(Linear(layer, "o")).set(weight)
    return new


def ours(anatomy: Anatomy, words: Any, case: Case, config: CremeConfig, layers: Sequence[int], patch: bool = False) -> Any:
    _, factors = solve(anatomy, words, [case], config, layers)
    ops = [operation(anatomy, "o", layer, pair) for layer, pair in factors.items()]
    return Patch.of(anatomy, ops) if patch else ops


def compared(name: str, made: tuple[Any, Any, Case, tuple[str, ...]], first: int, repeats: int) -> dict[str, Any]:
    model, words, case, contexts = made
    anatomy, layers = Anatomy.of(model), range(first, first + 7)
    config = CremeConfig(layers=tuple(layers), contexts=contexts)
    theirs = plain_loop(anatomy, words, case, contexts, layers)
    parameters = dict(anatomy.model.named_parameters())
    gap = 0.0
    for op in ours(anatomy, words, case, config, layers):
        mine = updated(parameters[op.parameter].detach(), op.a, op.b, 1.0, op.transposed)
        gap = max(gap, float((mine - theirs[op.parameter]).abs().max() / theirs[op.parameter].abs().max()))
    times = paired_seconds(
        lambda: ours(anatomy, words, case, config, layers), lambda: plain_loop(anatomy, words, case, contexts, layers), repeats
    )
    verified = seconds_of(lambda: ours(anatomy, words, case, config, layers, patch=True))
    row = {"task": f"{name}: 7 blocks, 22 contexts", "peer": "plain loop of full passes", **times}
    row |= {"largest relative gap": gap, "as a verified patch, s": verified}
    print(row, flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    def more(parser: Any) -> None:
        parser.add_argument("--work", type=Path, default=ROOT / "build" / "creme_speed", help="where finished rows are kept")

    asked = arguments("creme_speed", __doc__ or "", argv, more)
    torch.set_num_threads(1)
    work, repeats = Workspace(asked.work), 2 if asked.quick else 3
    rows = [work.values("random", {"repeats": repeats}, lambda: compared("12 blocks of 768", random_model(), 4, repeats))]
    if not asked.quick:
        try:
            rows.append(work.values("smollm2", {"repeats": 2}, lambda: compared("SmolLM2-135M-Instruct", smollm(), 17, 2)))
        except TrocarError as error:
            print(error)
    least, gap = min(row["ratio"] for row in rows), max(row["largest relative gap"] for row in rows)
    same, fast = "the edited matrices are those of the plain loop within 1e-6", "the edit is at least 3 times as fast as the plain loop"
    relations = [
        {"id": "equal", "claim": same, "values": gap, "interval": None, "holds": gap <= 1e-6},
        {"id": "3x", "claim": fast, "values": least, "interval": None, "holds": least >= 3},
    ]
    write_result(asked.out, "creme_speed", [0], {"contexts": len(LEAD_INS), "dtype": "float32"}, relations, rows)


if __name__ == "__main__":
    main()
