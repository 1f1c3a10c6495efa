"""Settings: frozen, strict about names, and an unknown key is answered with the nearest valid one."""

from __future__ import annotations

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trocar.core.config import Config
from trocar.core.errors import ConfigError, TrocarError, nearest


class Optimiser(Config):
    learning_rate: float = pydantic.Field(1e-3, gt=0)
    steps: int = 10


class Settings(Config):
    name: str
    optimiser: Optimiser = Optimiser()
    extra: Optimiser | None = None
    stages: tuple[Optimiser, ...] = ()


def test_valid_settings_are_frozen() -> None:
    settings = Settings.parse({"name": "x", "optimiser": {"steps": 3}})
    assert settings.optimiser.steps == 3
    with pytest.raises(pydantic.ValidationError):
        settings.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "path", "suggestion"),
    [
        ({"name": "x", "optimizer": {}}, "recipe.optimizer", "'optimiser'"),
        ({"name": "x", "optimiser": {"learning_rat": 1}}, "recipe.optimiser.learning_rat", "'learning_rate'"),
        ({"name": "x", "extra": {"step": 1}}, "recipe.extra.step", "'steps'"),
        ({"name": "x", "zzzzqq": 1}, "recipe.zzzzqq", "Known: extra, name, optimiser, stages."),
    ],
)
def test_unknown_keys_name_their_path_and_the_nearest_one(data: dict, path: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.parse(data, "recipe")
    assert caught.value.what == f"{path} is not a known setting."
    assert suggestion in caught.value.hint


def test_unknown_key_in_a_list_names_its_place() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.stages\.1\.step is not a known setting"):
        Settings.parse({"name": "x", "stages": [{}, {"step": 1}]}, "recipe")


def test_wrong_values_say_what_was_given_and_how_many_more_are_wrong() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.parse({"name": "x", "optimiser": {"learning_rate": -1, "steps": "many"}}, "recipe")
    assert "recipe.optimiser.learning_rate" in str(caught.value)
    assert "(got -1)" in str(caught.value)
    assert "(1 more.)" in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_settings_that_are_no_mapping_are_refused(data: object) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        Settings.parse(data)


@given(st.text(min_size=1).filter(lambda key: key not in Settings.model_fields))
def test_no_unknown_key_is_ever_accepted(key: str) -> None:
    with pytest.raises(ConfigError):
        Settings.parse({"name": "x", key: 1})


def test_nearest_suggests_one_or_lists_all() -> None:
    assert nearest("learnig_rate", ["learning_rate", "steps"]) == "Did you mean 'learning_rate'?"
    assert nearest("qqq", ["b", "a"]) == "Known: a, b."


def test_error_text_has_problem_hint_and_page() -> None:
    error = ConfigError("a.b is wrong.", "Write c.")
    assert str(error) == "a.b is wrong. Write c. [ConfigError: docs/errors/config.md]"
    assert (error.what, error.hint, error.exit_code) == ("a.b is wrong.", "Write c.", 2)
    assert isinstance(error, TrocarError)
