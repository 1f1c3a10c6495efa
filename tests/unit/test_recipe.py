"""Reading recipes: strict YAML, the schema, overrides, roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.core.errors import ConfigError
from trocar.recipe import load_recipe, parse_recipe
from trocar.recipe.prepare import absolute, check_roles
from trocar.recipe.strict_yaml import MAX_BYTES, dump_yaml, parse_yaml, read_yaml

GOOD = """
version: 1
seed: 7
model: {source: lab:vit-cifar-rare, dtype: float32}
data:
  edit: &pictures {source: lab:cifar-rare, label: label, where: {role: failure}, limit: 2}
  locality.random: {<<: *pictures, where: {role: random}}
method: {name: where-to-edit, keep: 1e-1}
checks:
  - {measurement: success, op: ">=", threshold: 1}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


# -- YAML --------------------------------------------------------------------------------------------------------------------------


def test_scalars_mean_what_they_say() -> None:
    text = "{lr: 1e-3, half: .5, whole: 010, language: no, clock: 12:30, day: 2024-01-01, on: on, none: ~, yes: true, hex: 0x10}"
    assert parse_yaml(text, "x") == {
        "lr": 0.001,
        "half": 0.5,
        "whole": 10,
        "language": "no",
        "clock": "12:30",
        "day": "2024-01-01",
        "on": "on",
        "none": None,
        "yes": True,
        "hex": "0x10",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1, has the key 'a' a second time"),
        ("a: {b: 1, b: 2}", "the key 'b' a second time"),
        ("a: !!python/object/apply:os.system [x]", "uses the tag"),
        ("a: !!binary aGk=", "uses the tag"),
        ("a: !local 1", "uses the tag"),
        ("a: &a [*a]", "contains itself"),
        ("a: *missing", "undefined alias"),
        ("a: [1", "line 1"),
        ("a: 1\n---\nb: 2", "another document"),
        ("[[1]]: 2", "not a plain word"),
        ("? {a: 1}\n: 2", "not a plain word"),
        ("\ta: 1", "line 1, column 1"),
        ("a: 1\n b: 2", "line 2"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_anything_ambiguous_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "x")
    assert says in str(error.value)


def test_nested_aliases_are_counted_not_followed() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(ConfigError, match="nested aliases"):
        parse_yaml("\n".join(lines), "x")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin").write_bytes("a: ü".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml(tmp_path / "latin")
    (tmp_path / "large").write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="at most"):
        read_yaml(tmp_path / "large")


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | words
    | st.sampled_from(["no", "1e-3", "~", "010", "1:30", "<<", "=", ".5"])
)
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12)


@given(plain)
def test_what_is_written_is_what_is_read(data: Any) -> None:
    again = parse_yaml(dump_yaml(data), "x")
    assert again == data
    assert repr(again) == repr(data)  # 1 and 1.0 and True are equal, but not the same


# -- schema ------------------------------------------------------------------------------------------------------------------------


def test_a_recipe_is_read_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path, ["method.keep=0.5", "seed=9", "checks.0.threshold=.9", "data.locality.random.limit=5", "model.dtype=bfloat16"]
    )
    assert recipe.seed == 9
    assert recipe.method.settings == {"keep": 0.5}
    assert recipe.checks is not None
    assert recipe.checks[0]["threshold"] == 0.9
    assert recipe.data["locality.random"] == {"source": "lab:cifar-rare", "label": "label", "where": {"role": "random"}, "limit": 5}
    assert recipe.data["edit"]["limit"] == 2  # the anchor's other users are left alone
    assert recipe.model.dtype == "bfloat16"
    assert recipe.base == tmp_path
    assert load_recipe(path).method.settings == {"keep": 0.1}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version: 1", "version: 2", "version"),
        ("version: 1", "", "version"),
        ("seed: 7", "sed: 7", "Did you mean 'seed'?"),
        ("seed: 7", "seed: -1", "seed"),
        ("seed: 7", "seed: seven", "seed"),
        ("dtype: float32", "dtpye: float32", "Did you mean 'dtype'?"),
        ("dtype: float32", "dtype: float23", "model.dtype"),
        ("dtype: float32", "device: gpu", "model.device"),
        ("name: where-to-edit", "name: where-to-edt", "Did you mean 'where-to-edit'?"),
        ("name: where-to-edit, ", "", "method"),
        ("seed: 7", "base: /", "base is not a known setting"),
        ("checks:", "x-unused: {anything: [1]}\nchecks:", None),
        ("model: {source: lab:vit-cifar-rare, dtype: float32}", "model: lab:vit-cifar-rare", None),
    ],
)
def test_wrong_keys_and_values_are_named(tmp_path: Path, old: str, new: str, says: str | None) -> None:
    path = write(tmp_path, GOOD.replace(old, new))
    if says is None:
        assert load_recipe(path).model.source == "lab:vit-cifar-rare"
        return
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert says in str(error.value)
    assert str(path) in str(error.value) or "no method" in str(error.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_recipe_is_a_mapping(data: Any) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        parse_recipe(data)


@pytest.mark.parametrize("override", ["seed", "=1", "a..b=1", "checks.7.op=x", "checks.first.op=x", "seed.more=1", "seed=[1"])
def test_bad_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_recipe(write(tmp_path, GOOD), [override])


def test_an_override_reaches_into_a_short_form(tmp_path: Path) -> None:
    text = GOOD.replace("{source: lab:vit-cifar-rare, dtype: float32}", "lab:vit-cifar-rare")
    recipe = load_recipe(write(tmp_path, text), ["model.dtype=float16"])
    assert (recipe.model.source, recipe.model.dtype) == ("lab:vit-cifar-rare", "float16")
    assert load_recipe(write(tmp_path, text), ["model=other"]).model.source == "other"


def test_an_override_can_add_a_key_that_the_schema_then_judges(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD), ["output=elsewhere"]).output == "elsewhere"
    with pytest.raises(ConfigError, match="Did you mean 'output'"):
        load_recipe(write(tmp_path, GOOD), ["ouput=elsewhere"])


ROLES = {"edit": "the failing pictures", "group?": "others like them", "locality*": "what must stay"}


def test_roles() -> None:
    check_roles(ROLES, {"edit": {}})
    check_roles(ROLES, {"edit": {}, "group": {}, "locality": {}, "locality.random": {}, "locality.near": {}})
    with pytest.raises(ConfigError, match=r"data\.edit is missing: the failing pictures"):
        check_roles(ROLES, {"group": {}})
    with pytest.raises(ConfigError, match="Did you mean 'group'"):
        check_roles(ROLES, {"edit": {}, "gruop": {}})
    with pytest.raises(ConfigError, match=r"data\.edit\.more is not a role"):
        check_roles(ROLES, {"edit": {}, "edit.more": {}})


def test_paths_start_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert absolute("pictures", tmp_path) == str(tmp_path / "pictures")
    assert absolute("lab:cifar-rare", tmp_path) == "lab:cifar-rare"
    assert absolute("cifar100:test", tmp_path) == "cifar100:test"
