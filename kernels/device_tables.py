"""The tables of an optimizer step in a GPU's memory, uploaded again only where they have changed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthnet.kernels.step import StepTables


def capturing() -> bool:
    """Whether the current stream's work is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class DeviceTables:
    """`StepTables` as int64 words on their device.

    Attributes:
        tensors: (N, 14) and groups: (G, 9), rows as in csrc/math/step.h, doubles by their bits.
        scales: float64 (3, slices).
        chunks: (C, 4), see `chunk_table`.
        arrived: int32 (N,) zeros, for a kernel that counts a tensor's chunks; it leaves zeros behind.
        partial_sums: float64 (C,), for the norm of the gradients.
        norm: float64 (1,), likewise.
    """

    def __init__(self, tables: StepTables, chunk: int):
        device = tables.scales.device
        chunks = chunk_table(tables.tensors, chunk)
        self.scales = tables.scales
        self.chunks = torch.from_numpy(chunks).to(device)
        self.arrived = torch.zeros(len(tables.params), dtype=torch.int32, device=device)
        self.partial_sums = torch.zeros(len(chunks), dtype=torch.float64, device=device)
        self.norm = torch.zeros(1, dtype=torch.float64, device=device)
        self._uploads = {}
        self.refresh(tables)

    def refresh(self, tables: StepTables) -> None:
        """Bring the tables of tensors and groups up to date."""
        self.tensors = self._upload("tensors", tables.tensors)
        self.groups = self._upload("groups", tables.groups)

    def _upload(self, name: str, table: np.ndarray) -> Tensor:
        upload = self._uploads.get(name)
        if upload is None:
            upload = self._uploads[name] = _Upload(table, self.chunks.device)
        upload.refresh(table)
        return upload.words


def chunk_table(tensors: np.ndarray, chunk: int) -> np.ndarray:
    """int64 rows (tensor, slice, begin, end): at most `chunk` elements of one slice of a tensor, `slice`
    counting over all tensors, begin and end from the tensor's start."""
    tensor = np.repeat(np.arange(len(tensors)), tensors["slices"])  # of each slice
    number = np.arange(len(tensor))
    length = tensors["size"][tensor] // tensors["slices"][tensor]
    start = (number - tensors["first_slice"][tensor]) * length
    count = -(-length // chunk)
    slice_of = np.repeat(number, count)
    before = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    begin = start[slice_of] + before * chunk
    end = np.minimum(begin + chunk, (start + length)[slice_of])
    return np.stack([tensor[slice_of], slice_of, begin, end], 1)


class _Upload:
    """One table in the device's memory, as int64 words, a row each."""

    def __init__(self, table: np.ndarray, device: torch.device):
        shape = len(table), table.dtype.itemsize // 8
        self.words = torch.empty(shape, dtype=torch.int64, device=device)
        self.table = None  # what the device has
        self.captured: list[Tensor] = []  # what graphs copy from
        self.spare = self._pinned()

    def _pinned(self) -> Tensor:
        return torch.empty_like(self.words, device="cpu", pin_memory=self.words.is_cuda)

    def refresh(self, table: np.ndarray) -> None:
        words = torch.from_numpy(table.view(np.int64).reshape(self.words.shape))
        if capturing():
            # Whatever the device has now, eager steps and other graphs write here between two replays.
            self.words.copy_(self._captured_source(words), non_blocking=True)
            return
        # Once there is a graph, its replays write here too, unseen.
        if self.table is not None and not self.captured and np.array_equal(self.table, table):
            return
        self.table = table.copy()
        source = self.spare if self.spare is not None else self._pinned()
        source.copy_(words)
        self.words.copy_(source, non_blocking=True)
        self.spare = self._pinned()

    def _captured_source(self, words: Tensor) -> Tensor:
        """A pinned copy of the words that is never written again: a graph reads it at every replay."""
        for source in self.captured:
            if torch.equal(source, words):
                return source
        # Not every torch can pin memory during a capture, so that one buffer is always ready.
        source = self.spare if self.spare is not None else self._pinned()
        source.copy_(words)
        self.captured.append(source)
        self.spare = None
        return source


def device_tables(tables: StepTables, chunk: int) -> DeviceTables:
    """The device's copy, which lives as long as the tables do."""
    copies = tables.__dict__.setdefault("_device_tables", {})
    if chunk in copies:
        copies[chunk].refresh(tables)
    else:
        copies[chunk] = DeviceTables(tables, chunk)
    return copies[chunk]
