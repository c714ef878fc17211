import pytest
import torch
from cases import BACKENDS, cpu_isas

from depthnet import kernels


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


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Run the test on one backend; the native CPU kernels once per instruction set."""
    name, _, isa = request.param.partition("-")
    if not isa:
        with kernels.use_backend(name):
            yield request.param
        return
    if isa not in cpu_isas():
        pytest.skip(f"this machine or build has only the instruction sets {cpu_isas()}")
    from depthnet import _C

    before = _C.selected_isa()
    _C.select_isa(isa)
    with kernels.use_backend(name):
        yield request.param
    _C.select_isa(before)
