"""The report: complete, self-contained, the same bytes, and honest about bad folders."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from run_folder import AFTER, BEFORE, make

from trocar.core.errors import RunError
from trocar.locate import How, Scores
from trocar.report import terminal_table, verdict_line, write_report
from trocar.report.figures import SVG, draw
from trocar.report.numbers import arrow, change, compact, direction, interval, notes, probability, size
from trocar.report.where import scores_map
from trocar.result import FILE, TableRow, read_result, write_result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = make(tmp_path_factory.mktemp("runs") / "run")
    return folder, write_report(folder).read_text()


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


def change_result(folder, **changes):
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, **changes}))


class Page(HTMLParser):
    """Tags, attributes, and whether every opened tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open[-1] in {"tr", "td", "th", "li", "dt", "dd", "p", "tbody", "thead"} and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_holds_every_section_and_closes_every_tag(whole):
    page = Page(whole[1])
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert {"measured", "pictures", "where", "changed", "figures", "asked", "states"} <= set(ids)
    assert len(ids) == len(set(ids)), "ids are unique, so that no figure draws with another's clip path"
    text = " ".join(page.text)
    for needed in (
        "Passed",
        "All 3 checks hold.",
        "Tulips taken for insects",
        "where-to-edit",
        BEFORE,
        AFTER,
        "stop reason",
        "154 of 3,072",
    ):
        assert needed in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 1 + 3 + 5  # the sign, three scores, five figures
    assert sum(tag == "img" for tag, _ in page.tags) == 10


def test_page_is_self_contained(whole):
    page = Page(whole[1])
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for key in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(key, "")
            assert not re.match(r"(?i)(https?:)?//|javascript:", target), (tag, key, target)
    assert not re.search(r"url\((?!#)", whole[1])
    assert "@import" not in whole[1]


def test_links_into_the_folder_exist(whole):
    for tag, attributes in Page(whole[1]).tags:
        target = attributes.get("href", "")
        if tag == "a" and not target.startswith(("#", "data:")):
            assert (whole[0] / target).is_file()


def test_numbers_on_the_page_are_those_of_the_result(whole):
    result = read_result(whole[0])
    row = next(row for row in result.table if row.name == "generalisation")
    text = re.sub(r"\s+", " ", " ".join(Page(whole[1]).text))
    for shown in (f"{100 * row.after:.1f} %", f"+{100 * row.difference:.1f}", interval(row), f"{row.n} edits in {row.n_groups} groups"):
        assert shown in text
    assert f"{row.left_out} edits left out" in text


def test_equal_folders_give_equal_bytes(whole, tmp_path):
    other = make(tmp_path / "elsewhere")
    assert write_report(other).read_text() == whole[1]
    assert write_report(other, other / "copy.html").read_text() == whole[1]


def test_a_report_elsewhere_still_links_into_the_folder(folder, tmp_path):
    page = Page(write_report(folder, tmp_path / "shown" / "index.html").read_text())
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a" and attributes["href"].startswith(".")]
    assert len(links) == 10  # patch, three scores, five figures, recipe
    assert all((tmp_path / "shown" / link).is_file() for link in links)


def test_a_file_name_cannot_become_a_script(folder):
    name = "javascript:alert(1)"
    (folder / "figures/front.csv").rename(folder / name)
    content = json.loads((folder / FILE).read_text())
    content["figures"][0]["csv"] = name
    (folder / FILE).write_text(json.dumps(content))
    assert 'href="./javascript%3Aalert%281%29"' in write_report(folder).read_text()


