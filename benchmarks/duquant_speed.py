"""What quantised layers cost as they run, and what quantising a block of a 7-billion-parameter model takes.

Layers: one of 4096 x 4096 in 8-bit integers, in packed 4-bit weights, in float32 and bfloat16, at 1, 16 and 256 tokens; the share of the
transform in its time. Block: of Llama-2-7B's shape, from a checkpoint on disk, in a process of its own whose peak memory is read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import arguments, paired_seconds, write_result
from torch.nn import functional

from trocar.compress.duquant import Chain, build_chain, nearest
from trocar.patch.quantised import GroupInput, QuantisedLinear, Quantiser, Transform, execute, memory

SIZE = 4096
TOKENS = (1, 16, 256)


def layer(weights: Quantiser, activations: Quantiser, transform: Transform) -> QuantisedLinear:
    weight = transform.weight(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) / SIZE**0.5)
    return QuantisedLinear(GroupInput(transform, activations), weights, nearest(weight, weights), None)


def layer_timings(repeats: int) -> list[dict[str, Any]]:
    """Rows of `timings`: ours beside float32 and bfloat16, clock of the processor, one thread."""
    found = []
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    chain = build_chain(x, Chain(block_size=128, search_steps=4), torch.Generator().manual_seed(2)).to(torch.float32)
    plain = Transform(SIZE)
    forms = {
        "W8A8": (layer(Quantiser(bits=8), Quantiser(bits=8), plain), torch.float32),
        "W4A8": (layer(Quantiser(bits=4), Quantiser(bits=8), plain), torch.float32),
        "W4A8 with rotations and permutation": (layer(Quantiser(bits=4), Quantiser(bits=8), chain), torch.float32),
        "W4A16 packed": (layer(Quantiser(bits=4), Quantiser(bits=16), plain).to(torch.bfloat16), torch.bfloat16),
    }
    for name, (one, dtype) in forms.items():
        rows = x[:16].to(dtype)
        execute(one, "simulated")
        right = one(rows).float()
        execute(one, "integer" if dtype == torch.float32 else "packed")
        error = float((one(rows).float() - right).norm() / right.norm())
        if error > (1e-5 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"{name} differs from the simulated layer by {error:.1e}")
    for tokens in TOKENS:
        rows = x[:tokens].contiguous()
        for name, (one, dtype) in forms.items():
            mine = rows.to(dtype)
            for peer in (torch.float32, torch.bfloat16):
                weight, theirs = torch.randn(SIZE, SIZE, dtype=peer), rows.to(peer)

                def ours(one: Any = one, mine: torch.Tensor = mine) -> Any:
                    return one(mine)

                def float_layer(weight: torch.Tensor = weight, theirs: torch.Tensor = theirs) -> Any:
                    return functional.linear(theirs, weight)

                timing = paired_seconds(ours, float_layer, repeats, clock=time.process_time)
                found.append({"task": f"{name}, {tokens} tokens", "peer": str(peer).removeprefix("torch."), **timing})
    return found


def shares(timings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The transform's share of the time of a W4A8 layer with it, by tokens."""
    seconds = {row["task"]: row["ours_s"] for row in timings if row["peer"] == "float32"}
    return [
        {"tokens": tokens, "transform's share of the layer": 1 - seconds[f"W4A8, {tokens} tokens"] / seconds[f"{LONG}, {tokens} tokens"]}
        for tokens in TOKENS
    ]


LONG = "W4A8 with rotations and permutation"

BLOCK = """
import json, resource, sys, time, torch
torch.set_num_threads(1)
from trocar.compress.duquant import preset, quantise_checkpoint
source, target, kind, windows, length = sys.argv[1:4] + [int(word) for word in sys.argv[4:6]]
ids = torch.randint(0, 500, (windows, length), generator=torch.Generator().manual_seed(0))
start, clock = time.perf_counter(), time.process_time()
quantise_checkpoint(source, target, {"input_ids": ids}, preset(kind, "W4A4", batch_size=1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"peak GiB": peak, "processor seconds": time.process_time() - clock, "seconds": time.perf_counter() - start}))
"""


def block(kind: str, windows: int, length: int) -> dict[str, Any]:
    """One block of Llama-2-7B's shape, bfloat16, through `quantise_checkpoint` in a process of its own."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=32
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config).bfloat16()
        weights = sum(parameter.numel() for parameter in model.model.layers.parameters())
        model.save_pretrained(Path(folder) / "float")
        del model
        words = [str(Path(folder) / "float"), str(Path(folder) / "small"), kind, str(windows), str(length)]
        out = subprocess.run([sys.executable, "-c", BLOCK, *words], capture_output=True, text=True, check=True).stdout
    measured = json.loads(out.strip().splitlines()[-1])
    model_hours = 32 * measured["seconds"] / 3600
    return {"method": f"{kind}, {windows} windows of {length}", "weights": weights, **measured, "hours for 32 blocks": model_hours}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("duquant_speed", __doc__ or "", argv)
    torch.set_num_threads(1)
    with torch.no_grad():
        timings = layer_timings(3 if options.quick else 9)
    blocks = [block("duquant", 4, 256)] if options.quick else [block("duquant", 8, 512), block("duquant-gptq", 8, 512)]
    decode = next(row for row in timings if row["task"] == "W4A8, 1 tokens" and row["peer"] == "bfloat16")
    relations = [
        {
            "id": "decode",
            "claim": "a W4A8 layer is faster than one in bfloat16 at one token",
            "values": {"ratio": decode["ratio"]},
            "interval": (decode["ratio_low"], decode["ratio_high"]),
            "holds": decode["ratio_low"] > 1,
        },
        {
            "id": "memory",
            "claim": "a block of a 7B-shaped model is quantised in less than 12 GiB",
            "values": {row["method"]: row["peak GiB"] for row in blocks},
            "interval": None,
            "holds": all(row["peak GiB"] < 12 for row in blocks),
        },
    ]
    held = [
        {"layer": f"{form}, {SIZE} x {SIZE}", **memory([layer(Quantiser(bits=bits), Quantiser(bits=8), Transform(SIZE))])}
        for form, bits in (("W4A8", 4), ("W8A8", 8))
    ]
    tables = {
        "Share of the transform (two rotations of blocks of 128, a permutation) in a W4A8 layer": shares(timings),
        "A block of Llama-2-7B's shape, from a checkpoint and back": blocks,
        "Bytes of a layer: in float32, stored, and kept beside the codes by mode": held,
    }
    write_result(options.out, "duquant_speed", [0], {"size": SIZE}, relations, timings, tables=tables)


if __name__ == "__main__":
    main()
