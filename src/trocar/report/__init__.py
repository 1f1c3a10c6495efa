"""Floor 6: a run folder as pictures and HTML, from the folder alone. What a run folder holds is `trocar.result`."""

from trocar.report.page import render
from trocar.report.terminal import terminal_table, verdict_line

__all__ = ["render", "terminal_table", "verdict_line"]
