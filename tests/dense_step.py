"""A small but real method for the engine's tests: a few gradient steps on a classifier's head, one committed unit a step."""

from __future__ import annotations

import torch

from trocar.anatomy import Anatomy, fingerprint
from trocar.core.config import Config
from trocar.evaluate import locality, outputs, success
from trocar.locate import How, Scores
from trocar.method import Estimate, Figure, Gallery, Job, Method, Outcome
from trocar.patch import Base, Patch, SparseReplace


class Settings(Config):
    """lr: step size; steps: how many; sabotage: break one of the engine's rules on purpose."""

    lr: float = 0.5
    steps: int = 4
    sabotage: str = ""


def _run(job: Job) -> Outcome:
    model, config, edit = job.model, job.config, job.data["edit"]
    anatomy = Anatomy.of(model)
    tower = anatomy.tower()
    parameter, name = tower.head.weight, f"{tower.head_path}.weight"
    before, base = parameter.detach().clone(), fingerprint(model)
    old = {role: outputs(model, rows) for role, rows in job.data.items()}
    losses = []
    try:
        for step in range(config.steps):

            def one(step: int = step) -> dict[str, torch.Tensor]:
                model.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(**edit.inputs).logits, edit.labels)
                loss.backward()
                weight = parameter.detach() - config.lr * parameter.grad
                model.zero_grad()
                return {"weight": weight, "loss": loss.detach()[None]}

            unit = job.work.tensors(f"step{step}", {"lr": config.lr, "step": step}, one)
            with torch.no_grad():
                parameter.copy_(unit["weight"])
            losses.append(float(unit["loss"]))
        after = parameter.detach().clone()
        new = {role: outputs(model, rows) for role, rows in job.data.items()}
        state = fingerprint(model)
    finally:
        if config.sabotage != "leave changed":
            with torch.no_grad():
                parameter.copy_(before)
    op = SparseReplace.between(name, before, after)
    ops = (op,) if op else ()
    states = ("another model" if config.sabotage == "wrong state" else base, state)
    measurements = [
        success(old[role], new[role], rows.labels, states) if role == "edit" else locality(old[role], new[role], states, role)
        for role, rows in job.data.items()
    ]

    def named(numbers: torch.Tensor) -> list[str]:
        return [job.class_names[number] for number in numbers.tolist()]

    moved = torch.linalg.vector_norm(after - before, dim=0)
    return Outcome(
        Patch(Base.of(model, ops), ops, method="dense-step", settings=config.model_dump()),
        measurements,
        {
            "head": Scores(
                "block", "", {f"L{layer}": float(moved[layer]) for layer in range(tower.n_layers)}, How("dense-step", "edit", {}, base)
            )
        },
        [Figure("loss", "Loss", "curve", "step", "loss", [{"step": i, "loss": loss} for i, loss in enumerate(losses)])],
        [
            Gallery(
                "edited",
                "Edited pictures",
                edit.pictures,
                *(named(side) for side in (old["edit"].argmax(1), new["edit"].argmax(1), edit.labels)),
            )
        ],
        {"last loss": losses[-1] if losses else None},
    )


def _estimate(job: Job) -> Estimate:
    return Estimate(10_000 * len(job.data["edit"]), 0.1 * job.config.steps, "a guess for tests")


METHOD = Method(
    name="dense-step",
    title="Dense step",
    paper="none",
    summary="a few gradient steps on the head",
    config=Settings,
    roles={"edit": "pictures to get right", "locality*": "pictures that must stay"},
    run=_run,
    estimate=_estimate,
    starter="version: 1\n",
    default_checks=({"measurement": "success", "op": ">=", "threshold": 0.5},),
)
