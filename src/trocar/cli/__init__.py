"""The `trocar` command. Floor 7. Nothing here imports torch before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (the console script exits with it).

    0: done, checks held; 1: done, checks failed; 2: bad input, said in one or two sentences; 130: interrupted. An unexpected exception is a
    bug in Trocar and is not caught.
    """
    from trocar.cli.app import app
    from trocar.core.errors import TrocarError

    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("TROCAR_DEBUG") == "1"
    try:
        app([word for word in arguments if word != "--debug"], prog_name="trocar", standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except TrocarError as error:
        if debug:
            raise
        _say(str(error))
        return error.exit_code
    return 0


def _say(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(Text("Error: ", style="bold red") + Text(message))
