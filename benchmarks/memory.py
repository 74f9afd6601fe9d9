"""Peak memory of pretraining by batch size, activation checkpointing, ZeRO stage and offload, as a Markdown page.

    python benchmarks/memory.py --preset base --ranks 8 > docs/memory.md

No GPU is needed or used: every number is counted, none is measured.
"""

from __future__ import annotations

import argparse
import weakref
from contextlib import ExitStack
from unittest import mock

import torch
from bench_step import SETTINGS, make_batch
from report import table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softmask_fast.config import PRESETS
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config

CPU = torch.device("cpu")
EXPLANATION = """\
# Peak memory

GiB per GPU of the `{preset}` preset ({parameters:.0f} M parameters) with {ranks} ranks, bf16 by autocast.
**Counted, not measured**: made by `python benchmarks/memory.py --preset {preset} --ranks {ranks}`.

- Activations: the forward and backward pass runs on tensors without data, and every storage counts from its allocation
  to its release. Autocast's list for the CPU says which operators run in bf16; it is close to the GPU's.
- ZeRO 3 casts weights at each use and keeps residual streams in float32: its activations are up to a quarter larger.
- Weights, gradients and AdamW's moments: by formula, 4, 4 and 8 bytes a parameter, and 4 for the copy of the weights
  that ZeRO's optimizer holds from stage 1 on. ZeRO 1 divides moments and copy among the ranks, ZeRO 2 also the
  gradients, ZeRO 3 also the weights. Offload moves moments and copy to the host.
- Teacher and queues: whole on every rank, at every stage.
- Not counted: the CUDA context, the allocator's gaps, workspaces, buffers of collectives, ZeRO-3's gathered block.
"""


class LiveBytes(TorchDispatchMode):
    """Bytes of the live storages that operators made, apart from parameters' gradients; and their peak."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._set_aside)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _set_aside(self, parameter: torch.Tensor) -> None:
        self.now -= parameter.grad.untyped_storage().nbytes()


def fake_problem(preset: str, pairs: int):
    """Configuration, model, teacher and batch of a step, all without data, and the context in which it runs."""
    config = make_config(preset, vision_weights="random", text_weights="random", batch_size=pairs)
    batch = make_batch(config.model, pairs, CPU)
    with torch.device("meta"):
        model = VisionLanguageModel(config.model)
        teacher = MomentumTeacher(model, config.objectives)
    context = ExitStack()
    # Operators then skip the checks that read values on the CPU, as for tensors on a GPU.
    context.enter_context(mock.patch("torch.compiler.is_compiling", return_value=True))
    context.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    for network in (model, teacher):
        network._apply(lambda tensor: torch.empty_like(tensor, device=CPU))
    for network in (model, teacher.model):  # `_apply` unties tied weights
        network.language_head.decoder.weight = network.text.word_embeddings.weight
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            setattr(batch, name, torch.empty_like(value, device=CPU))
    return config, model, teacher, batch, context


def activations(preset: str, pairs: int, checkpointing: bool) -> int:
    """Peak bytes of one step, without weights, gradients, optimizer, momentum copy and queues."""
    config, model, teacher, batch, context = fake_problem(preset, pairs)
    with context:
        model.set_execution(checkpointing=checkpointing)
        with LiveBytes(model) as live:
            loss, _ = PretrainingStep(model, config.objectives, bf16=True)(batch, teacher, SETTINGS)
            loss.backward()
    return live.peak


def standing(preset: str, stage: int, offload: bool, ranks: int) -> int:
    """Bytes of weights, gradients, optimizer, momentum copy and queues on one rank."""
    config = make_config(preset)
    with torch.device("meta"):
        model = VisionLanguageModel(config.model)
        teacher = MomentumTeacher(model, config.objectives)
    count = sum(parameter.numel() for parameter in model.parameters())
    weights = 4 * count / (ranks if stage >= 3 else 1)
    gradients = 4 * count / (ranks if stage >= 2 else 1)
    optimiser = 8 * count if stage == 0 else (0 if offload else 12 * count / ranks)
    momentum = sum(tensor.numel() * tensor.element_size() for tensor in (*teacher.parameters(), *teacher.buffers()))
    return int(weights + gradients + optimiser + momentum)


def main() -> None:
    parser = argparse.ArgumentParser(description="Counted peak memory as a Markdown page.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    options = parser.parse_args()
    with torch.device("meta"):
        model = VisionLanguageModel(make_config(options.preset).model)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(EXPLANATION.format(preset=options.preset, ranks=options.ranks, parameters=parameters))
    states = {f"ZeRO {stage}": (stage, False) for stage in range(4)}
    states |= {f"ZeRO {stage}, offload": (stage, True) for stage in range(1, 4)}
    rows = []
    for pairs in options.batch_sizes:
        for checkpointing in (False, True):
            held = activations(options.preset, pairs, checkpointing)
            sizes = [held] + [held + standing(options.preset, *state, options.ranks) for state in states.values()]
            rows.append([str(pairs), "on" if checkpointing else "off", *(f"{size / 2**30:.1f}" for size in sizes)])
    print(table(["pairs per GPU", "checkpointing", "activations", *states], rows))


if __name__ == "__main__":
    main()
