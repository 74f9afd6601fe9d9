"""Bytes and operations of a pretraining step on a GPU, and the time that they predict. All is counted, none measured.

    python benchmarks/traffic.py --preset base --pairs 128 --copy 4.21e12 --matmul 720e12

Every operator is counted on tensors without data. A matrix product takes the time of its operations at the matrix rate
or that of its bytes at the copy rate, whichever is longer. Every other operator takes the time of its bytes: inputs
read, results written. "fused" assumes that all elementwise operators, norms and reductions between two products run as
one kernel, which compiled layers come near to: a tensor that a product makes is read once in each pass, and written
only if a product or the other pass reads it. The prediction leaves out launches, gaps, and kernels that are slower than
the rates.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from bench_step import SETTINGS
from memory import fake_problem
from report import table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.training.meters import other_formulas

# Operators that stay kernels of their own: kind -> parts of their names
KERNELS = {
    "matrix products": (".mm.", ".addmm.", ".bmm.", ".convolution"),
    "self-attention": ("scaled_dot_product",),
    "our operators": ("softmask_fast",),
    "copies of weights": ("_foreach",),
    "gathers, joins, sorts": ("index", "embedding", "sort", "gather", "scatter", "cumsum", ".cat.", ".stack."),
}
NO_KERNEL = ("prim.", ".empty", ".new_empty", ".detach", ".alias", "_unsafe_view")
FUSABLE = "elementwise, norms, reductions"


@dataclass
class Use:
    """One tensor's memory, which passes read it, and by which kind of operator."""

    bytes: int
    made_by: str | None = None  # None: it existed before the step
    made_in: str = "forward"
    read_by_kernels: bool = False
    fused_reads: set[str] = field(default_factory=set)  # passes
    passes: set[str] = field(default_factory=set)


class Traffic(TorchDispatchMode):
    """Counts within a FakeTensorMode. `phase` is the pass that runs."""

    def __init__(self, copy: float, matmul: float):
        super().__init__()
        self.copy, self.matmul, self.phase = copy, matmul, "forward"
        self.formulas = flop_registry | other_formulas()
        self.launches, self.bytes, self.operations, self.seconds = (defaultdict(float) for _ in range(4))
        self.uses: dict[int, Use] = {}
        self.alive: list[Any] = []  # kept, so that no other storage gets the same id

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = str(function)
        if function.is_view or not (inputs or outputs) or any(part in name for part in NO_KERNEL):
            return result
        kind = next((kind for kind, parts in KERNELS.items() if any(part in name for part in parts)), FUSABLE)
        operations = 0
        if formula := self.formulas.get(function._overloadpacket):
            operations = formula(*args, **kwargs or {}, out_val=result)
        size = sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        self.launches[kind] += 1
        self.bytes[kind] += size
        self.operations[kind] += operations
        self.seconds[kind] += max(operations / self.matmul, size / self.copy)
        for tensor in inputs:
            use = self._use(tensor)
            use.passes.add(self.phase)
            if kind == FUSABLE:
                use.fused_reads.add(self.phase)
            else:
                use.read_by_kernels = True
        for tensor in outputs:
            use = self._use(tensor)
            if use.made_by is None and not any(tensor is x for x in inputs):
                use.made_by, use.made_in = kind, self.phase
        return result

    def _use(self, tensor: Tensor) -> Use:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.uses:
            self.alive.append(storage)
            self.uses[storage._cdata] = Use(storage.nbytes())
        return self.uses[storage._cdata]

    def fused_bytes(self) -> float:
        """Bytes of the fusable operators, if each chain of them is one kernel."""
        total = 0
        for use in self.uses.values():
            fused = use.made_by == FUSABLE
            total += use.bytes * len(use.fused_reads - ({use.made_in} if fused else set()))
            total += use.bytes * (fused and (use.read_by_kernels or use.passes != {use.made_in}))
        return total


def count(preset: str, pairs: int, copy: float, matmul: float) -> Traffic:
    """The forward and backward pass of a step in bf16."""
    config, model, teacher, batch, context = fake_problem(preset, pairs)
    with context, Traffic(copy, matmul) as traffic:
        loss, _ = PretrainingStep(model, config.objectives, bf16=True)(batch, teacher, SETTINGS)
        traffic.phase = "backward"
        loss.backward()
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description="Counted traffic of a step and the time that it predicts.")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--copy", type=float, required=True, help="bytes per second, read and written")
    parser.add_argument("--matmul", type=float, required=True, help="operations per second")
    options = parser.parse_args()
    traffic = count(options.preset, options.pairs, options.copy, options.matmul)
    rows = [
        [kind, f"{traffic.launches[kind]:,.0f}", f"{traffic.operations[kind] / 1e12:.2f}",
         f"{traffic.bytes[kind] / 1e9:.1f}", f"{1e3 * traffic.seconds[kind]:.1f}"]
        for kind in (*KERNELS, FUSABLE)
    ]  # fmt: skip
    fused = traffic.fused_bytes()
    rows.append(["the last line, fused", "", "", f"{fused / 1e9:.1f}", f"{1e3 * fused / options.copy:.1f}"])
    print(table(["", "operators", "TFLOP", "GB", "predicted ms"], rows))
    whole = sum(traffic.seconds.values())
    compiled = whole - traffic.seconds[FUSABLE] + fused / options.copy
    print(f"\neager {1e3 * whole:.1f} ms, compiled {1e3 * compiled:.1f} ms")


if __name__ == "__main__":
    main()
