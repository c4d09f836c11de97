"""The Python code in the documents runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_code_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    # One needs a model's name; what needs a GPU or MPI is run by test_cuda.py and test_mpi.py.
    elsewhere = ("from_pretrained", 'device="cuda"', "mpi4py")
    runnable = [block for block in blocks if not any(text in block for text in elsewhere)]
    assert runnable
    monkeypatch.chdir(tmp_path)  # some write files
    code = compile("\n".join(runnable), page, "exec")
    exec(code, {"__name__": "page"})
