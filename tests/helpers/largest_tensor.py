"""What a computation holds, as far as it shows in the operations that it calls."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives, and the operations' names.

    What happens inside an operator of ours is not seen.
    """

    def __init__(self):
        super().__init__()
        self.elements, self.operations = 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.operations.add(str(function))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result
