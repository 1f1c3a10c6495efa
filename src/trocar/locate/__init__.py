"""Floor 3: which components matter. Every locate routine returns `Scores`, or arrays per case with `Scores` of their means.

Names that need torch are imported when they are first used.
"""

from typing import TYPE_CHECKING

from trocar.core.lazy import lazy
from trocar.locate.scores import How, Matrix, Scores, iou, mean
from trocar.locate.screening import Screening, rank_correlation, screen

if TYPE_CHECKING:
    from trocar.locate.first_order import FirstOrder, first_order_effects
    from trocar.locate.implicit import Implicit, implicit_effects
    from trocar.locate.lens import Lens, logit_lens
    from trocar.locate.patching import Effects, best_window, component_effects, module_effects

__all__ = [
    "Effects",
    "FirstOrder",
    "How",
    "Implicit",
    "Lens",
    "Matrix",
    "Scores",
    "Screening",
    "best_window",
    "component_effects",
    "first_order_effects",
    "implicit_effects",
    "iou",
    "logit_lens",
    "mean",
    "module_effects",
    "rank_correlation",
    "screen",
]
_HOMES = {
    "first_order": ("FirstOrder", "first_order_effects"),
    "implicit": ("Implicit", "implicit_effects"),
    "lens": ("Lens", "logit_lens"),
    "patching": ("Effects", "best_window", "component_effects", "module_effects"),
}
__getattr__ = lazy(__name__, _HOMES)