def test_no_torch_and_no_model_is_needed(whole, tmp_path):
    code = (
        "import sys; from trocar.report import write_report, terminal_table; from trocar.result import read_result;"
        f"write_report({str(whole[0])!r}, {str(tmp_path / 'r.html')!r}); terminal_table(read_result({str(whole[0])!r}));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hover_texts_sit_on_the_marks_they_describe():
    rows = [{"k": k, "v": k * k, "s": s, "low": k, "high": 9} for s in ("a", "b") for k in (3, 1, 2)]

    for kind in ("curve", "points", "bars"):
        drawing = draw("f", kind, rows, "k", "v", series="s")
        titles = [title.text for title in ElementTree.fromstring(drawing.svg).iter(f"{{{SVG}}}title")]
        assert len(titles) == 6
        assert titles.count("a: k 3, v 9 [3, 9]") == 1
        assert [key.name for key in drawing.keys] == ["a", "b"]
    # in a scatter plot, the third mark of the curve (sorted by k) lies to the right of the first
    svg = ElementTree.fromstring(draw("f", "curve", rows, "k", "v", series="s").svg)
    marks = [(float(use.get("x")), use[0].text) for use in svg.iter(f"{{{SVG}}}use") if len(use)]
    first = [at for at, text in marks if text.startswith("a")]
    assert first == sorted(first)
    assert [text.split(",")[0] for _, text in marks if text.startswith("a")] == ["a: k 1", "a: k 2", "a: k 3"]


def test_heat_map_cells_and_shades():
    rows = [{"x": str(x), "y": y, "v": v} for x, y, v in ((0, "L0", 0.0), (1, "L0", 0.5), (0, "L1", 1.0), (1, "L1", "nan"))]
    drawing = draw("h", "heatmap", rows, "x", "y", "v")
    assert drawing.scale == ("0", "1", "")
    assert drawing.svg.count("<title>") == 4
    assert "L1, x 1: v none" in drawing.svg
    assert "fill: var(--heat)" in drawing.svg
    signed = draw("h", "heatmap", [{**rows[0], "v": -2}, {**rows[1], "v": 1}], "x", "y", "v")
    assert signed.scale == ("−2", "2", "diverging")
    assert "var(--cold)" in signed.svg
    below = draw("h", "heatmap", [{**rows[0], "v": -2e-4}, {**rows[1], "v": -1e-4}], "x", "y", "v")
    assert below.scale == ("−0.0002", "0", "cold")  # the strongest shade is the largest effect, not the smallest
    assert "fill: var(--heat)" not in below.svg


def words_of(svg):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{{{SVG}}}text")]


def test_long_names_under_columns_stay_readable():
    names = ["<s>", "the", "country that employs", "Ada", "Lovelace (last token of the subject)", "is", "of", "(last)"]
    for kind in ("heatmap", "curve"):
        words = words_of(draw("long", kind, [{"position": name, "layer": 1e-4, "value": 1} for name in names], "position", "layer").svg)
        assert "country that employs" in words  # slanted, all of them there
        assert "Lovelace (last token of the…" in words
    few = [{"kind": name, "effect": 1} for name in ("attention output of the block", "MLP output")]
    assert "MLP output" in words_of(draw("few", "curve", few, "kind", "effect").svg)
    numbered = words_of(draw("numbers", "heatmap", [{"x": n, "y": 0, "value": 1} for n in range(60)], "x", "y").svg)
    assert "0" in numbered
    assert "59" not in numbered


def test_small_values_do_not_become_rows_of_zeros():
    words = words_of(draw("small", "curve", [{"layer": n, "effect": (n - 2) * 1e-5} for n in range(5)], "layer", "effect").svg)
    assert "effect (× 10⁻⁵)" in words
    assert not any(word.startswith(("0.000", "−0.000")) for word in words)
    assert "effect" in words_of(draw("plain", "bars", [{"layer": "L1", "effect": -0.5}], "layer", "effect").svg)


def add(folder, **more):
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, **more}))


