"""Print a constraints file from the environment this runs in: every installed package pinned, for the Pythons its release supports.

Run through `make pins` after an upgrade has passed the tests. Local version labels (`+cpu`) are dropped, so that a pin fits any build.
"""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet

OLDEST = "3.10"
OWN = {"trocar", "pip", "setuptools", "wheel"}


def pins() -> list[str]:
    """One line per package, `name==version`, with a marker where the release does not support the oldest Python of the project."""
    lines = []
    for package in importlib.metadata.distributions():
        name, version = package.metadata["Name"], package.version.split("+")[0]
        if name.lower() in OWN:
            continue
        supports = SpecifierSet(package.metadata.get("Requires-Python") or "").contains(OLDEST + ".99")
        lines.append(f"{name}=={version}" + ("" if supports else f' ; python_version > "{OLDEST}"'))
    return sorted(set(lines), key=str.lower)


if __name__ == "__main__":
    print("# What is tested, pinned. Written by `make pins`; on Python 3.10 the newest releases that still support it are taken.")
    print("\n".join(pins()))
