"""CUDA graphs of whole steps, as far as a CPU can prove them: nothing in a step reads a value of the device, nothing of
a batch is left in what was traced, and the bookkeeping gives the steps of `DirectUpdates`."""

import copy
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode

from softmask_fast.data.types import Batch
from softmask_fast.model.momentum import MomentumTeacher, StepSettings
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.ops import word_mask
from softmask_fast.ops.soft_masked_attention import image_plan
from softmask_fast.training import cuda_graphs
from softmask_fast.training.cuda_graphs import Captured, GraphedUpdates, Sizes, StaticBatch, graph_refusal
from softmask_fast.training.deepspeed_engine import create_engine
from softmask_fast.training.options import make_config
from softmask_fast.training.step_times import StepTimes
from softmask_fast.training.updates import DirectUpdates, FiniteWatch

PAIRS, VOCABULARY = 4, 60
TOY = dict(
    image_size=32, vision_width=48, vision_heads=3, text_width=48, text_heads=3, vision_weights="random",
    text_weights="random", vocab_size=VOCABULARY, queue_size=16, embed_dim=16, hidden_dropout=0.0, batch_size=PAIRS,
)  # fmt: skip
# Operators whose result the host reads, or whose size depends on values
READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "equal", "bincount", "repeat_interleave")


def make_batch(seed, longest):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, longest + 1, (PAIRS,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) < lengths[:, None]
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator) * mask
    chosen = (torch.rand(mask.shape, generator=generator) < 0.3) & mask
    chosen[:, 1] = True
    positions = chosen.flatten().nonzero()[:, 0]
    return Batch(
        pixels=torch.randn(PAIRS, 3, 32, 32, generator=generator),
        input_ids=ids,
        masked_ids=torch.where(chosen, 4, ids),
        attention_mask=mask,
        mlm_positions=positions,
        mlm_labels=ids.flatten()[positions],
        word_index=torch.ones(PAIRS, dtype=torch.int64),
        ids=torch.randperm(100, generator=generator)[:PAIRS],
        keys=[f"{seed}-{row}" for row in range(PAIRS)],
        token_count=int(lengths.sum()),
    )


def make_step(**options):
    torch.manual_seed(0)
    config = make_config("base", **TOY | options)
    model = VisionLanguageModel(config.model)
    return PretrainingStep(model, config.objectives), MomentumTeacher(model, config.objectives), config


class Recorder(TorchDispatchMode):
    """The names of the operators that are dispatched."""

    def __init__(self):
        super().__init__()
        self.operators = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.add(str(function))
        return function(*args, **(kwargs or {}))


def reading(operators):
    return [name for name in operators if any(f".{read}." in name for read in READS)]


SMALL = dict(
    vision_depth=1, vision_contrast_blocks=0, text_layers=1, text_contrast_layers=0, fusion_layers=2, soft_mask_layer=0
)


def tensors_of(batch):
    return {f.name: getattr(batch, f.name) for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}


def traced(step, teacher, batch, soft, use_queue):
    """The forward and backward pass as a graph of operators, and a function that gives it its tensors."""

    def inputs(batch, alpha, seed):
        networks = [dict(m.named_parameters()) | dict(m.named_buffers()) for m in (step, teacher)]
        numbers = {"alpha": torch.tensor(alpha), "seed": torch.tensor(seed)}
        return [*networks, tensors_of(batch), numbers]

    step_copy, teacher_copy = copy.deepcopy((step, teacher))  # a model remembers the weights of its first step

    def run(student, average, texts, numbers):
        settings = StepSettings(numbers["alpha"] if soft else 0.0, numbers["seed"], use_queue)
        with (
            _reparametrize_module(step_copy, student, tie_weights=True),
            _reparametrize_module(teacher_copy, average, tie_weights=True),
        ):
            loss, metrics = step_copy(replace(batch, **texts), teacher_copy, settings)
            weights = [student[name] for name, _ in step_copy.named_parameters()]
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        return loss.detach(), gradients, metrics

    with pytest.MonkeyPatch.context() as patch:  # leave out the checks that read values of CPU tensors alone
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for module in (image_plan, word_mask):
            patch.setattr(module, "check_index_range", lambda *_: None)
        return make_fx(run, tracing_mode="fake")(*inputs(batch, 0.4, 5)), inputs


