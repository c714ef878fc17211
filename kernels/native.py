"""The extension depthnet._C, if this installation has it."""

from __future__ import annotations

import os
from pathlib import Path

import torch  # before _C: its OpenMP threads are the ones that the kernels run on

import depthnet
from depthnet._checks import one_of

MISSING = None  # why there is no _C
try:
    from depthnet import _C
except ImportError as error:
    left_out = Path(depthnet.__path__[0]) / "_C_left_out.txt"  # written by setup.py
    _C, MISSING = None, left_out.read_text().strip() if left_out.exists() else str(error)
    FAST_DESCRIBE = False
else:
    wanted = os.environ.get("DEPTHNET_CPU_ISA") or _C.isas()[-1]
    _C.select_isa(one_of("DEPTHNET_CPU_ISA", wanted, _C.isas()))
    # Tensors' addresses without a call of Python for each; torch has it from 2.10 on.
    exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    FAST_DESCRIBE = exchange_api is not None and _C.use_exchange_api(exchange_api)
