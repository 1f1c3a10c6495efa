"""YAML that means what it says: plain data only, no key twice, no tags, `1e-3` is a number and `no` is a word. Floor 6."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from trocar.core.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # after aliases are followed: nested aliases can name more nodes than fit any memory

# The scalar rules of YAML 1.2, instead of 1.1's, which read `no` as false, `1e-3` as text and `12:30` as 750.
_RULES: tuple[tuple[str, str, str], ...] = (
    ("tag:yaml.org,2002:null", r"(~|null|Null|NULL|)", "~nN\0"),
    ("tag:yaml.org,2002:bool", r"(true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; the tables are its own, so that the process-wide loader is left alone."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - pyyaml's own convention
    yaml_constructors = yaml.SafeLoader.yaml_constructors.copy()


class _Dumper(yaml.SafeDumper):
    """Writes no anchors, and quotes what either version of YAML would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_BREAKS = re.compile("[\x85\u2028\u2029]")  # line breaks to YAML 1.1, so they must be escaped


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if _BREAKS.search(value) else None)


_Dumper.add_representer(str, _text)

for _tag, _pattern, _first in _RULES:
    for _class in (_Loader, _Dumper):  # add_implicit_resolver copies the inherited table before it writes
        _class.add_implicit_resolver(
            _tag, re.compile(rf"^(?:{_pattern})$"), ["" if character == "\0" else character for character in _first]
        )

_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def _whole(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))  # 1.1 reads 010 as 8


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document. Raises ConfigError with line and column for anything but plain, finite, unambiguous data."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} holds {len(text):,} characters.", f"A recipe has at most {MAX_BYTES:,}.")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where, set(), {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{_place(mark)} is not valid YAML: {problem}.", "Check indentation, colons and quotes there.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid YAML: {error}.") from None
    finally:
        loader.dispose()


def read_yaml(path: str | Path) -> Any:
    """Read and parse a file. Raises ConfigError if there is none, it is not text, or it is not strict YAML."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} holds {file.stat().st_size:,} bytes.", f"A recipe has at most {MAX_BYTES:,}.")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {(error.strerror or str(error)).lower()}.", "Give the path of a recipe in YAML."
        ) from None
    return parse_yaml(text, str(path))


def dump_yaml(data: Any) -> str:
    """Write plain data so that `parse_yaml` gives it back, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _place(mark: Any) -> str:
    return f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""


def _check(node: yaml.Node, where: str, above: set[int], sizes: dict[int, int]) -> int:
    """The number of nodes below and with `node`, aliases followed. Refuses tags, double keys, cycles and explosions."""
    if id(node) in above:
        raise ConfigError(f"{where}{_place(node.start_mark)} contains itself.", "Remove the alias that points upward.")
    if id(node) in sizes:
        return sizes[id(node)]
    if node.tag not in _PLAIN:
        raise ConfigError(f"{where}{_place(node.start_mark)} uses the tag {node.tag!r}.", "A recipe holds plain data only; remove the tag.")
    above.add(id(node))
    size = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{where}{_place(key.start_mark)} has a key that is not a plain word.")
            if key.value in seen:
                raise ConfigError(f"{where}{_place(key.start_mark)} has the key '{key.value}' a second time.", "Remove one of the two.")
            seen.add(key.value)
            size += 1 + _check(value, where, above, sizes)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, where, above, sizes) for item in node.value)
    above.discard(id(node))
    if size > MAX_NODES:
        raise ConfigError(f"{where} names more than {MAX_NODES:,} values once its aliases are followed.", "Remove the nested aliases.")
    sizes[id(node)] = size
    return size
