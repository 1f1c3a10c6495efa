"""`python -m trocar` is the `trocar` command."""

import sys

from trocar.cli import main

sys.exit(main())
