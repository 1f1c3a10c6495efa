"""Every error that Trocar raises on purpose. Floor 0.

One sentence says what was wrong and where, a second what to do. Each class has a page `docs/errors/<slug>.md`; the message names it.
The command line prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class TrocarError(Exception):
    """Base of all deliberate errors. `what` names the problem and the place, `hint` says what to do about it."""

    exit_code: int = 2

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = what.rstrip(), hint.rstrip()
        super().__init__(" ".join(part for part in (self.what, self.hint) if part))

    @classmethod
    def slug(cls) -> str:
        """File name of the error's page, `PatchBaseError` -> `patch-base`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__.removesuffix("Error")).lower()

    def __str__(self) -> str:
        return f"{super().__str__()} [{type(self).__name__}: docs/errors/{self.slug()}.md]"


class UnknownFamilyError(TrocarError):
    """The model's architecture is not in the family table."""


class UnsupportedModelError(TrocarError):
    """The family is known, but this model (wrapper, quantised, tied, experts) cannot be operated on as asked."""


class ComponentError(TrocarError):
    """A component's or point's name cannot be parsed, or this model has no such component."""


class InterventionError(TrocarError):
    """An intervention has the wrong shape, contradicts another, or never fired."""


class PatchFormatError(TrocarError):
    """A patch file is damaged, foreign, malicious or of an unknown version."""


class PatchBaseError(TrocarError):
    """The patch belongs to another base than the model or checkpoint at hand."""


class PatchStateError(TrocarError):
    """Apply and revert were called out of order, or the model changed in between."""


class PatchOverlapError(TrocarError):
    """Two patches write the same place and nobody said which of them wins."""


class ExportError(TrocarError):
    """The patch cannot be expressed in the requested format."""


class ScoresError(TrocarError):
    """Scores of different kinds or models were combined, or a scores file is not valid."""


class MetricError(TrocarError):
    """A measurement was asked for that the data do not allow."""


class DataError(TrocarError):
    """Input data are missing, of the wrong shape, or contradict each other."""


class ConfigError(TrocarError):
    """A recipe or a method's settings are not valid."""


class RunError(TrocarError):
    """A run folder is in use, belongs to another recipe, or is not a run folder."""


class EditError(TrocarError):
    """An edit cannot be made as asked (nothing open, diverged, collapsed masks)."""


class MissingExtraError(TrocarError):
    """An optional dependency is needed for this and is not installed."""


class ChecksFailedError(TrocarError):
    """The run finished, but its checks did not hold."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known name, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
