import pytest
import torch
from backends import run_on
from cases import BACKENDS
from cuda_on_host import compile_library


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