@pytest.mark.parametrize("soft, use_queue, sizes", [(True, True, {}), (False, False, SMALL)], ids=["base", "warm-up"])
def test_a_step_reads_no_value_and_repeats_on_other_batches(soft, use_queue, sizes):
    """`base` with its options and depth, at toy width. Traced with the sizes of a key, as a GPU would capture it, and
    run on batches of that key, the graph gives the losses and gradients of the plain step on the batch as it was."""
    step, teacher, config = make_step(**sizes)
    first, *others = (make_batch(seed, longest) for seed, longest in enumerate((9, 11, 7)))
    static = StaticBatch(first, config.model.max_tokens)
    graph, inputs = traced(step, teacher, static.fill(first, Sizes.of(first)), soft, use_queue)
    operators = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert sum(operators.values()) > 300
    assert not reading(operators)
    for number, batch in enumerate(others):
        assert Sizes.of(batch) == Sizes.of(first)
        alpha, seed = (0.1 + 0.2 * number) if soft else 0.0, 70 + number
        kept = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
        loss, gradients, metrics = graph(*inputs(static.fill(batch, Sizes.of(batch)), alpha, seed))
        entered = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
        teacher.load_state_dict(kept, strict=False)
        expected, expected_metrics = step(batch, teacher, StepSettings(alpha, seed, use_queue))
        step.zero_grad()
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        for name, value in expected_metrics.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for (name, weight), gradient in zip(step.named_parameters(), gradients, strict=True):
            if weight.grad is not None and "key.bias" not in name and "qkv.bias" not in name:  # held by hooks
                torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-5, msg=name)
        for name, buffer in teacher.named_buffers():
            torch.testing.assert_close(entered[name], buffer, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_on_a_gpu_reads_no_value(dtype):
    """On a device that is a GPU in name alone, where reading a value or a size that depends on one raises. Autograd's
    engine does not run there: no backward pass, and so no soft masks."""
    step, teacher, config = make_step(soft_mask=False, hidden_dropout=0.1)
    batch = make_batch(0, 9)
    static = StaticBatch(batch, config.model.max_tokens).fill(batch, Sizes.of(batch))

    def on_gpu(tensor):
        return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="cuda")

    with FakeTensorMode(), Recorder() as recorder:
        for module in (step, teacher):
            module._apply(on_gpu)
        texts = {name: on_gpu(tensor) for name, tensor in tensors_of(static).items()}
        alpha, seed = torch.empty((), device="cuda"), torch.empty((), device="cuda", dtype=torch.int64)
        loss, _ = step(replace(static, **texts), teacher, StepSettings(alpha, seed))
        assert loss.device.type == "cuda" and loss.requires_grad
        with pytest.raises(DataDependentOutputException):
            loss.item()
    assert ("torch_attn" in " ".join(recorder.operators)) == (dtype == torch.bfloat16)  # varlen attention


def test_dropout_of_a_traced_step_follows_the_seed_of_the_host():
    step, teacher, config = make_step(hidden_dropout=0.1, **SMALL)
    batch = make_batch(0, 9)
    static = StaticBatch(batch, config.model.max_tokens).fill(batch, Sizes.of(batch))
    graph, inputs = traced(step, teacher, static, True, False)

    def loss(seed):
        torch.manual_seed(seed)
        return graph(*inputs(static, 0.4, 5))[0]

    assert loss(1) == loss(1) != loss(2)


class Emulated(GraphedUpdates):
    """A replay runs the captured function again: it sees what lies at the fixed addresses, and nothing else anew."""

    captures = 0
    operators: frozenset[str] = frozenset()

    def update(self, rate):
        with Recorder() as recorder:
            norm = super().update(rate)
        self.operators = recorder.operators
        return norm

    def run_beside(self, work):
        return work()

    def capture(self, work):
        self.captures += 1

        def replay():
            captured.numbers, captured.names = work()

        captured = Captured(replay, None, None)
        return captured


def test_graphs_give_the_steps_of_direct_updates(one_rank, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", 3)
    deepspeed_config = {"train_micro_batch_size_per_gpu": PAIRS, "zero_optimization": {"stage": 1}}
    batches = [make_batch(seed, longest) for seed, longest in enumerate((9, 11, 7, 30, 8, 12, 28, 10))]
    # (alpha, use_queue): three keys by these, one more by the length of captions of the last two
    courses = [(0.0, False), (0.0, False), (0.0, True), (0.0, True), (0.1, True), (0.2, True), (0.3, True), (0.4, True)]
    monkeypatch.setattr(cuda_graphs, "TOKENS", 256)
    runs = {}
    for kind in (DirectUpdates, Emulated):
        step, teacher, config = make_step(**SMALL)
        engine, watch = create_engine(step, deepspeed_config, config.train), FiniteWatch()
        updates, logged = kind(engine, teacher, watch, StepTimes(engine.device)), []
        for number, (batch, (alpha, use_queue)) in enumerate(zip(batches, courses, strict=True)):
            logged.append(updates.step(batch, StepSettings(alpha, number, use_queue), number + 1, 1e-3))
        watch.check()
        runs[kind] = updates, logged, {name: weight.detach() for name, weight in step.named_parameters()}
        runs[kind][2].update({f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()})
    direct, emulated = runs.values()
    assert emulated[0].operators and not reading(emulated[0].operators)
    assert emulated[0].captures == 3 and len(emulated[0].graphs) == 3
    for number, (expected, metrics) in enumerate(zip(direct[1], emulated[1], strict=True)):
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-4, msg=f"{number} {name}")
    for name, weight in direct[2].items():
        torch.testing.assert_close(emulated[2][name], weight, rtol=1e-3, atol=1e-4, msg=name)
    assert emulated[0].engine.global_steps == len(batches)
    assert emulated[0].groups[0].options["lr"] == 1e-3


def test_where_graphs_do_not_apply():
    step, _, config = make_step(**SMALL)
    gpu = torch.device("cuda")
    assert graph_refusal(step, config.train, gpu) is None
    assert graph_refusal(step, config.train, torch.device("cpu")) == "a CPU"
    assert "gradient_accumulation_steps 2" in graph_refusal(
        step, replace(config.train, gradient_accumulation_steps=2), gpu
    )
    assert "xformers" in graph_refusal(step, replace(config.train, attention="xformers"), gpu)
    assert "fine-tuning" in graph_refusal(step.model, config.train, gpu)
    objectives = step.objectives
    for name, value, said in (("hard_negatives", False, "false"), ("hard_negatives_start", 0.7, "0.7")):
        step.objectives = replace(objectives, **{name: value})
        assert graph_refusal(step, config.train, gpu) == f"{name} {said} (uniform negatives are drawn on the host)"
