"""Texts for methods that read texts: rows of columns from files, named sets, the package's excerpts, the hub, or a knowledge world.

A row of texts has no tensors yet: which of its columns become prompts is the method's business. Reading never executes code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import pydantic

from trocar.core.config import Config
from trocar.core.errors import DataError, nearest
from trocar.lab.sources import EXCERPTS, Table, chosen, columns_of, data_folder, hub_columns, json_lines, parquet_columns, text_of
from trocar.method import Examples

Plain = str | int | float | bool
Unit = Literal["paragraph", "line", "file"]
HEADING = re.compile(r"\s*=.*=\s*")
# named set -> what it is, its splits ("" for any name)
SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wikitext2": ("WikiText-2 (Merity 2016), paragraphs without headings: `text`", ("valid", "test")),
    "multi30k": ("Multi30k captions (Elliott 2016): `en`, `de`, `fr`, `cs`", ("train", "val", "test_2016_flickr")),
    "function_vectors": ("short tasks (Todd et al. 2024), one a name: `input`, `output`", ()),
    "gsm8k": ("word problems (Cobbe 2021): `question`, `answer`", ("train", "test")),
    "shakespeare": ("plays, paragraphs: `text`", ()),
}
# sets that lie beside the method they were made for
WITH_METHODS = {"two-hop": Path(__file__).parents[1] / "edit" / "creme" / "data" / "two_hop.jsonl"}
WORLD = ("held-out", "trained", "single", "text")
LANGUAGES = ("en", "de", "fr", "cs")


class TextConfig(Config):
    """Where rows of text come from and which of them are wanted.

    source: see `read`. columns: new name -> the source's column, for sets that name theirs otherwise. where: column -> wanted value or list
    of values. limit: at most so many, drawn with `seed` (kept in the source's order). unit: what a row of a plain text file is.
    """

    source: str = pydantic.Field(min_length=1)
    columns: dict[str, str] = pydantic.Field(default_factory=dict)
    where: dict[str, Plain | tuple[Plain, ...]] = pydantic.Field(default_factory=dict)
    limit: int | None = pydantic.Field(None, ge=1)
    seed: int = pydantic.Field(0, ge=0)
    unit: Unit = "paragraph"


def load_texts(data: TextConfig | Mapping[str, Any] | str, base: Path | None = None) -> Examples:
    """Load `data` (a TextConfig, a mapping of its keys, or just a source) as Examples without inputs and labels.

    fields: the source's columns after renaming, any values that JSON knows; filters speak of the new names. ids: digests of the rows as
    read, so that the same row has the same id whatever is filtered out around it; equal rows are told apart by their count. base:
    folder of relative paths. Raises DataError naming what is missing, damaged or unknown.
    """
    config = data if isinstance(data, TextConfig) else TextConfig.parse({"source": data} if isinstance(data, str) else dict(data), "data")
    table = read(config.source, base, config.unit)
    if not len(table):
        raise DataError(f"{table.origin} holds no rows.")
    if "_id" in table.columns:
        raise DataError(f"{table.origin} has a column '_id', a name that is taken.", "Rename it in the file.")
    table = Table(table.origin, [], {**_renamed(table, config.columns), "_id": _ids(table)})
    table = chosen(table, config.where, config.limit, config.seed)
    fields = {name: list(cells) for name, cells in table.columns.items() if name != "_id"}
    return Examples({}, tuple(table.columns["_id"]), None, None, fields)


def read(source: str, base: Path | None = None, unit: Unit = "paragraph") -> Table:
    """The rows of `source`.

    source: a file (`.jsonl`, `.json` with a list of objects, `.txt` read by `unit` into a column `text`, all three packed as `.gz` too,
    or `.parquet`), relative to `base`; a named set under TROCAR_DATA (`wikitext2:test`, `multi30k:val`, `function_vectors:antonym`,
    `gsm8k:test`, `shakespeare`); `lab:NAME`, an excerpt inside the package; `hub:OWNER/NAME:SPLIT`, through `datasets`; or the knowledge
    world of a base seed, `world:held-out?seed=1`: `held-out` and `trained` are cases for CREME, `single` the single facts as `prompt` and
    `answer`, `text` the training sentences. `multi30k:val?longest=10` keeps rows of at most ten words in each of en, de and fr.
    """
    kind, _, rest = source.partition(":")
    name, _, query = rest.partition("?")
    if kind == "lab":
        return _excerpt(name)
    if kind == "hub":
        return Table(source, [], hub_columns(rest))
    if kind == "world" or kind in SETS:
        return Table(source, [], _world(name, query, source) if kind == "world" else _set(kind, name, query, source))
    path = (base or Path()) / source
    if not path.is_file():
        known = [f"{name}:{'|'.join(splits) or 'NAME'}" for name, (_, splits) in SETS.items() if name != "shakespeare"]
        hint = ", ".join([*known, "shakespeare", f"world:{'|'.join(WORLD)}", *(f"lab:{name}" for name in excerpts())])
        raise DataError(f"Text source '{source}' is neither a known set nor an existing file ({path}).", f"Known sets: {hint}.")
    return Table(source, [], _file(path, unit))


def excerpts() -> list[str]:
    """Names of the text excerpts that come with the package."""
    return sorted([*(path.name.partition(".")[0] for path in EXCERPTS.glob("*.jsonl.gz")), *WITH_METHODS])


def _file(path: Path, unit: Unit) -> dict[str, list[Any]]:
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending in (".jsonl", ".ndjson"):
        return columns_of([row for _, row in json_lines(path)])
    if ending == ".json":
        return columns_of(_records(path))
    if ending == ".parquet" and path.suffix != ".gz":
        return parquet_columns(path)
    if ending == ".txt":
        return {"text": _pieces(text_of(path), unit)}
    raise DataError(f"Text file '{path}' has an unknown ending.", "Give a .jsonl, .json, .parquet or .txt file (or .gz of a text).")


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is not JSON (line {error.lineno}: {error.msg}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"'{path}' is not a list of objects.", 'Write [{"column": value, ...}, ...].')
    return rows


def _pieces(text: str, unit: Unit) -> list[str]:
    """The text's lines, its paragraphs (between blank lines), or all of it; nothing empty."""
    parts: list[str] = text.splitlines() if unit == "line" else re.split(r"\n\s*\n", text) if unit == "paragraph" else [text]
    return [part.strip() for part in parts if part.strip()]


def _set(kind: str, name: str, query: str, source: str) -> dict[str, list[Any]]:
    folder, splits = data_folder() / kind, SETS[kind][1]
    if splits and name not in splits:
        raise DataError(f"Set '{kind}' has no split '{name}'.", f"Use {', '.join(splits)}.")
    longest = _number(query, "longest", source) if kind == "multi30k" else _number(query, "", source)
    if kind == "multi30k":
        columns = {code: text_of(_there(folder / f"{name}.{code}.gz")).splitlines() for code in LANGUAGES}
        if len({len(lines) for lines in columns.values()}) != 1:
            raise DataError(f"The files {folder}/{name}.*.gz have different numbers of lines.", "Fetch the set again.")
        short = [n for n, row in enumerate(zip(*columns.values(), strict=True)) if longest is None or _fits(row[:3], longest)]
        return {code: [lines[n].strip() for n in short] for code, lines in columns.items()}
    if kind == "gsm8k":
        return columns_of([row for _, row in json_lines(_there(folder / f"{name}.jsonl.gz"))])
    if kind == "wikitext2":  # a paragraph is a line there
        lines = _pieces(text_of(_there(folder / f"{name}.txt.gz")), "line")
        return {"text": [line for line in lines if not HEADING.fullmatch(line)]}
    if kind == "shakespeare":
        return {"text": _pieces(text_of(_there(folder / "input.txt.gz")), "paragraph")}
    files = {path.name.partition(".")[0]: path for path in sorted(_there(folder).glob("*tractive/*.json.gz"))}
    if name not in files:
        raise DataError(f"Set '{kind}' has no task '{name}'.", nearest(name, files))
    return columns_of(_records(files[name]))


def _fits(row: tuple[str, ...], longest: int) -> bool:
    return all(0 < len(text.split()) <= longest for text in row)


def _there(path: Path) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist.", "Set TROCAR_DATA to the folder that holds the named sets.")
    return path


def _world(name: str, query: str, source: str) -> dict[str, list[Any]]:
    from trocar.lab.worlds import make_world

    seed = _number(query, "seed", source) or 0
    made: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "held-out": lambda: make_world(seed).cases(shown=False),
        "trained": lambda: make_world(seed).cases(shown=True),
        "single": lambda: [{"prompt": prompt, "answer": answer} for prompt, answer in make_world(seed).single_hops()],
        "text": lambda: [{"text": line} for line in make_world(seed).sentences()],
    }
    if name not in made:
        raise DataError(f"A world has no part '{name}'.", f"Use world:{', world:'.join(made)}.")
    return columns_of(made[name]())


