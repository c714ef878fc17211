import os
from importlib.util import find_spec

# Where cores are shared, a thread that waits for another must not spin on the core that the other needs:
# tests took 30 times as long.  Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from backends import run_on
from cases import BACKENDS
from cuda_on_host import compile_library
from interpreter import InterpreterRuns

from depthnet.kernels.triton import INTERPRETED


def reports_an_interpreter(item) -> bool:
    return "run_in_interpreter" in item.fixturenames


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=reports_an_interpreter)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_runs(request, tmp_path_factory):
    """Of the tests that are selected, from the first test on."""
    skipped = INTERPRETED or not find_spec("triton")
    tests = [] if skipped else filter(reports_an_interpreter, request.session.items)
    wanted = [(t.callspec.params["tests"], t.callspec.params["keyword"]) for t in tests]
    runs = InterpreterRuns(wanted, tmp_path_factory.mktemp("interpreter"))
    yield runs
    runs.stop()


@pytest.fixture(autouse=True)
def _interpreters_go_on(_interpreter_runs):
    _interpreter_runs.go_on()


@pytest.fixture
def run_in_interpreter(_interpreter_runs):
    """Run `tests`, named as pytest names them, of which `keyword` selects some, in Triton's interpreter.

    Both are parameters of a test that takes this, so that the run can start before the test does.
    """
    return _interpreter_runs.check


@pytest.fixture(autouse=True)
def _fill_uninitialised_memory():
    """torch.empty and its kin give NaN (integers: their greatest value): unwritten outputs show."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory):
    return compile_library(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on one backend; the native CPU kernels once per instruction set."""
    yield from run_on(request)


@pytest.fixture
def float64_is_torchs(request):
    """Skip a test of operators whose native kernels are for the other dtypes where it asks for float64."""
    if {"backend", "dtype"} <= set(request.fixturenames):
        on, dtype = (request.getfixturevalue(name) for name in ("backend", "dtype"))
        if on.startswith("cpu") and dtype == torch.float64:
            pytest.skip("the native kernels leave float64 to torch")
