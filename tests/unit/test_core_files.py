"""Atomic files: whatever happens while one is written, a reader sees the old content or the new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.core.files import atomic_path, read_json, write_bytes, write_json, write_text


def test_an_error_while_writing_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_text(target, "old")

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        interrupted()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def test_parents_are_made_and_modes_follow_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c.bin"
    old = os.umask(0o027)
    try:
        write_bytes(target, b"\x00\x01")
    finally:
        os.umask(old)
    assert target.read_bytes() == b"\x00\x01"
    assert target.stat().st_mode & 0o777 == 0o640


def test_unserialisable_content_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == {"a": 1}


WRITER = """
import sys
from trocar.core.files import write_text
count = 0
while True:
    count += 1
    write_text(sys.argv[1], f"{count}\\n" * 20_000)
    if count == 1:
        print("ready", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "result.txt"
    for delay in (0.0, 0.003, 0.011):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        lines = target.read_text().splitlines()
        assert len(lines) == 20_000
        assert len(set(lines)) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_json_round_trips(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_json_is_stable_and_strict(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [float("nan"), float("inf"), 1.5]})
    write_json(tmp_path / "b.json", {"a": (float("nan"), float("-inf"), 1.5), "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": [None, None, 1.5], "b": 1}
