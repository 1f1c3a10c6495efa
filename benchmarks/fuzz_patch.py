"""Fuzz the patch reader: mutated files must be refused with a TrocarError, or be valid patches that apply and revert without a trace.

Mutations are structured: of the description (the JSON that says what the patch does), of the table of tensors, of the texts, of the
header's length, of the bodies, of single bytes, and whole inventions; most are signed again with a right checksum, as a skilled forger
would, so that they reach the checks behind it. A crash is any exception that is no TrocarError. Files that are accepted are applied to a
small model, which must refuse them with a TrocarError or come back bit for bit.

    python benchmarks/fuzz_patch.py --quick     # 60 seconds
    python benchmarks/fuzz_patch.py             # 10 minutes
"""

from __future__ import annotations

import json
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, write_result

from trocar.anatomy import fingerprint, tiny_model
from trocar.core.errors import TrocarError
from trocar.patch import Adapter, AddVector, Factors, Gate, LowRank, Patch, Remove, ScaleAt, SparseReplace, read_header
from trocar.patch import format as file_format

SEED = 0
UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj"
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 255, 2**31, 2**31 - 1, 2**48 + 1, 2**63, -(2**63), 2**64, 0.0, -0.0, 1e308, 5e-324, "", "x", "L0",
    "L0.H0", "NaN",
    "../../etc/passwd", "/dev/zero", "os.system", "__class__", "\u0000", "\ud800", "é" * 300, "A" * 5000, [], {}, [[]], [None], {"": {}},
    "sparse-replace", "low-rank", "gate", "scale-at", "add-vector", "remove", "adapter",
    "F32", "BF16", "BOOL", "I64", "whole", "rows", "cols", "flat",
]  # fmt: skip


