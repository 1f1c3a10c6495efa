"""Floor 6: a run folder as pictures and HTML, from the folder alone. What a run folder holds is `trocar.result`."""

from trocar.report.page import write_report
from trocar.report.terminal import terminal_table, verdict_line

__all__ = ["terminal_table", "verdict_line", "write_report"]