def test_what_it_says(folder):
    evil = "<script>alert(1)</script>"
    rows = [("p & q", "Paris", "Rome", "Paris", "", "", "no", "yes"), ("r", "Paris", "Paris", "Paris", "", "", "yes", "yes")]
    rows += [
        ("s", "x", "x", evil, "", "loop", "yes", "no"),
        ("t", "x", "a\nb", "c", "", "", "no", "no"),
        *[("u", "", "v", "w", "", "", "", "")] * 30,
    ]
    head = ("prompt", "truth", "before", "after", "mark_before", "mark_after", "right_before", "right_after")
    (folder / "texts").mkdir()
    with (folder / "texts/a.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *rows])
    add(folder, transcripts=[{"id": "a", "title": "Answers", "caption": "Greedy.", "csv": "texts/a.csv"}])
    text = write_report(folder).read_text()
    page = Page(text)
    assert page.open == []
    assert not any(tag == "script" for tag, _ in page.tags)
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    assert [classes.count(name) for name in ("fixed", "kept", "broken", "wrong", "unjudged")] == [1, 1, 1, 1, 30]
    words = re.sub(r"\s+", " ", "".join(page.text))
    assert "2 of 4 right before, 2 after" in words
    assert "10 more" in words  # folded
    assert "p & q" in words
    assert "loop" in words
    assert 'href="#texts"' in text
    add(folder, transcripts=[{"id": "a", "title": "Answers", "csv": "texts/a.csv", "marked": True}])
    text = write_report(folder).read_text()
    assert "2 of 4 without an error before, 2 after" in text  # a mark is about errors, not about being right
    assert "still right" not in text
    (folder / "texts/a.csv").write_text("prompt,truth\na,b\n")
    with pytest.raises(RunError, match="has no column before"):
        write_report(folder)
    add(folder, transcripts=[{"id": "a", "title": "Answers", "csv": "../a.csv"}])
    with pytest.raises(RunError, match="outside of the run folder"):
        write_report(folder)


def test_tables_among_the_figures(folder):
    (folder / "figures/t.csv").write_text('measured,mean change,n\ncorrection,"+1,703 %",40\n<b>,−2 %,160\n')
    add(folder, figures=[{"id": "t", "title": "Relative", "kind": "table", "x": "measured", "y": "n", "csv": "figures/t.csv"}])
    text = write_report(folder).read_text()
    assert Page(text).open == []
    assert '<td class="number">+1,703 %</td>' in text
    assert "<td>&lt;b&gt;</td>" in text


def test_awkward_figures_are_drawn():
    text = [{"x": name, "y": 0.5} for name in ("a <b> & c", "d")]
    for kind in ("curve", "points", "bars"):
        assert "&lt;b&gt;" in draw("t", kind, text, "x", "y").svg
        draw("one", kind, [{"x": 1, "y": 2}], "x", "y")
        draw("hole", kind, [{"x": 1, "y": "nan"}, {"x": 2, "y": 1}], "x", "y")
    draw("long", "bars", [{"x": f"a rather long name {row}", "y": row} for row in range(9)], "x", "y")
    draw("wide", "heatmap", [{"x": column, "y": line, "value": 0} for column in range(64) for line in range(32)], "x", "y", "value")
    draw("many", "curve", [{"x": step, "y": step, "s": f"series {part}"} for part in range(11) for step in range(3)], "x", "y", series="s")


def test_text_from_the_run_cannot_become_markup(folder):
    evil = "<script>alert(1)</script>"
    content = json.loads((folder / FILE).read_text())
    content["title"] = evil
    content["log"] = {evil: evil}
    content["asked"] = {"model": evil}
    content["table"][0].update(name=evil, scorer=evil, unit=evil)
    content["figures"][0].update(title=evil, caption=evil, id='"><script>')
    content["galleries"][0]["items"][0]["after"] = evil
    content["patch"]["ops"][0]["where"] = evil
    (folder / FILE).write_text(json.dumps(content))
    page = Page(write_report(folder).read_text())
    assert not any(tag == "script" for tag, _ in page.tags)
    assert page.open == []


def test_failed_and_unchecked_runs_say_so(tmp_path):
    failed = make(tmp_path / "failed", locality=0.9)
    text = re.sub(r"\s+", " ", write_report(failed).read_text())
    assert "1 of 3 checks does not hold." in text
    assert "verdict failed" in text
    assert verdict_line(read_result(failed)) == "1 of 3 checks does not hold"
    plain = make(tmp_path / "plain", checks=False)
    assert "no checks were asked for" in write_report(plain).read_text()


def test_measurements_on_other_states_are_marked(folder):
    assert "made on exactly these two states" in write_report(folder).read_text()
    content = json.loads((folder / FILE).read_text())
    content["table"][1]["state_after"] = "f" * 32
    (folder / FILE).write_text(json.dumps(content))
    text = write_report(folder).read_text()
    assert "on other states than below" in text
    assert "1 measurement was made on other states" in text
    content["table"][1]["state_after"] = "each of 6 edits"
    (folder / FILE).write_text(json.dumps(content))
    text = write_report(folder).read_text()
    assert "on other states" not in text
    assert "after each of 6 edits" in text
    assert "1 measurement is not of this one state after" in text
    for row in content["table"][:-1]:
        row["state_after"] = "each of 6 edits"
    (folder / FILE).write_text(json.dumps(content))
    told = f"of each of 6 edits, made and measured one by one, but for {content['table'][-1]['name']}.</strong> That is of the patch"
    assert told in write_report(folder).read_text()
    for row in content["table"]:
        row["state_after"] = "each of 6 edits"
    (folder / FILE).write_text(json.dumps(content))
    text = write_report(folder).read_text()
    assert "Every number after is of each of 6 edits" in text  # once, not in every row
    assert "after each of 6 edits" not in text


def test_one_component_a_layer_lies_side_by_side():
    blocks = scores_map(Scores("attention", "", {f"L{n}.attn": n / 10 for n in range(4)}, How("patching")))
    assert [row["layer"] for row in blocks.rows] == ["L0", "L1", "L2", "L3"]
    assert (blocks.x, {row["component"] for row in blocks.rows}) == ("layer", {"attention"})
    assert "4 attention modules scored" in blocks.caption
    mask = scores_map(Scores("block", "", {"L0": 1, "L1": 0}, How("top")))
    assert mask.x == "layer"
    assert mask.listed == "chosen"


def test_what_to_know_first(folder):
    changed = read_result(folder)
    assert notes(changed) == []
    log = {"says": ["No head is in all sets."], "notes": ["the <target> begins like the bridge"], "kept": 3}
    same = {**changed.model.model_dump(), "fingerprint_after": BEFORE}
    change_result(folder, log=log, model=same, patch={**changed.patch.model_dump(), "ops": []})
    result = read_result(folder)
    assert notes(result)[0].startswith("Nothing was changed")
    assert len(notes(result)) == 3
    text = write_report(folder).read_text()
    assert "<li>the &lt;target&gt; begins like the bridge</li>" in text
    assert "patch.applied" not in text
    assert text.count("No head is in all sets.") == 1
    console = Console(width=200, file=io.StringIO())
    console.print(terminal_table(result))
    assert "note: No head is in all sets." in console.file.getvalue()


def test_a_list_of_findings_is_readable(folder):
    change_result(folder, log={"layers": [{"layer": 4, "share": 0.123456}, {"layer": 5, "share": None}]})
    text = re.sub(r"\s+", " ", " ".join(Page(write_report(folder).read_text()).text))
    assert "layers · 0 layer 4, share 0.1235" in text


def test_a_run_without_optional_parts(folder):
    change_result(folder, checks=[], verdict="unchecked", figures=[], galleries=[], patch=None, scores=[], log={})
    page = Page(write_report(folder).read_text())
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert "measured" in ids
    assert not ids & {"pictures", "where", "changed", "figures"}


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda f: shutil.rmtree(f), "no run folder"),
        (lambda f: (f / FILE).unlink(), "has no result.json"),
        (lambda f: (f / FILE).write_text("{"), "is damaged"),
        (lambda f: (f / FILE).write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda f: (f / FILE).write_text("[" * 100_000), "is damaged"),
        (lambda f: (f / FILE).write_text("[]"), "is damaged"),
        (lambda f: change_result(f, verdict="perfect"), "is damaged: .*verdict"),
        (lambda f: change_result(f, format=2), "format 2"),
        (lambda f: change_result(f, surprise=1), "surprise"),
        (lambda f: (f / "figures/front.csv").unlink(), r"there is no figures/front\.csv"),
        (lambda f: (f / "figures/front.csv").write_text("locality,generalisation\n1,2\n"), "lacks the column method"),
        (lambda f: (f / "figures/front.csv").write_text("locality,generalisation,method\n1,2\n"), "too many or too few"),
        (lambda f: (f / "figures/front.csv").write_text(""), "no rows"),
        (lambda f: (f / "figures/overlap.csv").write_text("edit,other edit,iou\na,b,\n"), "no finite value"),
        (lambda f: (f / "figures/front.csv").write_bytes(b"\xff\xfe\n"), "not a CSV"),
        (lambda f: (f / "pictures/failures/3.png").write_bytes(b"GIF89a"), "not a PNG"),
        (lambda f: (f / "scores/mask.safetensors").write_bytes(b"junk"), "is damaged"),
        (lambda f: (f / "patch.safetensors").unlink(), r"there is no patch\.safetensors"),
    ],
)
def test_bad_folders(folder, damage, what):
    before = (folder / "report.html").read_bytes()
    damage(folder)
    with pytest.raises(RunError, match=what):
        write_report(folder)
    assert not folder.exists() or (folder / "report.html").read_bytes() == before


