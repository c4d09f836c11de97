"""docs/tour.py, run as a user would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tour.py"
SMALL = ["--mib", "640", "--contexts", "4K", "--depths", "50"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's RLIMIT_AS")


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run in `folder`, with its temporary files in `folder`/tmp."""
    (folder / "tmp").mkdir()
    # On machines of many cores, thread stacks alone would make the limit larger than the files.
    few = {"KEYFOLD_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    search = [str(Path(p).absolute()) for p in os.getenv("PYTHONPATH", "").split(os.pathsep) if p]
    env = {**os.environ, **few, "TMPDIR": str(folder / "tmp")}
    env["PYTHONPATH"] = os.pathsep.join(search)
    ran = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert not list((folder / "tmp").glob("keyfold-tour-*")), "files are left behind"
    return ran


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tour")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """What the page prints, in its default size."""
    pytest.importorskip("matplotlib")
    ran = run([str(PAGE), "--figures", "figures"], folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in\n{text}"
    return float(match[1])


def test_one_call(page: str) -> None:
    assert number(r"\n   (\d+) dispatches, the longest", page) >= 1
    assert number(r"the longest ([\d.]+) ms", page) > 0
    assert page.count("same bits with {") == 3
    assert number(r"stopped, (\d+)% done", page) in range(50, 100)


def test_streams_more_than_the_limit(page: str) -> None:
    files = number(r"Files: \d+ keys, (\d+) MiB", page)
    limit = number(r"limit: (\d+) MiB", page)
    assert files == 1024
    assert limit < 0.75 * files
    assert "reading the keys whole: MemoryError" in page
    assert "mapping them whole: [Errno 12]" in page
    assert 0 < number(r"peak memory (\d+) MiB", page) <= limit
    assert "same bits from windows of random sizes" in page
    assert "the needle says: Exact attention, however long the keys.\n" in page
    assert number(r"error of the other heads: (\S+),", page) < 1e-5


def test_merges_shards(page: str) -> None:
    assert "merged in all 24 orders" in page
    assert 0 < number(r"largest difference: (\S+),", page) < 1e-5
    assert "the stream of section 2 has the bits of one call" in page


def test_draws_the_needles(page: str, folder: Path) -> None:
    assert "4. 9 of 9 needles found" in page
    image = (folder / "figures" / "needle_matplotlib.svg").read_text()
    assert len(image) < 100_000
    assert str(folder) not in image
    texts = [t.text for t in ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text")]
    assert {"8K", "16K", "32K", "10", "50", "90"} <= set(texts)
    assert sum(bool(re.fullmatch(r"\d+ ms", text or "")) for text in texts) == 9


def test_names_what_the_plot_needs(tmp_path: Path) -> None:
    hide = "import runpy, sys; sys.modules['matplotlib'] = None; sys.argv = sys.argv[1:]"
    start = f"{hide}; runpy.run_path(sys.argv[0], run_name='__main__')"
    ran = run(["-c", start, str(PAGE), *SMALL], tmp_path)
    assert ran.returncode == 1
    assert "1 of 1 needles found" in ran.stdout
    assert ran.stderr == "The plot needs matplotlib: python -m pip install matplotlib\n"
