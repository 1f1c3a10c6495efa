"""Kill a where-to-edit run at random moments; the resumed run must end with the bytes of an uninterrupted one.

    python benchmarks/kill_resume.py [--quick] [--recipe FILE] [--kills 20]

Each trial starts `trocar run` in a process of its own, sends SIGKILL at a moment drawn uniformly between the appearance of the run folder
and the end of the uninterrupted run, resumes, and compares every file but `log.jsonl`. A further trial is killed again and again until it
is through. A moment at which the run has already ended is drawn again, so that every trial counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import ROOT, arguments, write_result

DEMO = ROOT / "src" / "trocar" / "cli" / "demo.yaml"


def start(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "trocar", "run", str(recipe), "--output", str(folder)]
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(ROOT / "src")) if path]
    environment = {
        **os.environ,
        "TROCAR_PROGRESS": "0",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def finish(recipe: Path, folder: Path) -> float:
    """Run to the end; seconds. A failed check (exit code 1) is a result, too; anything else is an error."""
    begun = time.perf_counter()
    process = start(recipe, folder)
    _, errors = process.communicate()
    if process.returncode not in (0, 1):
        raise RuntimeError(f"the run ended with {process.returncode}: {errors.decode()[-2000:]}")
    return time.perf_counter() - begun


def digests(folder: Path) -> dict[str, str]:
    """Every file but the log, by its content; left-over temporary files and locks count as differences."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "log.jsonl"]
    return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in files}


def kill(recipe: Path, folder: Path, after: float) -> dict[str, Any] | None:
    """Start, wait until the run folder is there and `after` seconds more, SIGKILL. None if the run had ended by then."""
    process = start(recipe, folder)
    while process.poll() is None and not (folder / "recipe.yaml").exists():
        time.sleep(0.01)
    time.sleep(after)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr
    process.stderr.close()
    return {"after_s": round(after, 2), "stage": stage(folder), "units": sum(path.is_file() for path in (folder / "units").rglob("*"))}


def stage(folder: Path) -> str:
    """The last thing that the log of a killed run says."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["event"] if lines else "resolving"


def compare(folder: Path, whole: dict[str, str]) -> list[str]:
    now = digests(folder)
    return sorted(name for name in whole.keys() | now.keys() if whole.get(name) != now.get(name))


def trial(recipe: Path, work: Path, whole: dict[str, str], span: float, draw: random.Random) -> dict[str, Any]:
    """One kill and one resumption."""
    while True:
        shutil.rmtree(work, ignore_errors=True)
        killed = kill(recipe, work, draw.uniform(0, span))
        if killed is not None:
            break
    resumed = finish(recipe, work)
    return {**killed, "resumed_s": round(resumed, 2), "different": compare(work, whole)}


def stubborn(recipe: Path, work: Path, whole: dict[str, str], span: float, draw: random.Random) -> dict[str, Any]:
    """One run that is killed again and again, each time a little later, until it gets through between two kills."""
    shutil.rmtree(work, ignore_errors=True)
    kills = 0
    while kills < 50:
        if kill(recipe, work, draw.uniform(0, span / 4) * (1 + kills / 10)) is None:
            break
        kills += 1
    finish(recipe, work)
    return {"kills": kills, "different": compare(work, whole)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    def extend(parser: Any) -> None:
        parser.add_argument("--recipe", type=Path, default=DEMO, help="a recipe of where-to-edit (default: the demo's)")
        parser.add_argument("--kills", type=int, default=20, help="how many random moments")
        parser.add_argument("--seed", type=int, default=0, help="of the moments")

    options = arguments("kill_resume", __doc__ or "", argv, extend)
    kills = min(options.kills, 5) if options.quick else options.kills
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        first, second, work = (Path(scratch) / name for name in ("first", "second", "work"))
        seconds = finish(options.recipe, first)
        finish(options.recipe, second)
        whole = digests(first)
        events = {line["event"]: line["seconds"] for line in map(json.loads, (first / "log.jsonl").read_text().splitlines())}
        span = events["finished"]
        print(f"uninterrupted: {seconds:.1f} s, of which {span:.1f} s in the run folder, {len(whole)} files", flush=True)
        trials = []
        for number in range(kills):
            trials.append(trial(options.recipe, work, whole, span, draw))
            print(f"{number + 1}/{kills}: {trials[-1]}", flush=True)
        again = stubborn(options.recipe, work, whole, span, draw)
        print(f"killed again and again: {again}", flush=True)
        repeated = compare(second, whole)
    same = [not row["different"] for row in trials]
    relations = [
        {
            "id": "K1",
            "claim": f"SIGKILL at {kills} random moments: the resumed run ends with the same bytes",
            "values": {"same": sum(same), "of": len(same), "stages": dict(Counter(row["stage"] for row in trials)), "trials": trials},
            "interval": None,
            "holds": all(same),
        },
        {
            "id": "K2",
            "claim": "a run killed again and again until it gets through ends with the same bytes",
            "values": again,
            "interval": None,
            "holds": again["kills"] >= 3 and not again["different"],
        },
        {
            "id": "K3",
            "claim": "two uninterrupted runs give the same bytes",
            "values": {"different": repeated, "files": len(whole)},
            "interval": None,
            "holds": not repeated,
        },
    ]
    settings = {"recipe": options.recipe.name, "kills": kills, "quick": options.quick, "uninterrupted_s": round(seconds, 2)}
    result = write_result(options.out, "kill_resume", [options.seed], settings, relations)
    for row in relations:
        print(f"{row['id']} {'holds' if row['holds'] else 'DOES NOT HOLD'}: {row['claim']}")
    return result


if __name__ == "__main__":
    sys.exit(0 if all(row["holds"] for row in main()["relations"]) else 1)