def corpus(model: Any) -> list[bytes]:
    """Valid patches of every kind of operation."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = model.get_parameter(UP).detach()
    ops: list[list[Any]] = [[]]
    for index in ([3, 5], (slice(None), [0, 9]), ([2, 40], [3, 31])):
        after = weight.clone()
        after[index] += 1
        ops.append([SparseReplace.between(UP, weight, after)])
    ops += [
        [SparseReplace(UP, tuple(weight.shape), weight + 1)],
        [LowRank(f"{Q}.weight", normal(2, 32), normal(64, 2))],
        [
            Gate({"L0.H1": 0.0, "L1.mlp": 0.5}),
            AddVector("L1.resid_post", normal(32), positions=[-1]),
            ScaleAt({"L0.H1": 0.0, "L1.N3": 2.0}, "last"),
        ],
        [Adapter({Q: Factors(normal(2, 32), normal(64, 2), 0.5)}, "CAUSAL_LM"), Remove(["L0.H0", "L0.H1", "L1"])],
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, one in enumerate(ops):
            path = Path(folder) / str(number)
            Patch.of(model, one, "fuzz", {"rate": 1e-3}, [{"name": "accuracy", "after": 1.0}]).save(path)
            files.append(path.read_bytes())
    return files


def taken_apart(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], bytearray]:
    """(description, table, body) of a valid file."""
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    return json.loads(table.pop("__metadata__")["trocar"]), table, bytearray(raw[8 + length :])


def put_together(meta: Any, table: Any, body: bytes, text: Callable[[str], str] = lambda text: text) -> bytes:
    """A file with a right checksum and a right length."""
    if isinstance(meta, dict):
        meta.pop("digest", None)
        digest = file_format._digest(json.dumps(meta, sort_keys=True, separators=(",", ":")))
        digest.update(body)
        meta = meta | {"digest": digest.hexdigest()}
    described = text(json.dumps(meta, sort_keys=True, separators=(",", ":")))
    header = json.dumps({"__metadata__": {"trocar": described}} | table, separators=(",", ":")).encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def mutate_tree(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON tree: replace, delete, add, repeat or reorder."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        action = rng.random()
        if action < 0.65:
            value[key] = mutate_tree(value[key], rng)
        elif action < 0.8:
            del value[key]
        else:
            value[rng.choice(["kind", "extra", "shape", "__class__", key + "x"])] = rng.choice(NASTY)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        action = rng.random()
        if action < 0.6:
            value[place] = mutate_tree(value[place], rng)
        elif action < 0.75:
            del value[place]
        elif action < 0.9:
            value.insert(place, json.loads(json.dumps(value[place])))
        else:
            value.reverse()
        return value
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-1, 1, 8, -value, 2**32])
    return rng.choice(NASTY)


def description(raw: bytes, rng: random.Random) -> bytes:
    meta, table, body = taken_apart(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        meta = mutate_tree(meta, rng)
    return put_together(meta, table, bytes(body))


def tensor_table(raw: bytes, rng: random.Random) -> bytes:
    meta, table, body = taken_apart(raw)
    table = mutate_tree(table, rng)
    return put_together(meta, table if isinstance(table, dict) else {"x": table}, bytes(body))


def both(raw: bytes, rng: random.Random) -> bytes:
    """Description and table changed together, so that they may agree."""
    meta, table, body = taken_apart(raw)
    sizes = [(op, key) for op in meta["ops"] for key, value in op.items() if isinstance(value, int | list)]
    if sizes:
        op, key = rng.choice(sizes)
        op[key] = mutate_tree(op[key], rng)
    if table:
        entry = table[rng.choice(list(table))]
        entry["shape"] = mutate_tree(entry["shape"], rng)
    return put_together(meta, table, bytes(body[: rng.randrange(len(body) + 1)]) if rng.random() < 0.2 else bytes(body))


def written_text(raw: bytes, rng: random.Random) -> bytes:
    def change(text: str) -> str:
        place = rng.randrange(len(text))
        piece = rng.choice(
            ["{", "}", "[", "]", ",", ":", '"', "\\", "\\ud800", "NaN", "1e999", "9" * 400, " ", "\n", "null", "-", "é", text[:place]]
        )
        return text[:place] + piece + text[place + rng.choice([0, 1, len(piece)]) :]

    meta, table, body = taken_apart(raw)
    return put_together(meta, table, bytes(body), change)


def signed_body(raw: bytes, rng: random.Random) -> bytes:
    """Other values and indices under a right checksum."""
    meta, table, body = taken_apart(raw)
    for _ in range(rng.choice([1, 2, 8])):
        if body:
            place = rng.randrange(len(body))
            piece = rng.choice([bytes([rng.randrange(256)]), b"\xff\xff\xff\x7f", b"\x00" * 4, b"\xff" * 8, b"\x00\x00\x80\x7f"])
            body[place : place + len(piece)] = piece[: len(body) - place]
    return put_together(meta, table, bytes(body))


def byte_level(raw: bytes, rng: random.Random) -> bytes:
    content = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 16])):
        place = rng.randrange(len(content))
        action = rng.random()
        if action < 0.5:
            content[place] ^= 1 << rng.randrange(8)
        elif action < 0.65:
            content[place:place] = rng.randbytes(rng.choice([1, 4, 100]))
        elif action < 0.8:
            del content[place : place + rng.choice([1, 4, 100])]
        else:
            content[place:place] = content[rng.randrange(len(content)) :][:64]
        if not content:
            break
    return bytes(content)


def length_field(raw: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    wrong = rng.choice(
        [0, 1, 2, length - 1, length + 1, len(raw), len(raw) - 8, 2**31, 2**32, 2**63, 2**64 - 1, rng.randrange(len(raw) * 2)]
    )
    return wrong.to_bytes(8, "little") + raw[8:]


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))] if rng.random() < 0.5 else raw + rng.randbytes(rng.choice([1, 8, 1000]))


def invention(raw: bytes, rng: random.Random) -> bytes:
    content = rng.randbytes(rng.randrange(300)) if rng.random() < 0.5 else json.dumps(rng.choice(NASTY)).encode()
    return (len(content).to_bytes(8, "little") if rng.random() < 0.7 else b"") + content


def bomb(raw: bytes, rng: random.Random) -> bytes:
    """Headers of nearly the allowed size that try to cost memory or time."""
    room = file_format.MAX_HEADER - 200_000
    meta, table, body = taken_apart(raw)
    kind = rng.randrange(7)
    if kind == 0:
        return put_together(meta, table, bytes(body), lambda text: "[" * (room // 2) + "]" * (room // 2))
    if kind == 1:
        meta["settings"] = {"x": [{}] * (room // 3)}
    elif kind == 2:
        meta["settings"] = {"x": "y" * room}
    elif kind == 3:
        meta["ops"] = [{"kind": "gate", "factors": {"L0.H1": 0.0}}] * (room // 60)
        meta["effects"] = [None] * len(meta["ops"])
    elif kind == 4:
        table = {f"{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(room // 60)}
    elif kind == 5:
        meta["base"]["tensors"] = {f"t{number}": "f" for number in range(room // 20)}
    else:
        meta["settings"] = {"x": [1] * (room // 3)}
    return put_together(meta, table, bytes(body))


MUTATIONS: list[tuple[Callable[[bytes, random.Random], bytes], float]] = [
    (description, 30), (tensor_table, 12), (both, 12), (written_text, 12), (signed_body, 12), (byte_level, 12), (length_field, 3), (cut, 4),
    (invention, 3), (bomb, 0.3),
]  # fmt: skip


def peak_mib(reset: bool = False) -> float:
    """The process's largest resident memory in MiB, since the last reset where the system can reset it."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(seconds: float, path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = tiny_model("llama")
    before = fingerprint(model)
    files = corpus(model)
    rng = random.Random(SEED)
    counts: Counter[str] = Counter()
    sentences: set[str] = set()
    crashes: list[dict[str, str]] = []
    slowest, largest, resting = 0.0, 0.0, peak_mib(reset=True)
    kinds, weights = [kind for kind, _ in MUTATIONS], [weight for _, weight in MUTATIONS]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        (kind,) = rng.choices(kinds, weights)
        origin = rng.choice(files)
        content = kind(origin, rng)
        path.write_bytes(content)
        start, floor = time.monotonic(), peak_mib(reset=True)
        counts["executions"] += 1
        counts[f"by {kind.__name__}"] += 1
        try:
            messages = []
            for reader in (read_header, Patch.load):
                try:
                    reader(path)
                    messages.append("")
                except TrocarError as error:
                    messages.append(str(error))
            if messages[0] != messages[1]:
                raise AssertionError(f"read_header and load disagree: {messages}")
            largest = max(largest, peak_mib() - floor)
            slowest = max(slowest, time.monotonic() - start)
            if messages[0]:
                counts["refused"] += 1
                sentences.add(messages[0].split(": ", 1)[-1][:60])
            elif content == origin:
                counts["unchanged"] += 1
            else:
                counts["accepted"] += 1
                Patch.load(path).save(path)
                if path.read_bytes() != content:
                    raise AssertionError("a valid patch is not written as it was read")
                counts[try_on(model, path)] += 1
                if fingerprint(model) != before:
                    raise AssertionError("the model is not what it was")
        except Exception as error:
            crashes.append({"mutation": kind.__name__, "error": repr(error)[:300], "where": traceback.format_exc()[-600:]})
            model = tiny_model("llama")
    return {
        "executions": counts["executions"],
        "crashes": len(crashes),
        "refused": counts["refused"],
        "accepted": counts["accepted"],
        "accepted, applied and reverted": counts["applied"],
        "accepted, refused by the model": counts["declined"],
        "unchanged": counts["unchanged"],
        "different sentences": len(sentences),
        "by mutation": {kind.__name__: counts[f"by {kind.__name__}"] for kind in kinds},
        "slowest_s": round(slowest, 3),
        "largest_mib_beyond_rest": round(largest, 1),
        "resting_mib": round(resting, 1),
        "crash reports": crashes[:5],
    }


