"""keyfold.mpi: the ranks of MPI jobs, by each of Open MPI and MPICH that is here."""

from __future__ import annotations

import doctest
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keyfold
import pytest
from conftest import SEED

JOB = Path(__file__).parent / "mpi_job.py"
PAGE = Path(__file__).parents[2] / "docs" / "python.md"
LAUNCHERS = {
    "openmpi": ["mpirun.openmpi", "--oversubscribe", "--allow-run-as-root"],
    "mpich": ["mpirun.mpich"],
}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # MPI changes the process that uses it, so none of the tests is one.
    env = {**os.environ, **environment}
    return subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def mpi4py() -> None:
    pytest.importorskip("mpi4py")
    ran = run(sys.executable, "-c", "from mpi4py import MPI")
    if ran.returncode != 0:
        pytest.skip(f"mpi4py finds no MPI here: {ran.stdout[-200:]}")


@pytest.fixture(scope="module", params=LAUNCHERS)
def job(
    request: pytest.FixtureRequest, mpi4py: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, str]]:
    """Run a Python program on three ranks: the command, and what it needs in its environment."""
    launcher = LAUNCHERS[request.param]
    if shutil.which(launcher[0]) is None:
        pytest.skip(f"no {launcher[0]} here")
    environment = {"MPI4PY_MPIABI": request.param}
    if request.param == "mpich":  # Debian's library has not the name that MPICH's ABI has
        library = next(Path("/usr/lib").glob("*/libmpich.so.12"), None)
        if library is not None:
            folder = tmp_path_factory.mktemp("mpich")
            (folder / "libmpi.so.12").symlink_to(library)
            environment["LD_LIBRARY_PATH"] = str(folder)
    command = [*launcher, "-n", "3", sys.executable]
    check = "from mpi4py.MPI import COMM_WORLD; assert COMM_WORLD.size == 3"
    ran = run(*command, "-c", check, **environment)
    if ran.returncode != 0:
        pytest.skip(f"mpi4py does not work with {launcher[0]}: {ran.stdout[-200:]}")
    return command, environment


@pytest.mark.parametrize("scenario", ["results", "tensors", "wrong"])
def test_three_ranks(scenario: str, job: tuple[list[str], dict[str, str]]) -> None:
    if scenario == "tensors":
        pytest.importorskip("torch")
    command, environment = job
    ran = run(*command, str(JOB), scenario, str(SEED), **environment)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("as it should") == 3, ran.stdout


@pytest.mark.parametrize("scenario", ["hang-reduce", "hang-ordered", "interrupt", "join"])
def test_rank_that_goes_on_no_more(scenario: str, job: tuple[list[str], dict[str, str]]) -> None:
    command, environment = job
    ran = run(*command, str(JOB), scenario, str(SEED), **environment)
    for rank in (0, 2):
        assert f"rank {rank}: as it should" in ran.stdout, ran.stdout


def test_one_rank(job: tuple[list[str], dict[str, str]]) -> None:
    ran = run(sys.executable, str(JOB), "alone", str(SEED), **job[1])
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout == "rank 0: as it should\n"


def test_example(mpi4py: None) -> None:
    code = "import doctest, keyfold.mpi; print(doctest.testmod(keyfold.mpi))"
    ran = run(sys.executable, "-c", code)
    assert ran.stdout == f"{doctest.TestResults(0, 8)}\n"


def test_document(job: tuple[list[str], dict[str, str]]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    command, environment = job
    first, ours = blocks[0], next(block for block in blocks if "mpi4py" in block)
    ran = run(*command, "-c", first + ours, **environment)
    assert ran.returncode == 0, ran.stdout


def test_import_without_mpi4py() -> None:
    ran = run(sys.executable, "-c", "import sys; sys.modules['mpi4py'] = None; import keyfold.mpi")
    assert "ImportError: keyfold.mpi needs mpi4py" in ran.stdout
    assert "keyfold.mpi" not in sys.modules


def test_shard_keys() -> None:
    assert keyfold.shard_keys(1000, 2, 0, 64) == [(0, 512)]
    assert keyfold.shard_keys(1000, 2, 1, 64) == [(512, 1000)]
    assert keyfold.shard_keys(300, 2, 1, 64, stripe_len=64) == [(64, 128), (192, 256)]
    assert keyfold.shard_keys(0, 2, 1, 64) == []
    with pytest.raises(keyfold.InvalidArgument, match="^rank: expected 0 to 1, got 2"):
        keyfold.shard_keys(1000, 2, 2, 64)
    with pytest.raises(TypeError, match="^kv_len: "):
        keyfold.shard_keys(1000.0, 2, 1, 64)  # type: ignore[arg-type]


def test_shard_rows() -> None:
    assert keyfold.shard_rows(20, 2, 0, 4) == [(0, 4), (12, 16), (16, 20)]
    assert keyfold.shard_rows(20, 2, 1, 4) == [(4, 8), (8, 12)]
    with pytest.raises(keyfold.InvalidArgument, match="^row_stripe_len: "):
        keyfold.shard_rows(20, 2, 1, 0)


def test_peer_error() -> None:
    error = pickle.loads(pickle.dumps(keyfold.PeerError("rank 1 failed: no", [1])))
    assert (str(error), error.ranks) == ("rank 1 failed: no", [1])
    assert isinstance(error, RuntimeError)