@pytest.mark.parametrize("name", ["../secret.csv", "/etc/passwd", "figures/../../secret.csv"])
def test_files_outside_of_the_folder_are_not_read(folder, name):
    (folder.parent / "secret.csv").write_text("locality,generalisation,method\n1,2,secret\n")
    content = json.loads((folder / FILE).read_text())
    content["figures"][0]["csv"] = name
    (folder / FILE).write_text(json.dumps(content))
    with pytest.raises(RunError, match="outside"):
        write_report(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder):
    (folder.parent / "secret.png").write_bytes((folder / "pictures/failures/0.png").read_bytes())
    (folder / "pictures/failures/0.png").unlink()
    (folder / "pictures/failures/0.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(RunError, match="outside"):
        write_report(folder)


def test_result_round_trip(folder):
    result = read_result(folder)
    before = (folder / FILE).read_bytes()
    write_result(folder, result)
    assert (folder / FILE).read_bytes() == before
    assert read_result(folder) == result


def test_terminal_table(whole):
    from rich.console import Console

    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(read_result(whole[0])))
    text = console.export_text()
    for needed in ("generalisation", "PASSED", "all 3 checks hold", "97.5 %", "▼ −2.5", "✓"):
        assert needed in text


def row(**changes):
    base = {
        "name": "m", "unit": "image", "form": "number", "better": "higher", "scorer": "s", "n": 2, "n_groups": 0, "left_out": 0,
        "left_out_groups": 0, "before": 1.0, "after": 2.0, "difference": 1.0, "low": 0.5, "high": 1.5, "ratio": 2.0, "p": 0.01, "test": "t",
        "interval": "bootstrap", "state_before": "a", "state_after": "b",
    }  # fmt: skip
    return TableRow.parse({**base, **changes})


def test_numbers_as_people_read_them():
    assert [compact(value) for value in (1221130.0, 0.35172, 1.2e-6, -3.0, 12345.6, None, float("nan"), float("-inf"))] == [
        *("1,221,130", "0.3517", "1.2e−06", "−3", "12,346", "–", "–", "−∞"),
    ]
    assert [size(count) for count in (12, 191_488, 5 << 30)] == ["12 bytes", "187.0 KiB", "5.0 GiB"]
    assert [probability(p) for p in (None, 0.0001, 0.0421, 0.5)] == ["–", "< 0.001", "0.042", "0.50"]
    share = row(form="share", difference=-0.025, low=-0.045, high=0.0)
    assert (change(share, share.difference), interval(share), arrow(share)) == ("−2.5", "[−4.5, ±0.0]", "▼")


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({}, "good"),
        ({"better": "lower"}, "bad"),
        ({"better": "same"}, "bad"),
        ({"better": "same", "low": -0.5}, "none"),
        ({"better": "same", "low": None}, "none"),
        ({"difference": 0.0}, "none"),
        ({"difference": -1.0, "better": "lower"}, "good"),
    ],
)
def test_direction(changes, way):
    assert direction(row(**changes)) == way
