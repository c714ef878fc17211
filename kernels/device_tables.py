"""The tables of an optimizer step in a GPU's memory, uploaded again only where they have changed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthnet.kernels.step import StepTables


class DeviceTables:
    """`StepTables` as int64 words on their device.

    Attributes:
        tensors: (N, 14) and groups: (G, 9), rows as in csrc/math/step.h, doubles by their bits.
        scales: float64 (3, slices).
        chunks: (C, 4) rows (tensor, slice, begin, end): at most `chunk` elements of one slice of a
            tensor, `slice` counting over all tensors, begin and end from the tensor's start.
        arrived: int32 (N,) zeros, for a kernel that counts a tensor's chunks; it leaves zeros behind.
        partial_sums: float32 (C,), for the norm of the gradients.
        norm: float32 (1,), likewise.
    """

    def __init__(self, tables: StepTables, chunk: int):
        device = tables.scales.device
        rows = []
        for tensor, row in enumerate(tables.tensors):
            length = row["size"] // max(row["slices"], 1)
            begins = np.arange(0, length, chunk)
            starts = np.arange(row["slices"]) * length
            begin = (starts[:, None] + begins).ravel()
            end = (starts[:, None] + np.minimum(begins + chunk, length)).ravel()
            index = np.repeat(row["first_slice"] + np.arange(row["slices"]), len(begins))
            rows.append(np.stack([np.full_like(begin, tensor), index, begin, end], 1))
        chunks = np.concatenate(rows) if rows else np.zeros((0, 4), np.int64)
        self.scales = tables.scales
        self.chunks = torch.from_numpy(chunks).to(device)
        self.arrived = torch.zeros(len(tables.params), dtype=torch.int32, device=device)
        self.partial_sums = torch.zeros(len(chunks), dtype=torch.float32, device=device)
        self.norm = torch.zeros(1, dtype=torch.float32, device=device)
        self._uploads = {}
        self.refresh(tables)

    def refresh(self, tables: StepTables) -> None:
        """Bring the tables of tensors and groups up to date."""
        self.tensors = self._upload("tensors", tables.tensors)
        self.groups = self._upload("groups", tables.groups)

    def _upload(self, name: str, table: np.ndarray) -> Tensor:
        if name in self._uploads:
            host, _, device_copy = self._uploads[name]
            if np.array_equal(host, table):
                return device_copy
        host = table.copy()
        words = torch.from_numpy(host.view(np.int64).reshape(len(host), -1))
        if self.chunks.is_cuda:
            words = words.pin_memory()  # and kept: a captured graph copies from it at every replay
        if name in self._uploads:
            device_copy.copy_(words, non_blocking=True)
        else:
            device_copy = words.to(self.chunks.device, non_blocking=True, copy=True)
        self._uploads[name] = host, words, device_copy
        return device_copy


def device_tables(tables: StepTables, chunk: int) -> DeviceTables:
    """The device's copy, which lives as long as the tables do."""
    copy = tables.__dict__.get("_device_tables")
    if copy is None:
        copy = tables.__dict__["_device_tables"] = DeviceTables(tables, chunk)
    else:
        copy.refresh(tables)
    return copy
