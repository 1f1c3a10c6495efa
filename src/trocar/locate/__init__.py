"""Floor 3: which components matter. Every locate routine returns `Scores`, or arrays per case with `Scores` of their means.

Names that need torch are imported when they are first used.
"""

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy
from trocar.locate.refine import Refined, refine, top_mask, top_masks
from trocar.locate.scores import How, Matrix, Scores, iou, mean
from trocar.locate.screening import Screening, rank_correlation, screen
from trocar.locate.shapley import CachedGame, Game, Shapley, shapley_values

if TYPE_CHECKING:
    from trocar.locate.first_order import FirstOrder, first_order_effects
    from trocar.locate.heads import HeadEffects, head_effects, head_estimates, last_heads, mean_heads
    from trocar.locate.implicit import Implicit, implicit_effects
    from trocar.locate.lens import Lens, logit_lens
    from trocar.locate.neurons import Attributions, NeuronLists, frequency, neuron_attributions
    from trocar.locate.patching import Effects, best_window, component_effects, module_effects

__all__ = [
    "Attributions",
    "CachedGame",
    "Effects",
    "FirstOrder",
    "Game",
    "HeadEffects",
    "How",
    "Implicit",
    "Lens",
    "Matrix",
    "NeuronLists",
    "Refined",
    "Scores",
    "Screening",
    "Shapley",
    "best_window",
    "component_effects",
    "first_order_effects",
    "frequency",
    "head_effects",
    "head_estimates",
    "implicit_effects",
    "iou",
    "last_heads",
    "logit_lens",
    "mean",
    "mean_heads",
    "module_effects",
    "neuron_attributions",
    "rank_correlation",
    "refine",
    "screen",
    "shapley_values",
    "top_mask",
    "top_masks",
]
_HOMES = {
    "first_order": ("FirstOrder", "first_order_effects"),
    "heads": ("HeadEffects", "head_effects", "head_estimates", "last_heads", "mean_heads"),
    "implicit": ("Implicit", "implicit_effects"),
    "lens": ("Lens", "logit_lens"),
    "neurons": ("Attributions", "NeuronLists", "frequency", "neuron_attributions"),
    "patching": ("Effects", "best_window", "component_effects", "module_effects"),
}
__getattr__ = lazy(__name__, _HOMES)