def _number(query: str, key: str, source: str) -> int | None:
    """The whole number that `key=` has in the query; anything else in it is an error."""
    pairs = parse_qsl(query, keep_blank_values=True)
    if (query and not pairs) or any(name != key or not value.isdecimal() for name, value in pairs) or len(pairs) > 1:
        raise DataError(f"'?{query}' in '{source}' is not understood.", f"Say ?{key}=NUMBER." if key else "This set takes no settings.")
    return int(pairs[0][1]) if pairs else None


def _excerpt(name: str) -> Table:
    if name not in excerpts():
        raise DataError(f"The package has no text excerpt 'lab:{name}'.", nearest(name, excerpts()))
    path = WITH_METHODS.get(name, EXCERPTS / f"{name}.jsonl.gz")
    return Table(f"lab:{name}", [], columns_of([row for _, row in json_lines(path)]))


def _renamed(table: Table, names: Mapping[str, str]) -> dict[str, Any]:
    for old in names.values():
        table.column(old)  # DataError with the nearest name
    moved = set(names.values())
    columns = {name: cells for name, cells in table.columns.items() if name not in moved} | {
        new: table.column(o) for new, o in names.items()
    }
    if lost := next((new for new in names if new in table.columns and new not in moved), None):
        raise DataError(
            f"{table.origin}: column '{names[lost]}' cannot be renamed '{lost}', which is there already.", "Choose another name."
        )
    return columns


def _ids(table: Table) -> list[str]:
    seen: dict[str, int] = {}
    found = []
    for row in zip(*table.columns.values(), strict=True):
        text = json.dumps(dict(zip(table.columns, row, strict=True)), sort_keys=True, default=str)
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found
