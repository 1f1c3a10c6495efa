"""`trocar demo`, and a where-to-edit run that is really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trocar.cli import main
from trocar.cli.run import DEMO
from trocar.result import read_result

SMALL = [
    "--set",
    "method.training.pairs=128",
    "--set",
    "method.training.chunk=32",
    "--set",
    "method.training.epochs=2",
    "--set",
    "checks=[]",
]


def files(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.slow
def test_the_demo_fixes_a_group_of_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    assert "PASSED" in shown
    assert "trocar-demo/report.html" in shown
    result = read_result("trocar-demo")
    rows = {row.name: row for row in result.table}
    assert rows["success"].before == 0
    assert rows["success"].after == 1
    assert rows["generalisation"].n >= 50
    assert rows["generalisation"].low is not None
    assert rows["generalisation"].low > 0.2
    assert rows["locality.random"].after > 0.9
    assert result.patch is not None
    assert result.patch.bytes < 300 * 1024
    report = Path("trocar-demo/report.html").read_text()
    assert "data:image/png;base64" in report
    assert main(["patch", "check", "trocar-demo/patch.safetensors", "lab:vit-cifar-rare"]) == 0


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["run", str(DEMO), "-o", str(whole), *SMALL]) == 0
    words = [sys.executable, "-m", "trocar", "run", str(DEMO), "-o", str(killed), *SMALL]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "TROCAR_PROGRESS": "0"})
    while process.poll() is None and len(list((killed / "units").rglob("*.safetensors"))) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    assert main(["run", str(DEMO), "-o", str(killed), *SMALL]) == 0
    assert files(killed) == files(whole)
