"""The support table: rendered from what was measured, covering every family."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import support_table  # noqa: E402

from trocar.anatomy import TINY  # noqa: E402
from trocar.anatomy.families import FAMILIES  # noqa: E402
from trocar.core.files import read_json  # noqa: E402

ROWS = read_json(ROOT / "benchmarks" / "results" / "support.json")["support"]


def test_the_page_says_what_was_measured():
    assert (ROOT / "docs" / "families.md").read_text() == support_table.render(ROWS)


def test_every_family_was_asked_on_the_oldest_and_a_newer_transformers():
    versions = {row["transformers"] for row in ROWS}
    assert "5.10.1" in versions
    assert len(versions) >= 2
    assert {(row["model"], row["transformers"]) for row in ROWS if row["weights"] == "random"} == {(m, v) for m in TINY for v in versions}
    assert {row["model_type"] for row in ROWS} == set(FAMILIES)
    assert {name for row in ROWS for name in row["states"]} == set(support_table.questions())


def test_what_fails_is_shown_and_counted():
    row = {**ROWS[0], "states": {**ROWS[0]["states"], "heads": "fails"}, "details": {"heads": "L0.H1: differs"}}
    page = support_table.render([row, *ROWS[1:]])
    assert f"{row['transformers']}: **no**" in page
    assert f"- `{row['model']}`, transformers {row['transformers']}, heads: L0.H1: differs" in page
    relation = next(r for r in support_table.relations([row, *ROWS[1:]]) if r["id"] == "anatomy: heads")
    assert (relation["holds"], relation["values"]["failed"]) == (False, [f"{row['model']} ({row['transformers']})"])


def test_a_run_keeps_the_rows_of_other_versions(tmp_path, monkeypatch):
    old = [{**row, "transformers": "5.10.0"} for row in ROWS[:1]]
    monkeypatch.setattr(support_table, "measure", lambda real: [dict(ROWS[0])])
    out, page = tmp_path / "support.json", tmp_path / "families.md"
    from trocar.core.files import write_json

    write_json(out, {"support": old})
    assert support_table.main(["--out", str(out), "--page", str(page)]) == 0
    assert [row["transformers"] for row in read_json(out)["support"]] == ["5.10.0", ROWS[0]["transformers"]]
    assert "5.10.0 and" in page.read_text()


@pytest.mark.parametrize(
    ("states", "shown"), [(["holds", "holds"], "yes"), (["absent", "absent"], "-"), (["holds", "absent"], "a: yes, b: -")]
)
def test_cells(states, shown):
    assert support_table._cell(list(zip("ab", states, strict=True))) == shown
