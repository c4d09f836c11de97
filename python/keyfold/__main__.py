"""The command-line tool: ``python -m keyfold``, or ``keyfold``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Become the tool that the package carries."""
    tool = Path(__file__).parent / "bin" / "keyfold"
    os.execv(tool, ["keyfold", *sys.argv[1:]])


if __name__ == "__main__":
    main()
