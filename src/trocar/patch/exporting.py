"""Turn a patch into something that loads without Trocar: a Hugging Face checkpoint, or a PEFT adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from trocar.core.errors import ExportError, UnsupportedModelError
from trocar.patch.actions import Target
from trocar.patch.checkpoint import copy_others, match, new_folder, scan, skeleton
from trocar.patch.lora import combined
from trocar.patch.merge import GATE_INSTEAD, merge_into, wanted_fingerprints, written
from trocar.patch.patch import Applied, Patch, check_base, check_structure
from trocar.patch.peft_folder import write_folder
from trocar.patch.removal import refuse_inexpressible


def export(
    patch: Patch,
    model_or_folder: Any,
    target: str | os.PathLike[str],
    to: Literal["checkpoint", "peft"] = "checkpoint",
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write the patched model (`to="checkpoint"`) or the patch alone as a LoRA adapter (`to="peft"`): a folder that loads without Trocar.

    model_or_folder: the base, loaded or as a checkpoint's folder; a folder is rewritten shard by shard (`merge_into`), a loaded model is
    patched, saved with save_pretrained and restored. tokenizer_from: a folder whose other files (tokenizer, ...) are copied along.

    Raises PatchBaseError for another base and ExportError where the format cannot say what the patch does, with the alternative.
    """
    if to not in ("checkpoint", "peft"):
        raise ExportError(f"to='{to}' is not a format.", "Use 'checkpoint' or 'peft'.")
    is_folder = isinstance(model_or_folder, str | os.PathLike)
    if to == "checkpoint" and is_folder:
        merge_into(patch, model_or_folder, target)
        return
    model = skeleton(model_or_folder) if is_folder else model_or_folder
    plan = Target.of(model, patch.ops)
    if to == "peft":
        if is_folder:
            check_structure(patch, plan)
            match(model, wanted_fingerprints(patch, plan), scan(model_or_folder))
        else:
            check_base(patch, plan, "full")
        name = str(model_or_folder) if is_folder else getattr(model.config, "_name_or_path", "") or None
        write_folder(combined(patch, plan), target, name)
        return
    check_base(patch, plan, "full")
    steps = [written(op, plan) for op in patch.ops]
    applied = Applied(patch, plan, steps).start()
    try:
        if any(op.Record.removes for op in patch.ops):
            try:
                refuse_inexpressible(plan.model)
            except UnsupportedModelError as error:
                raise ExportError(f"The removal cannot be said in a plain checkpoint: {error.what}", GATE_INSTEAD) from None
        with new_folder(target) as folder:
            if tokenizer_from is not None:
                copy_others(Path(tokenizer_from), folder)
            plan.model.save_pretrained(folder)
    finally:
        applied.revert()
