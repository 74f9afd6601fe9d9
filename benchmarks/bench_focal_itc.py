"""focal_itc_loss, forward and backward, against other implementations of the plain contrastive loss.

"focal_itc" is what all of them can compute: a batch against itself (CLIP), hard targets, gamma 0, gradients to both
modalities. "focal_itc_queue" is the loss of the paper, with queue, momentum teacher and gamma 2; the others lack these.
"focal_itc_sigmoid" is "focal_itc" with loss="sigmoid": SigLIP.

| variant | what it is |
| --- | --- |
| reference | eager PyTorch: `impl="reference"`; the usual way |
| compiled | `torch.compile` of it |
| open_clip | ClipLoss of open_clip, SigLipLoss for the sigmoid |
| inf_cl | the Triton kernels of Inf-CL, both directions (a GPU only) |
| liger | fused linear cross-entropy of Liger, both directions (a GPU only); its forward computes the gradients too |
| torch_fused | `F.linear_cross_entropy` of PyTorch, both directions (not in every torch) |
| the others | ours, by the name of the implementation |

| counted, for each of the two directions | operations |
| --- | --- |
| forward | 2 B M d, and as many for a teacher |
| backward | 2 B M d for each gradient: to the rows, and to the keys where they have one |
| what streams (ours, inf_cl) | the products of the forward once more in the backward (inf_cl, in two passes: twice) |
| "focal_itc", cpp, a batch of one tile | it streams nothing: no product twice |
| "focal_itc", cpp, and triton on 2-byte elements | one direction only, as the other one uses the same products |
| "focal_itc_sigmoid", open_clip and all of ours | likewise |

A batch that would not fit, or would take too long judging by the next smaller one, is listed with the reason.

    pytest benchmarks/bench_focal_itc.py --benchmark-only
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import measure
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, DTYPE, ON_GPU, Variant, check_close, free_memory

from softmask_fast.ops import focal_itc_loss, registry
from softmask_fast.ops.focal_itc import operators, state

# (d, batches); a GPU goes on as far as time and memory reach
BATCHES = {256: [256, 1024, 4096, 16384, 65536, 262144, 1048576], 512: [4096, 65536], 768: [4096, 65536]}
if not ON_GPU:
    BATCHES = {256: [256, 512, 1024, 2048, 4096, 1048576], 512: [1024], 768: [1024]}
QUEUE = {"B": 4096 if ON_GPU else 512, "d": 256, "alpha": 0.4, "gamma": 2.0}
QUEUE_LENGTH = 65536
SIGMOID = [4096, 16384, 65536] if ON_GPU else [512, 4096]  # batches, d 256
LONGEST = 12.0 if ON_GPU else 6.0  # seconds that one call may take
EAGER_MATRICES = 30  # of B x M float32, about, that the reference and its gradients hold at their peak


class Problem:
    def __init__(
        self, batch: int, width: int, queue: int = 0, alpha: float = 0.0, gamma: float = 0.0, sigmoid: bool = False
    ):
        generator = torch.Generator().manual_seed(0)

        def draw(rows):
            return F.normalize(torch.randn(rows, width, generator=generator), dim=1).to(DEVICE, DTYPE)

        self.batch, self.keys, self.width, self.alpha, self.gamma = batch, batch + queue, width, alpha, gamma
        self.image, self.text = draw(batch), draw(batch)
        self.temperature = torch.tensor(0.07, device=DEVICE, requires_grad=True)
        self.options = {"temperature": self.temperature, "gamma": gamma, "alpha": alpha}
        if queue:
            teachers = draw(batch), draw(batch)
            keys = [torch.cat((teacher, draw(queue))) for teacher in teachers]
            self.options |= dict(zip(("image_keys", "text_keys"), keys, strict=True))
            self.options |= dict(zip(("teacher_image", "teacher_text"), teachers, strict=True))
        self.inputs = self.image.requires_grad_(), self.text.requires_grad_(), self.temperature
        self.bias = None
        if sigmoid:
            self.bias = torch.tensor(-10.0, device=DEVICE, requires_grad=True)
            self.options |= {"loss": "sigmoid", "bias": self.bias}
            self.inputs += (self.bias,)

    def problem(self, impl: str) -> state.Problem:
        """The operator's arguments, as far as they decide what is computed once for both directions."""
        keys = (self.options.get(name) for name in ("image_keys", "text_keys"))
        return state.Problem(
            self.image, self.text, *keys, self.temperature, self.bias, *[None] * 6, self.gamma, False, 0, 0, self.keys,
            impl,
        )  # fmt: skip

    def loss(self, impl: str) -> torch.Tensor:
        return focal_itc_loss(self.image, self.text, impl=impl, **self.options)

    def operations(self, recomputed: int = 0, directions: int = 2) -> dict[str, float]:
        products = 2 if self.alpha > 0 else 1
        gradients = 1 if "image_keys" in self.options else 2
        unit = directions * 2.0 * self.batch * self.keys * self.width
        return {"forward": products * unit, "both": (products * (1 + recomputed) + gradients) * unit}

    def variant(self, loss: Callable, recomputed: int = 0, directions: int = 2, **options) -> Variant:
        def inference():
            with torch.no_grad():
                return loss()

        def both():
            value = loss()
            # not the gradients of scalars: not all variants have them, and they are sums that cancel; tests check them
            return value.detach().float(), *torch.autograd.grad(value, self.inputs)[:2]

        return Variant(inference, both, work=self.operations(recomputed, directions), **options)

    def ours(self) -> dict[str, Variant]:
        found = {}
        for name in registry.runnable("focal_itc", DEVICE, DTYPE, self.width):
            if name != "reference":
                run = registry.resolve("focal_itc", name, DEVICE, DTYPE, self.width)
                directions = 1 if operators.together(run, self.problem(name)) else 2
                recomputed = 1 if operators.whole(self.problem(name)) is None else 0
                found[name] = self.variant(lambda name=name: self.loss(name), recomputed, directions, ours=True)
        return found

    def eager(self) -> dict[str, Variant]:
        found = {
            "reference": self.variant(lambda: self.loss("reference")),
            "compiled": self.variant(torch.compile(lambda: self.loss("reference"), dynamic=False)),
        }
        needed = EAGER_MATRICES * 4 * self.batch * self.keys
        if needed > free_memory():
            reason = f"full matrices need about {needed / 2**30:,.0f} GiB"
            found = {name: Variant(missing={"all": reason}) for name in found}
        return found

    def other_libraries(self) -> dict[str, Variant]:
        """The losses of other libraries. Each computes both directions."""
        labels = torch.arange(self.batch, device=DEVICE)

        def scaled(rows):
            return rows * (1 / self.temperature).to(DTYPE)

        def both_directions(loss):
            return lambda: (loss(scaled(self.image), self.text) + loss(scaled(self.text), self.image)) / 2

        def open_clip(module):
            loss = module.ClipLoss()
            return lambda: loss(self.image, self.text, (1 / self.temperature).to(DTYPE))

        def siglip(module):
            loss = module.SigLipLoss()
            return lambda: loss(self.image, self.text, (1 / self.temperature).to(DTYPE), self.bias.to(DTYPE))

        def inf_cl(module):
            head = min(self.width, 256)
            return both_directions(lambda rows, keys: module.cal_flash_loss(rows, keys, labels, None, head).mean())

        def liger(module):
            loss = module.LigerFusedLinearCrossEntropyLoss()
            return both_directions(lambda rows, keys: loss(keys, rows, labels))

        def torch_fused(module):
            return both_directions(lambda rows, keys: module.linear_cross_entropy(rows, keys, labels))

        libraries = [
            ("open_clip", "open_clip", "ClipLoss", open_clip, False, 0),
            ("inf_cl", "inf_cl", "cal_flash_loss", inf_cl, True, 2),
            ("liger", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss", liger, True, 0),
            ("torch_fused", "torch.nn.functional", "linear_cross_entropy", torch_fused, False, 0),
        ]
        if self.bias is not None:
            libraries = [("open_clip", "open_clip.loss", "SigLipLoss", siglip, False, 0)]
        found = {}
        for name, module, function, build, gpu_only, recomputed in libraries:
            reason = "its kernels need a GPU" if gpu_only and not ON_GPU else None
            try:
                loaded = None if reason else importlib.import_module(module)
            except ImportError as error:
                reason = f"not installed ({error})"
            if reason is None and not hasattr(loaded, function):
                reason = f"{module} {getattr(loaded, '__version__', torch.__version__)} has no {function}"
            if reason is None:
                found[name] = self.variant(build(loaded), recomputed, 2 if self.bias is None else 1)
            else:
                found[name] = Variant(missing={"all": reason})
        needed = 6 * torch.finfo(DTYPE).bits // 8 * self.batch**2
        if "all" not in found["open_clip"].missing and needed > free_memory():
            found["open_clip"] = Variant(missing={"all": f"full matrices need about {needed / 2**30:,.0f} GiB"})
        return found


def check_rows(problem: Problem, rows: int = 32) -> None:
    """The first rows against all keys, by every implementation: the check for batches too large for the reference."""
    image, text = problem.image[:rows].detach(), problem.text[:rows].detach()
    options = {"image_keys": problem.image.detach(), "text_keys": problem.text.detach()} | problem.options
    if "teacher_image" in options:
        options |= {name: options[name][:rows] for name in ("teacher_image", "teacher_text")}
    with torch.no_grad():
        losses = {
            name: focal_itc_loss(image, text, reduction="none", impl=name, **options)
            for name in registry.runnable("focal_itc", DEVICE, DTYPE, problem.width)
        }
    for name, loss in losses.items():
        check_close(f"focal_itc, B {problem.batch}: {name}", loss, losses["reference"], 1e-4)


def too_slow(known: dict[str, tuple[int, float]], batch: int) -> dict[str, Variant]:
    """variant -> its replacement, for variants that would take longer than LONGEST, judging by a smaller batch."""
    found = {}
    for name, (smaller, seconds) in known.items():
        estimate = seconds * (batch / smaller) ** 2
        if estimate > min(LONGEST, measure.longest or LONGEST):
            found[name] = Variant(missing={"all": f"would take about {estimate:,.0f} s, by its time at B {smaller:,}"})
    return found


@pytest.fixture(scope="module")
def known():
    """d -> variant -> the largest batch so far and the seconds of its fastest call."""
    return {}


@pytest.mark.parametrize(("width", "batch"), [(d, batch) for d, batches in BATCHES.items() for batch in batches])
def test_focal_itc(comparison, known, width, batch):
    times = known.setdefault(width, {})
    variants = too_slow(times, batch)
    if not times or len(variants) < len(times):
        problem = Problem(batch, width)
        variants = problem.eager() | problem.other_libraries() | problem.ours() | variants
        check_rows(problem)
    tolerance = 1e-3 if DTYPE == torch.float32 else 0.05
    case = {"B": batch, "M": batch, "d": width, "alpha": 0.0, "gamma": 0.0}
    for row in comparison("focal_itc", case, variants, "reference", "matmul", tolerance, seconds=4):
        if "both" in row["fastest"]:
            times[row["variant"]] = batch, row["fastest"]["both"]


def test_focal_itc_with_queue(comparison):
    problem = Problem(QUEUE["B"], QUEUE["d"], QUEUE_LENGTH, QUEUE["alpha"], QUEUE["gamma"])
    variants = problem.eager() | problem.ours()
    check_rows(problem)
    case = {"B": problem.batch, "M": problem.keys, "d": QUEUE["d"], "alpha": QUEUE["alpha"], "gamma": QUEUE["gamma"]}
    tolerance = 1e-3 if DTYPE == torch.float32 else 0.05
    comparison("focal_itc_queue", case, variants, "reference", "matmul", tolerance, seconds=20)


@pytest.mark.parametrize("batch", SIGMOID)
def test_focal_itc_sigmoid(comparison, batch):
    problem = Problem(batch, 256, sigmoid=True)
    variants = problem.eager() | problem.other_libraries() | problem.ours()
    check_rows(problem)
    case = {"B": batch, "M": batch, "d": 256, "gamma": 0.0}
    tolerance = 1e-3 if DTYPE == torch.float32 else 0.05
    comparison("focal_itc_sigmoid", case, variants, "reference", "matmul", tolerance, seconds=4)
