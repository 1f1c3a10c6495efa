"""Rows of columns from parquet, JSONL or the hub; and where pictures come from: columns plus encoded images, also from class folders.

Nothing is decoded here, so that filters on columns cost nothing. Reading never executes code and never leaves the source's own folder
unless the caller allows it.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trocar.core.errors import DataError, MissingExtraError, nearest
from trocar.core.seeds import generator

SETS = {"cifar100": "CIFAR-100 (Krizhevsky 2009): columns `fine`, `coarse`", "pacs": "PACS (Li et al. 2017): columns `domain`, `label`"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
EXCERPTS = Path(__file__).with_name("excerpts")


@dataclass(frozen=True)
class Table:
    """Rows not yet decoded. images: encoded bytes or a file per row, or nothing; columns: name -> value per row; origin: for messages."""

    origin: str
    images: Sequence[bytes | Path]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images) if self.images else max((len(cells) for cells in self.columns.values()), default=0)

    def column(self, name: str) -> Sequence[Any]:
        if name not in self.columns:
            raise DataError(f"{self.origin} has no column '{name}'.", nearest(name, self.columns) if self.columns else "It has no columns.")
        return self.columns[name]

    def take(self, rows: Sequence[int]) -> Table:
        images = [self.images[r] for r in rows] if self.images else []
        return Table(self.origin, images, {k: [v[r] for r in rows] for k, v in self.columns.items()})

    def where(self, conditions: Mapping[str, Any]) -> Table:
        """Rows whose columns equal the wanted value (or one of a list). A value that never occurs is an error."""
        rows: Sequence[int] = range(len(self))
        for name, wanted in conditions.items():
            column = self.column(name)
            values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
            try:
                present = set(column)
            except TypeError:
                raise DataError(f"{self.origin}: column '{name}' holds lists or records, so no value of it can be wanted.") from None
            for value in values:
                if value not in present:
                    known = {str(item) for item in present}
                    raise DataError(
                        f"{self.origin}: no row has {name} = {value!r}.", nearest(str(value), known) if len(known) < 500 else ""
                    )
            rows = [row for row in rows if column[row] in values]
        return self.take(rows)

    def name(self, row: int) -> str:
        image = self.images[row]
        return str(image) if isinstance(image, Path) else f"row {row} of {self.origin}"


def chosen(table: Table, where: Mapping[str, Any], limit: int | None, seed: int) -> Table:
    """The rows that fit `where`, at most `limit` of them, drawn with `seed` and kept in the table's order. DataError if none is left."""
    table = table.where(where)
    if not len(table):
        raise DataError(f"{table.origin}: no row is left after the filters {dict(where)}.")
    if limit is None or limit >= len(table):
        return table
    import torch

    order = torch.randperm(len(table), generator=generator(seed, "limit"))[:limit]
    return table.take(sorted(order.tolist()))


def data_folder() -> Path:
    """The folder of the named sets: TROCAR_DATA, or `../shared/data` beside a checkout of the repository."""
    if "TROCAR_DATA" in os.environ:
        return Path(os.environ["TROCAR_DATA"])
    return Path(__file__).resolve().parents[3].parent / "shared" / "data"


def read(source: str, base: Path | None = None, image: str = "image", allow_outside: bool = False) -> Table:
    """Rows of `source`.

    source: `cifar100:train`, `pacs:test` (sets under TROCAR_DATA); `lab:NAME` (an excerpt inside the package); `hub:OWNER/NAME:SPLIT`
    (through `datasets`); a folder with one sub-folder per class (column `label`), a `.parquet` file, or a `.jsonl` file.
    base: folder that relative paths start from (a recipe passes its own). image: the image column of parquet, JSONL and hub sets: bytes, a
    `{bytes, path}` record, or a path relative to the file. allow_outside: follow absolute paths and paths out of that file's folder.
    Raises DataError that names what is missing.
    """
    kind, _, rest = source.partition(":")
    if kind == "lab":
        return _parquet(_excerpt(rest), image, False, source)
    if kind == "hub":
        return _hub(rest, image)
    if kind in SETS:
        return _parquet(_set_file(kind, rest or "test"), image, False, source)
    path = (base or Path()) / source
    if not path.exists():
        hint = "Known sets: " + ", ".join([*(f"{name}:train|test" for name in SETS), *(f"lab:{name}" for name in excerpts())])
        raise DataError(f"Data source '{source}' is neither a known set nor an existing file or folder ({path}).", hint + ".")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".parquet":
        return _parquet(path, image, allow_outside)
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, image, allow_outside)
    raise DataError(f"Data file '{path}' has an unknown ending '{path.suffix}'.", "Give a class folder, a .parquet or a .jsonl file.")