def try_on(model: Any, path: Path) -> str:
    """Apply an accepted file and take it back."""
    try:
        applied = Patch.load(path).apply(model, verify="structure")
    except TrocarError:
        return "declined"
    applied.revert()
    return "applied"


def main() -> None:
    def extend(parser: Any) -> None:
        parser.add_argument("--seconds", type=float, help="how long to run (default: 60 with --quick, else 600)")

    options = arguments("fuzz_patch", __doc__ or "", extend=extend)
    seconds = options.seconds or (60 if options.quick else 600)
    with tempfile.TemporaryDirectory() as folder:
        values = run(seconds, Path(folder) / "p.safetensors")
    claim = "every mutated patch file is refused with a TrocarError or applies and reverts without a trace; none crashes the reader"
    relation = {"id": "F1", "claim": claim, "values": values, "interval": None, "holds": values["crashes"] == 0}
    bounded = {
        "id": "F2",
        "claim": "no file of any content makes the reader use more than 512 MiB or 10 seconds",
        "values": {key: values[key] for key in ("largest_mib_beyond_rest", "slowest_s")},
        "interval": None,
        "holds": values["largest_mib_beyond_rest"] <= 512 and values["slowest_s"] <= 10,
    }
    write_result(options.out, "fuzz_patch", [SEED], {"seconds": seconds, "max_header": file_format.MAX_HEADER}, [relation, bounded])
    print(json.dumps(values, indent=1))
    raise SystemExit(0 if relation["holds"] and bounded["holds"] else 1)


if __name__ == "__main__":
    main()
