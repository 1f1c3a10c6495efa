"""What merging two LoRA adapters of a 7B-shaped model takes: seconds, and the memory of a process of its own.

Two random adapters of Llama-2-7B's shapes (32 blocks, width 4096, MLP 11008, rank 16 and 64, all linear maps) lie in PEFT folders and are
combined into a third, module by module. Beside it peft's `add_weighted_adapter(combination_type="svd")` on one module of that size, which
decomposes the dense matrix; the updates of both are compared first. One thread, and processor time, since machines are
busy; no base model is needed, and none is loaded.

python benchmarks/merge_memory.py [--quick] [--out FILE]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, arguments, seconds_of, write_result

from trocar.patch.combine import mixture
from trocar.patch.ops.adapter import Adapter, Factors
from trocar.patch.peft_folder import Shape, write_modules

LIMIT = 2 * 1024**3
WIDTH, MLP = 4096, 11008
SIZES = {**{f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}, "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH)}
SIZES["mlp.down_proj"] = (WIDTH, MLP)  # (outputs, inputs)
WAYS = (
    ("fusion", "fusion", None),
    ("mixture, ranks add up", "mixture", None),
    ("mixture, best of one rank", "mixture", 1),
    ("aligned fusion", "aligned", None),
    ("LoRA-LEGO", "lego", None),
)
# the peak is read in the process that does the work, so that what made the adapters does not count
CHILD = """
import json, resource, sys, time, torch
torch.set_num_threads(1)
from trocar.patch.combine import combine_folders
floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
rows = combine_folders(sys.argv[1:3], sys.argv[3], sys.argv[4], rank=int(sys.argv[5]) or None)
seconds = time.process_time() - start
print(json.dumps([seconds, floor * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, len(rows)]))
"""


def write_adapter(folder: Path, rank: int, blocks: int, seed: int) -> None:
    """A random adapter in bfloat16, as trained ones are shipped."""
    draw = torch.Generator().manual_seed(seed)
    names = {f"model.layers.{block}.{name}": size for block in range(blocks) for name, size in SIZES.items()}
    shapes = {name: Shape(rank, out, into, 2.0, False, torch.bfloat16) for name, (out, into) in names.items()}

    def factors(name: str) -> Factors:
        out, into = names[name]
        a, b = torch.randn(rank, into, generator=draw), torch.randn(out, rank, generator=draw)
        return Factors(a.bfloat16(), b.bfloat16(), 2.0)

    write_modules(folder, shapes, factors)


def merged(folder: Path, rank: int) -> Iterator[dict[str, Any]]:
    """Every way, each in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "TROCAR_PROGRESS": "0"}
    read = sum((folder / name / "adapter_model.safetensors").stat().st_size for name in ("first", "second"))
    for number, (label, how, narrow) in enumerate(WAYS):
        words = [str(folder / name) for name in ("first", "second", f"made-{number}")]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *words, how, str(rank if narrow else 0)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, floor, peak, modules = json.loads(done.stdout.splitlines()[-1])
        yield {
            "way": label, "rank": rank, "modules": modules, "processor seconds": round(seconds, 1), "peak GiB": round(peak / 2**30, 3),
            "of it before the work GiB": round(floor / 2**30, 3), "adapters read GiB": round(read / 2**30, 3), "bytes": peak,
        }  # fmt: skip


def beside_peft(size: int, rank: int) -> dict[str, Any]:
    """One linear map of size x size: peft's dense decomposition and ours of the factors, the updates equal first."""
    import peft

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(size, size, bias=False)

    draw = torch.Generator().manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"])
    model = peft.get_peft_model(One(), config, "first")
    model.add_adapter("second", config)
    layer: Any = model.get_submodule("base_model.model.q_proj")
    adapters = []
    for name in ("first", "second"):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        a.data.copy_(torch.randn(a.shape, generator=draw) / size**0.5)
        b.data.copy_(torch.randn(b.shape, generator=draw))
        adapters.append(Adapter({"q_proj": Factors(a, b, float(layer.scaling[name]))}))
    spent = seconds_of(
        lambda: model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "made", combination_type="svd", svd_rank=rank),
        time.process_time,
    )
    theirs = layer.get_delta_weight("made")
    start, repeats = time.process_time(), 3
    for _ in range(repeats):
        made = mixture(adapters, rank=rank)
    ours = (time.process_time() - start) / repeats
    factors = made.adapter.factors["q_proj"]
    gap = float((factors.scale * factors.b @ factors.a - theirs).norm() / theirs.norm())
    return {"size": size, "rank": rank, "ours_s": ours, "peer_s": spent, "relative difference": gap}


def main() -> None:
    asked = arguments("merge_memory", __doc__ or "")
    torch.set_num_threads(1)
    blocks, ranks = (2, (16,)) if asked.quick else (32, (16, 64))
    rows = []
    for rank in ranks:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for seed, name in enumerate(("first", "second")):
                write_adapter(folder / name, rank, blocks, seed)
            for row in merged(folder, rank):
                rows.append(row)
                print(row, flush=True)
    sizes = (512,) if asked.quick else (1024, WIDTH)
    beside = [beside_peft(size, 16) for size in sizes]
    worst, gap = max(row.pop("bytes") for row in rows), max(row["relative difference"] for row in beside)
    relations = [
        {
            "id": "memory",
            "claim": f"merging two adapters of {blocks} blocks of Llama-2-7B's shapes (rank {ranks[-1]}) stays under 2 GiB",
            "values": {"highest peak GiB": worst / 2**30},
            "interval": None,
            "holds": worst < LIMIT,
        },
        {
            "id": "equal",
            "claim": "our mixture of one rank is peft's svd merge: relative difference of the updates below 1e-4",
            "values": {f"{row['size']} x {row['size']}": row["relative difference"] for row in beside},
            "interval": None,
            "holds": gap < 1e-4,
        },
    ]
    timings = [
        {
            "task": f"best rank {row['rank']} mixture of two adapters, one {row['size']} x {row['size']} map",
            "ours_s": row["ours_s"],
            "peer": "peft add_weighted_adapter, svd",
            "peer_s": row["peer_s"],
            "ratio": row["peer_s"] / row["ours_s"],
        }
        for row in beside
    ]
    settings = {"blocks": blocks, "ranks": ranks, "dtype": "bfloat16", "peft": importlib.metadata.version("peft"), "peer runs": 1}
    write_result(asked.out, "merge_memory", [0], settings, relations, timings, rows)


if __name__ == "__main__":
    main()