def excerpts() -> list[str]:
    """Names of the excerpts that come with the package."""
    return sorted(path.stem for path in EXCERPTS.glob("*.parquet"))


def _excerpt(name: str) -> Path:
    path = EXCERPTS / f"{name}.parquet"
    if name not in excerpts():
        raise DataError(f"The package has no excerpt 'lab:{name}'.", nearest(name, excerpts()))
    return path


def _set_file(name: str, split: str) -> Path:
    if split not in ("train", "test"):
        raise DataError(f"Set '{name}' has no split '{split}'.", "Use train or test.")
    path = data_folder() / f"{name}-{split}.parquet"
    if not path.exists():
        raise DataError(
            f"{path} does not exist.", f"Set TROCAR_DATA to the folder that holds {name}-train.parquet and {name}-test.parquet."
        )
    return path


def _folder(path: Path) -> Table:
    """One sub-folder per class, pictures at any depth below it; sorted, so that the order is the same on every file system."""
    images, labels = [], []
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in PICTURES and not file.name.startswith("."):
                images.append(file)
                labels.append(folder.name)
    if not images:
        raise DataError(
            f"Folder '{path}' holds no pictures in class sub-folders.", f"Expected {path}/CLASS/NAME with one of {', '.join(PICTURES)}."
        )
    return Table(str(path), images, {"label": labels, "file": [str(image.relative_to(path)) for image in images]})


def _parquet(path: Path, image: str, allow_outside: bool, origin: str = "") -> Table:
    return _from_columns(origin or str(path), parquet_columns(path), image, path.parent, allow_outside)


def parquet_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a parquet file. DataError if it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"'{path}' is not a readable parquet file ({str(error).splitlines()[0]}).") from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _jsonl(path: Path, image: str, allow_outside: bool) -> Table:
    rows = json_lines(path)
    for number, row in rows:
        if image not in row:
            raise DataError(f"Line {number} of '{path}' has no key '{image}'.", "Every line is an object with the image's path.")
    return _from_columns(str(path), columns_of([row for _, row in rows]), image, path.parent, allow_outside)


def json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSONL file, `.gz` too. DataError naming the line that is none."""
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"Line {number} of '{path}' is not JSON ({error.msg}).") from None
            if not isinstance(row, dict):
                raise DataError(f"Line {number} of '{path}' is {type(row).__name__}, not an object.", "Write one JSON object a line.")
            rows.append((number, row))
    return rows


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Records as columns; None where a record lacks a key."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, unpacked if it ends in `.gz`. DataError if it is none."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"'{path}' is not text in UTF-8.", "JSON lines and plain texts are read as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read ({error}).") from None


def _hub(name: str, image: str) -> Table:
    return _from_columns(f"hub:{name}", hub_columns(name, image), image, Path(), True)


def hub_columns(name: str, image: str | None = None) -> dict[str, list[Any]]:
    """The columns of hub set OWNER/NAME:SPLIT (default split `test`), read by `datasets`; images stay encoded."""
    repository, _, split = name.partition(":")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("Hub data sets need the package `datasets`.", "pip install datasets") from None
    try:
        data = datasets.load_dataset(repository, split=split or "test")
    except Exception as error:  # the client raises many classes: offline, missing, gated, no such split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"Data set '{repository}' (split '{split or 'test'}') could not be had from the hub: {reason}",
            "Check the name, the split and the network (HF_HUB_OFFLINE), or save it as parquet and give the file.",
        ) from None
    if image in data.column_names and isinstance(data.features.get(image), datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))
    columns: dict[str, list[Any]] = {column: list(data[column]) for column in data.column_names}
    for column, feature in data.features.items():
        if isinstance(feature, datasets.ClassLabel):  # names are what the model's label2id knows
            columns[column] = [feature.int2str(value) for value in columns[column]]
    return columns


def _from_columns(origin: str, columns: dict[str, list[Any]], image: str, folder: Path, allow_outside: bool) -> Table:
    table = Table(origin, [], columns)
    cells = table.column(image)
    rest = {name: values for name, values in columns.items() if name != image}
    return Table(origin, [_cell(cell, f"row {row} of {origin}", folder, allow_outside) for row, cell in enumerate(cells)], rest)


def _cell(cell: Any, where: str, folder: Path, allow_outside: bool) -> bytes | Path:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str) or not cell:
        raise DataError(f"{where}: the image is {type(cell).__name__}, not bytes or a path.")
    path = folder / cell
    if not allow_outside and not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: image path '{cell}' leads out of '{folder}'.", "Move the picture below it or allow paths outside.")
    return path
