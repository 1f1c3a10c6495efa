"""What all benchmarks share: machine and commit, a result file of one schema, paired timings, the command line's arguments.

Every benchmark is a script `benchmarks/<method>.py` that writes `benchmarks/results/<method>.json` through `write_result`;
`benchmarks/render.py` turns those files into `docs/benchmarks.md`. Scripts import this file as `from common import ...`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trocar.core.files import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RELATION = {"id", "claim", "values", "interval", "holds"}
TIMING = {"task", "ours_s", "peer", "peer_s", "ratio"}
# a commit still counts as clean when only these differ: they are what benchmarks write
WRITTEN = ("benchmarks/results", "docs/benchmarks.md", "docs/families.md")


def arguments(method: str, description: str, argv: Sequence[str] | None = None, extend: Callable[[Any], None] | None = None) -> Any:
    """Parse `--quick` (at most ten minutes on two cores) and `--out FILE`; `extend` may add a benchmark's own options to the parser."""
    parser = argparse.ArgumentParser(prog=f"benchmarks/{method}.py", description=description)
    parser.add_argument("--quick", action="store_true", help="the short form: at most ten minutes on two cores")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{method}.json", help="the result file (default: benchmarks/results/)")
    if extend:
        extend(parser)
    return parser.parse_args(argv)


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, accelerators, versions and the load of the last minute; no names of hosts or folders."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1) if hasattr(os, "sysconf") else None,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checked-out commit, `+changes` after it where tracked files differ; `unknown` outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":(exclude){path}" for path in WRITTEN))
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command that is running, with paths relative to the repository (an absolute path elsewhere is reduced to its name)."""

    def shown(word: str) -> str:
        path = Path(word)
        if not path.is_absolute():
            return word
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return shlex.join(["python", shown(str(Path(sys.argv[0]).resolve())), *(shown(word) for word in sys.argv[1:])])


def write_result(
    path: str | os.PathLike[str],
    method: str,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    relations: Sequence[Mapping[str, Any]] = (),
    timings: Sequence[Mapping[str, Any]] = (),
    real: Sequence[Mapping[str, Any]] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Write one benchmark's result atomically and return it.

    relations: `{"id", "claim", "values", "interval", "holds"}`, ids as in the method's page, `interval` a pair or None, `holds` a bool;
    timings: `{"task", "ours_s", "peer", "peer_s", "ratio"}` (seconds; `ratio` = peer / ours, larger is faster for us) and optionally
    `ratio_low`, `ratio_high`, `repeats`; real: rows of any equal keys, measured on real models; tables: more of such rows, by their title.
    Raises ValueError for anything else.
    """
    for row in relations:
        _require(row, RELATION, "relation")
        if not isinstance(row["holds"], bool | np.bool_):
            raise ValueError(f"relation {row['id']}: holds must be True or False, not {row['holds']!r}.")
        if row["interval"] is not None and len(row["interval"]) != 2:
            raise ValueError(f"relation {row['id']}: interval must be (low, high) or None, not {row['interval']!r}.")
    for row in timings:
        _require(row, TIMING, "timing")
    for name, rows in (("relation", [row["id"] for row in relations]), ("timing", [(row["task"], row["peer"]) for row in timings])):
        if len(set(rows)) != len(rows):
            raise ValueError(f"A {name} appears twice among {rows}.")
    result = {
        "method": method,
        "commit": commit(),
        "command": command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seeds": list(seeds),
        "machine": machine(),
        "settings": settings,
        "relations": list(relations),
        "timings": list(timings),
        "real": list(real),
        **({"tables": {title: list(rows) for title, rows in tables.items()}} if tables else {}),
    }
    plain = _plain(result)
    write_json(path, plain)
    return plain


def _require(row: Mapping[str, Any], keys: set[str], name: str) -> None:
    missing = sorted(keys - set(row))
    if missing:
        raise ValueError(f"A {name} lacks {', '.join(missing)}: {dict(row)!r}.")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as plain Python, so that they can be written as JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value.as_posix() if isinstance(value, Path) else value


def paired_seconds(
    ours: Callable[[], object], peer: Callable[[], object], repeats: int, seed: int = 0, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Time two ways of doing the same work in turn, so that a busy machine slows both; returns medians and the ratio peer / ours.

    Each is called once to warm up, then `repeats` times in pairs whose order alternates. `ratio` is median(peer) / median(ours),
    `ratio_low` and `ratio_high` its 95 % interval from 2,000 bootstrap samples of the pairs. Work queued on a GPU is waited for.
    clock: `time.process_time` for work of one thread on a machine that is busy otherwise.
    """
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2 for an interval, not {repeats}.")
    for work in (ours, peer):
        seconds_of(work, clock)
    times = np.empty((repeats, 2))
    for index in range(repeats):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            times[index, which] = seconds_of((ours, peer)[which], clock)
    medians = np.median(times, axis=0)
    picks = np.random.default_rng(seed).integers(repeats, size=(2000, repeats))
    sampled = np.median(times[picks], axis=1)
    low, high = np.quantile(sampled[:, 1] / sampled[:, 0], [0.025, 0.975])
    return {
        "ours_s": float(medians[0]),
        "peer_s": float(medians[1]),
        "ratio": float(medians[1] / medians[0]),
        "ratio_low": float(low),
        "ratio_high": float(high),
        "repeats": repeats,
    }


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Wall seconds of one call (or those of another clock), including work it queued on a GPU."""
    _wait()
    start = clock()
    work()
    _wait()
    return clock() - start


def _wait() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its two-sided 95 % interval from Student's t; needs at least two values."""
    from scipy import stats

    data = np.asarray(values, dtype=float)
    if data.size < 2:
        raise ValueError(f"An interval over seeds needs at least two values, not {data.size}.")
    half = stats.t.ppf(0.975, data.size - 1) * data.std(ddof=1) / math.sqrt(data.size)
    return float(data.mean()), float(data.mean() - half), float(data.mean() + half)
