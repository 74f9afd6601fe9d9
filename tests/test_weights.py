"""Weights as tuples: joined, held for a step, cast together."""

import pytest
import torch
from small_steps import make_batch, make_model

from softmask_fast.config import ObjectiveConfig
from softmask_fast.model.momentum import StepSettings
from softmask_fast.model.pretraining import PretrainingStep
from softmask_fast.model.weights import HeldWeights, Joined, weighted_layers


def test_a_key_bias_is_left_out_and_gets_no_gradient():
    parts = [torch.nn.Parameter(torch.randn(4)) for _ in range(3)]
    whole = torch.nn.Parameter(torch.cat([part.detach() for part in parts]))
    for parameters in (tuple(parts), (whole,)):
        joined = Joined(parameters, holds_key_bias=True).join()
        assert torch.equal(joined, torch.cat([parts[0], torch.zeros(4), parts[2]]))
        gradients = torch.cat(torch.autograd.grad(joined, parameters, torch.ones(12)))
        assert torch.equal(gradients, torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(4))


def test_cast_weights_are_the_joined_ones_in_bfloat16_and_so_are_their_gradients():
    model, _ = make_model()
    layers, held = weighted_layers(model), HeldWeights(model)
    expected = [layer.weights() for layer in layers]
    with held.hold(torch.bfloat16):
        found = [layer.weights() for layer in layers]
        assert all(layer.weights() is weights for layer, weights in zip(layers, found, strict=True))
    assert all(layer.held is None for layer in layers)
    gradients = []
    for groups in (found, expected):
        loss = sum((w.float() * torch.arange(w.numel()).view(w.shape).bfloat16()).sum() for g in groups for w in g)
        parameters = {name: p for name, p in model.named_parameters() if not name.startswith("text.bert.embeddings")}
        gradients.append(torch.autograd.grad(loss, parameters.values(), allow_unused=True))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, other.bfloat16()) for one, other in zip(ours, theirs, strict=True))
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def test_only_what_is_used_gets_a_gradient():
    model, _ = make_model()
    layer, other = weighted_layers(model)[:2]
    with HeldWeights(model).hold(torch.bfloat16):
        layer.weights()[3].sum().backward()
    used = layer.joined()[3].parameters
    assert all(p.grad is not None for p in used) and all(p.grad is None for p in other.parameters())
    assert sum(p.grad is not None for p in layer.parameters()) == len(used)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_bfloat16_is_close_to_one_in_float32(checkpointing):
    results = []
    for bf16 in (False, True):
        model, teacher = make_model(hidden_dropout=0.0)
        model.set_execution(checkpointing=checkpointing)
        loss, metrics = PretrainingStep(model, ObjectiveConfig(), bf16)(make_batch(), teacher, StepSettings(0.4, 11))
        loss.backward()
        results.append([metrics[name] for name in ("itc", "mlm")])
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_sharded_weights_are_not_held():
    model, _ = make_model()
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them under ZeRO-3
    with HeldWeights(model).hold(torch.bfloat16):
        assert all(layer.held is None for layer in weighted_layers(model))
