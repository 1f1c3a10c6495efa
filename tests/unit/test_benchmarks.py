"""The benchmarks' common ground: result files of one schema, paired timings, and the page rendered from them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import render

RELATION = {"id": "R1", "claim": "masks beat random ones", "values": {"ours": np.float32(0.5)}, "interval": (0.1, 0.2), "holds": True}
TIMING = {"task": "edit", "ours_s": 1.0, "peer": "plain loop", "peer_s": 3.0, "ratio": 3.0}


def test_result_has_the_schema_and_plain_numbers(tmp_path: Path) -> None:
    result = common.write_result(tmp_path / "m.json", "m", [0, 1], {"steps": np.int64(3)}, [RELATION], [TIMING], [{"model": "x", "n": 4}])
    stored = json.loads((tmp_path / "m.json").read_text())
    assert stored == result
    expected = {"method", "commit", "command", "date", "seeds", "machine", "settings", "relations", "timings", "real"}
    assert set(stored) == expected
    assert stored["relations"][0]["values"] == {"ours": 0.5}
    assert stored["settings"] == {"steps": 3}
    assert stored["machine"]["cores"] >= 1
    assert not any(str(value).startswith("/") for value in stored["machine"].values())


@pytest.mark.parametrize(
    ("relations", "timings", "message"),
    [
        ([{**RELATION, "holds": None}], [], "True or False"),
        ([{**RELATION, "interval": (1, 2, 3)}], [], "interval"),
        ([{key: value for key, value in RELATION.items() if key != "claim"}], [], "lacks claim"),
        ([RELATION, RELATION], [], "twice"),
        ([], [{"task": "edit"}], "lacks ours_s, peer, peer_s, ratio"),
    ],
)
def test_malformed_results_are_refused_and_nothing_is_written(tmp_path: Path, relations: list, timings: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        common.write_result(tmp_path / "m.json", "m", [0], {}, relations, timings)
    assert not (tmp_path / "m.json").exists()


def test_paired_seconds_alternates_and_finds_the_ratio() -> None:
    calls: list[str] = []

    def ours() -> None:
        calls.append("ours")
        time.sleep(0.005)

    def peer() -> None:
        calls.append("peer")
        time.sleep(0.015)

    found = common.paired_seconds(ours, peer, repeats=6)
    assert calls == ["ours", "peer"] + ["ours", "peer", "peer", "ours"] * 3
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert 1.3 < found["ratio"] < 4
    assert found["ratio"] == pytest.approx(found["peer_s"] / found["ours_s"])
    with pytest.raises(ValueError, match="at least 2"):
        common.paired_seconds(ours, peer, repeats=1)


def test_command_and_commit_name_no_machine_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(common.ROOT / "benchmarks" / "x.py"), "--out", "/elsewhere/r.json", "--quick"])
    assert common.command() == "python benchmarks/x.py --out r.json --quick"
    inside = subprocess.run(["git", "-C", str(common.ROOT), "rev-parse"], capture_output=True, check=False).returncode == 0
    assert (common.commit() != "unknown") == inside


def test_mean_interval_is_students_t() -> None:
    mean, low, high = common.mean_interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert (low, high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    with pytest.raises(ValueError, match="two values"):
        common.mean_interval([1.0])


def test_page_shows_what_held_and_what_did_not(tmp_path: Path) -> None:
    timing = {**TIMING, "ours_s": 0.0021, "ratio_low": 2.5, "ratio_high": 3.5}
    failed = {**RELATION, "id": "R2", "claim": "a | b", "holds": False, "interval": None}
    common.write_result(tmp_path / "m.json", "some method", [0, 1], {"steps": 3}, [RELATION, failed], [timing], [{"model": "x", "n": 4}])
    assert render.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 0
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| [some method](#some-method) | 1 of 2 | 3.00x | 2 |" in lines
    assert "| R1 | masks beat random ones | ours 0.5 | 0.1 to 0.2 | yes |" in lines
    assert "| R2 | a \\| b | ours 0.5 | - | **no** |" in lines
    assert "| edit | 2.1 ms | plain loop | 3 s | 3 | 2.5 to 3.5 |" in lines
    assert "| x | 4 |" in lines
    assert any(line.startswith("Commit `") for line in lines)


def test_page_refuses_a_file_that_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"method": "x"}')
    with pytest.raises(ValueError, match=r"x\.json is not a benchmark's result: it lacks commit"):
        render.load(tmp_path)


def test_committed_page_is_what_the_committed_results_render_to() -> None:
    page = (common.ROOT / "docs" / "benchmarks.md").read_text()
    assert page == render.render(render.load(common.RESULTS)), "docs/benchmarks.md is stale: run python benchmarks/render.py"
