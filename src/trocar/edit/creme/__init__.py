"""CREME: repair two-hop questions by editing attention output projections in closed form (arXiv:2402.14328). Floor 5."""

from trocar.edit.creme.case import Case, Query, answered, look_at
from trocar.edit.creme.config import LEAD_INS, CremeConfig
from trocar.edit.creme.edit import CremeResult, creme_edit
from trocar.edit.creme.moments import Moments, second_moment
from trocar.edit.creme.solve import Update, least_change

__all__ = [
    "LEAD_INS",
    "Case",
    "CremeConfig",
    "CremeResult",
    "Moments",
    "Query",
    "Update",
    "answered",
    "creme_edit",
    "least_change",
    "look_at",
    "second_moment",
]
