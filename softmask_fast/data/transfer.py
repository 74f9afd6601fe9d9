"""Arrays of a batch on their way to the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_ALIGNMENT = 16  # bytes


class Transfer:
    """Copies arrays to a device. On a GPU it is one copy from pinned memory, on a stream of its own: neither the host
    nor the current stream waits for it until `tensors` is called."""

    def __init__(
        self, arrays: Mapping[str, np.ndarray], device: torch.device, stream: torch.cuda.Stream | None
    ) -> None:
        """Starts the copy on `stream`. On a CPU `stream` is None, and the tensors share the arrays' memory."""
        self._stream = stream
        if stream is None:
            self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            return
        places, end = {}, 0
        for name, array in arrays.items():
            places[name] = (end, end + array.nbytes)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        pinned = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        host = pinned.numpy()
        for name, (start, stop) in places.items():
            host[start:stop] = np.ascontiguousarray(arrays[name]).view(np.uint8).reshape(-1)
        with torch.cuda.stream(stream):
            self._buffer = pinned.to(device, non_blocking=True)
        self._tensors = {
            name: self._buffer[start:stop].view(torch.from_numpy(arrays[name]).dtype).view(arrays[name].shape)
            for name, (start, stop) in places.items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors, for use in work queued on the current stream from now on."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._buffer.device)
            current.wait_stream(self._stream)
            self._buffer.record_stream(current)
        return self._tensors
