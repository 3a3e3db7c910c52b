"""How to install a package that is missing, in a command that works as it is written."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "quark-rl"


def install_command(package: str) -> str:
    """The command that installs ``package`` in the versions that quark's own metadata ask for.

    >>> install_command("peft")
    "pip install 'peft>=0.21'"
    """
    try:
        wanted = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # a checkout that was never installed
        wanted = []
    for requirement in wanted:
        specifier = requirement.partition(";")[0].strip()
        if re.match(r"[\w.-]+", specifier)[0].replace("_", "-") == package:  # type: ignore[index]
            return f"pip install '{specifier}'"
    return f"pip install {package}"
