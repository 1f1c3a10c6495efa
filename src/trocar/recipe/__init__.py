"""Floor 6: from a YAML recipe to a run folder that survives being killed. Names are imported on first use, so that reading a recipe needs
no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy

if TYPE_CHECKING:
    from trocar.recipe.engine import Forecast, RunResult, forecast, run
    from trocar.recipe.models import find_model, load_model, load_tokenizer
    from trocar.recipe.registry import METHODS, get_method
    from trocar.recipe.schema import Recipe, load_recipe, parse_recipe

_HOMES = {
    "engine": ("Forecast", "RunResult", "forecast", "run"),
    "models": ("find_model", "load_model", "load_tokenizer"),
    "registry": ("METHODS", "get_method"),
    "schema": ("Recipe", "load_recipe", "parse_recipe"),
}
__all__ = [
    "METHODS",
    "Forecast",
    "Recipe",
    "RunResult",
    "find_model",
    "forecast",
    "get_method",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "parse_recipe",
    "run",
]

__getattr__ = lazy(__name__, _HOMES)
