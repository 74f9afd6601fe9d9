"""Arrays on their way to the device arrive as they are, also those that share one copy."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from softmask_fast.data.transfer import Transfer

ARRAYS = {
    "ids": np.arange(15).reshape(3, 5),
    "mask": np.arange(15).reshape(3, 5) % 2 == 0,  # 15 bytes: what follows has to be aligned
    "none": np.empty(0, np.int64),
    "cut": np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2],
    "last": np.array([7]),
}


def check(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert tensors[name].dtype == torch.from_numpy(array).dtype and tensors[name].shape == array.shape
        assert (tensors[name].cpu().numpy() == array).all()


def test_arrays_arrive_as_they_are(device):
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    tensors = Transfer(ARRAYS, device, stream).tensors()
    assert all(tensor.device.type == device.type for tensor in tensors.values())
    check(tensors)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tested with a real stream")
def test_the_one_copy_of_a_gpu_holds_them_all(monkeypatch):
    """Without a GPU: its memory is that of the host, its stream none."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    check(Transfer(ARRAYS, torch.device("cpu"), object())._tensors)
