"""The installed package: the tool, types, documents."""

from __future__ import annotations

import doctest
import importlib.metadata
import importlib.resources
import json
import subprocess
import sys
from typing import Any

import keyfold
import keyfold._attention
import keyfold._plan
import keyfold._state
import pytest


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keyfold", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_tool() -> None:
    assert tool("--version").stdout.strip() == f"keyfold {keyfold.__version__}"
    devices = json.loads(tool("devices", "--json").stdout)
    assert devices["devices"][0]["kernel"] == keyfold.devices()[0].kernel
    wrong = tool("devices", "--wrong")
    assert wrong.returncode == 2
    assert "--wrong" in wrong.stderr


def test_metadata() -> None:
    assert importlib.metadata.version("keyfold") == keyfold.__version__
    files = importlib.resources.files("keyfold")
    assert (files / "py.typed").is_file()
    assert "class State" in (files / "_keyfold.pyi").read_text()


@pytest.mark.parametrize("module", [keyfold._attention, keyfold._plan, keyfold._state])
def test_examples_in_docstrings(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_name_is_documented() -> None:
    for name in keyfold.__all__:
        if name != "__version__":
            assert getattr(keyfold, name).__doc__, name
