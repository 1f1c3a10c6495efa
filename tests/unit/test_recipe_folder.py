"""The run folder: its lock, its owner, its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.core.errors import RunError
from trocar.recipe.folder import IDENTITY, LOCK, RECIPE, Log, claim, claim_inputs, first_difference, locked

RECIPE_A = {"version": 1, "seed": 0, "model": {"source": "a"}, "method": {"name": "m", "keep": 0.1}, "checks": []}

HOLDER = """
import sys
from pathlib import Path
from trocar.recipe.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_in_use_is_refused_and_a_killed_owner_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    with pytest.raises(RunError, match=f"in use by process {process.pid} on .* which started at"), locked(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((folder / LOCK).read_text())["pid"] == process.pid  # stale: left behind by the kill
    with locked(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(RunError, match="in use"), locked(folder):
            pass
    assert not (folder / LOCK).exists()


def test_the_lock_goes_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / LOCK).exists()
    with locked(tmp_path):
        pass


def test_a_run_folder_cannot_be_made_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be"), locked(tmp_path / "file"):
        pass


def test_a_folder_belongs_to_its_recipe(tmp_path: Path) -> None:
    claim(tmp_path, RECIPE_A)
    claim(tmp_path, RECIPE_A)
    for changed, key in (
        ({**RECIPE_A, "seed": 1}, "seed is 0 there and 1 here"),
        ({**RECIPE_A, "model": {"source": "b"}}, 'model.source is "a" there and "b" here'),
        ({**RECIPE_A, "method": {"name": "m", "keep": 0.2}}, "method.keep is 0.1 there and 0.2 here"),
        ({**RECIPE_A, "method": {"name": "m"}}, "method.keep is 0.1 there and not set here"),
        ({**RECIPE_A, "checks": [{"op": "<"}]}, "checks is"),
    ):
        with pytest.raises(RunError) as error:
            claim(tmp_path, changed)
        assert key in str(error.value)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"not a run folder: it holds thesis\.tex"):
        claim(tmp_path, RECIPE_A)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".{RECIPE}.abc.tmp").write_text("half")  # killed while it wrote its very first file
    claim(tmp_path, RECIPE_A)
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / ".labels.json.xyz.tmp").write_text("half")
    claim(tmp_path, RECIPE_A)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [RECIPE]


def test_a_folder_belongs_to_its_inputs(tmp_path: Path) -> None:
    inputs = {"trocar": "1", "model": "f0", "data": {"edit": {"inputs": "d0", "labels": [1, 2]}}}
    claim_inputs(tmp_path, inputs)
    before = (tmp_path / IDENTITY).read_bytes()
    claim_inputs(tmp_path, inputs)
    assert (tmp_path / IDENTITY).read_bytes() == before
    with pytest.raises(RunError, match=r'model was "f0" then and is "f1" now'):
        claim_inputs(tmp_path, {**inputs, "model": "f1"})
    with pytest.raises(RunError, match=r"data\.edit\.labels\[1\] was 2 then and is 3 now"):
        claim_inputs(tmp_path, {**inputs, "data": {"edit": {"inputs": "d0", "labels": [1, 3]}}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, json_values)
def test_a_difference_is_found_exactly_where_there_is_one(one: object, two: object) -> None:
    assert first_difference(one, one) is None
    assert (first_difference(one, two) is None) == (json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True))


def test_the_log_mends_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log("start", threads=1)
    with log.path.open("ab") as file:
        file.write(b'{"time": "2')
    log("finished")
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["event"] for line in (lines[0], lines[2])] == ["start", "finished"]
    assert len(lines) == 3
