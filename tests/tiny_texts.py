"""A small but real method for the engine's tests: push one neuron matrix of a language model so that prompts get other answers."""

from __future__ import annotations

import torch

from trocar.anatomy import Anatomy, fingerprint
from trocar.core.config import Config
from trocar.evaluate import QueryScores, query_measurements, relative_changes, relative_rows
from trocar.method import Estimate, Figure, Job, Method, Outcome, Transcript
from trocar.patch import Base, LowRank, Patch
from trocar.trace import record
from trocar.trace.queries import answer_scores, continuations, encode, next_tokens


class Settings(Config):
    """strength: step towards the answers' unembedding rows; layer: which MLP; sabotage: break one of the engine's rules on purpose."""

    strength: float = 8.0
    layer: int = 1
    sabotage: str = ""


def _run(job: Job) -> Outcome:
    model, words, config = job.model, job.processor, job.config
    anatomy, base = Anatomy.of(model), fingerprint(model)
    rows = {role: (examples.fields["prompt"], examples.fields["answer"]) for role, examples in job.data.items()}
    sets = [("edited" if role == "edit" else "unrelated", place) for role, (prompts, _) in rows.items() for place in range(len(prompts))]
    prompts = [prompt for own, _ in rows.values() for prompt in own]
    answers = [answer for _, own in rows.values() for answer in own]

    def ask(state: str) -> dict[str, torch.Tensor]:
        def one() -> dict[str, torch.Tensor]:
            return {"answer": answer_scores(anatomy, words, prompts, answers), "first": next_tokens(anatomy, words, prompts)}

        return job.work.tensors(f"scores-{state}", {"state": state}, one)

    def say() -> list[str]:
        return [text.text for text in continuations(anatomy, words, prompts, 4)]

    before, said = ask(base), job.work.values("said-before", {}, say)
    linear = anatomy.linear(f"L{config.layer}.mlp.down")

    def direction() -> dict[str, torch.Tensor]:
        head: torch.Tensor = anatomy.tower().head.weight.detach()  # type: ignore[union-attr]
        wanted = head[[words(" " + answer, add_special_tokens=False)["input_ids"][0] for answer in rows["edit"][1]]].mean(0)
        with torch.no_grad(), record(model, [f"L{config.layer}.neurons"]) as seen:
            model(**encode(model, words, rows["edit"][0]))
        key = seen[f"L{config.layer}.neurons"][:, -1].mean(0)
        return {"a": config.strength * wanted[None], "b": key[None] / key.square().sum()}

    unit = job.work.tensors("direction", {"strength": config.strength}, direction)
    ops = (LowRank(linear.name, unit["b"], unit["a"].T.contiguous(), linear.transposed),) if config.strength else ()
    patch = Patch(Base.of(model, ops), ops, method="tiny-texts", settings=config.model_dump())
    with patch.applied(model):
        state = fingerprint(model)
        after, now = ask(state), job.work.values("said-after", {"strength": config.strength}, say)
    names, cases = [name for name, _ in sets], [case for _, case in sets]
    was, became = (QueryScores(names, cases, side["answer"], first=side["first"]) for side in (before, after))
    rates = relative_rows(relative_changes(was, became))
    probes = {} if config.sabotage == "no probes" else {"edit": encode(model, words, rows["edit"][0])}
    return Outcome(
        patch,
        query_measurements(was, became, (base, state)),
        figures=[Figure("relative", "Relative changes", "table", "measured", "mean change", rates)],
        transcripts=[Transcript("answers", "Answers", prompts, said, now, answers)],
        log={"words": len(words)},
        probes=probes,
    )


METHOD = Method(
    name="tiny-texts",
    title="Push",
    paper="",
    summary="for tests",
    config=Settings,
    roles={"edit": "prompts to answer otherwise: `prompt`, `answer`", "keep?": "prompts to leave alone"},
    run=_run,
    estimate=lambda job: Estimate(1 << 20, 0.01 * sum(map(len, job.data.values())), "counted rows"),
    starter="# for tests",
    default_checks=[{"measurement": "correction", "statistic": "difference", "op": ">", "threshold": 0}],
    reads="texts",
)
