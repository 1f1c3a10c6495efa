"""The documentation is true: its Python blocks run as written, and so do its console blocks that are marked as runnable.

Blocks of one page run in order, in one namespace and one temporary folder; a block with `title="NAME"` is written there first. A comment on
the line before a block steers it:
`<!-- run -->` a console block is run (its `$` lines; each must exit with 0), `<!-- run: 1 -->` its last line must exit with 1,
`<!-- skip: why -->` a Python block is not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the architecture shows contracts, not code to run
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "architecture.md")]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?P<options>[^\n]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
STEER = re.compile(r"<!-- *(?P<word>run|skip)(?:: *(?P<rest>[^>]*?))? *-->\s*\Z")


@dataclass(frozen=True)
class Chunk:
    """One block of a page: its language, text, line, and what the comment before it says."""

    language: str
    body: str
    line: int
    word: str
    rest: str
    title: str = ""

    @property
    def runs(self) -> bool:
        return (self.language == "python" and self.word != "skip") or (self.language == "console" and self.word == "run")


def chunks(text: str) -> list[Chunk]:
    found = []
    for block in BLOCK.finditer(text):
        steer = STEER.search(text[: block.start()])
        word, rest = (steer["word"], steer["rest"] or "") if steer else ("", "")
        body = re.sub(rf"^{block['indent']}", "", block["body"], flags=re.MULTILINE)
        title = re.search(r'title="([\w.-]+)"', block["options"])
        found.append(Chunk(block["language"], body, text.count("\n", 0, block.start()) + 1, word, rest, title[1] if title else ""))
    return found


def run_console(chunk: Chunk, folder: Path, environment: dict[str, str]) -> None:
    commands = [line[2:] for line in chunk.body.splitlines() if line.startswith("$ ")]
    assert commands, f"the console block at line {chunk.line} has no line that starts with '$ '"
    for command in commands:
        wanted = int(chunk.rest or 0) if command == commands[-1] else 0
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == wanted, (
            f"line {chunk.line}: {command}\nexit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The reader's shell: `trocar` and `python` are those of this environment."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, words in (("trocar", "-m trocar"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    source = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": source, "TROCAR_PROGRESS": "0"}


RUNNABLE = [path for path in PAGES if any(chunk.runs for chunk in chunks(path.read_text()))]


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run_as_written(path: Path, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for chunk in chunks(path.read_text()):
        if chunk.title:
            (folder / chunk.title).write_text(chunk.body)
        if not chunk.runs:
            continue
        if chunk.language == "console":
            run_console(chunk, folder, environment)
        else:
            # the padding makes a traceback show the page's own line numbers
            exec(compile("\n" * chunk.line + chunk.body, str(path.relative_to(ROOT)), "exec"), namespace)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_closed_and_every_python_block_parses(path: Path) -> None:
    text = path.read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(chunks(text))
    for chunk in chunks(text):
        if chunk.language == "python":
            compile(chunk.body, f"{path.name}:{chunk.line}", "exec")


@pytest.mark.parametrize("path", [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")], ids=lambda path: path.name)
def test_links_into_the_repository_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_map_of_the_house_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "house.md").read_text() + (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name


def test_the_reader_of_blocks_works(tmp_path: Path, environment: dict[str, str]) -> None:
    page = "<!-- run: 3 -->\n```console\n$ echo a > made\noutput\n$ exit 3\n```\n\n"
    page += "<!-- skip: slow -->\n```python\n1/0\n```\n```python\nx = 1\n```\n"
    page += '```yaml title="a.yaml"\nb: 1\n```\n'
    first, second, third, fourth = chunks(page)
    assert (first.runs, second.runs, third.runs, fourth.runs) == (True, False, True, False)
    assert (fourth.title, fourth.body) == ("a.yaml", "b: 1\n")
    run_console(first, tmp_path, environment)
    assert (tmp_path / "made").read_text() == "a\n"
    failing = Chunk("console", "$ exit 4\n", 1, "run", "")
    with pytest.raises(AssertionError, match="exit 4"):
        run_console(failing, tmp_path, environment)
