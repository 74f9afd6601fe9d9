"""One run under every ZeRO stage, and on another number of ranks. Every run is real."""

import pytest
import torch
from runs import metrics, run_cases
from safetensors.torch import load_file

STAGES = {"0": {"stage": 0}, "1": {"stage": 1}, "2": {"stage": 2}, "3": {"stage": 3}}
STAGES["3, checkpointing"] = {"stage": 3, "activation_checkpointing": True}
# nothing that sees a rank's own part of the batch, or the length of the run, which is told in parts
CONTRAST = dict(itm_weight=0, mlm_weight=0, hidden_dropout=0, learning_rate=1e-3, final_learning_rate=1e-3)
CONTRAST |= dict(queue_warmup_steps=400)
CUT = {f"cut, {stage}": CONTRAST | {"stage": stage} for stage in (0, 1, 3)}
WHOLE = {"whole": CONTRAST | {"stage": 1, "max_steps": 9}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six steps under each stage, nine with the contrastive loss alone, and their first three, by two ranks."""
    folder = tmp_path_factory.mktemp("two-ranks")
    first = {name: options | {"max_steps": 3} for name, options in CUT.items()}
    run_cases(STAGES | WHOLE | first, folder, ranks=2, max_steps=6)
    return folder


def test_zero_stages_agree(folder):
    """ZeRO 0 to 3 in fp32: losses, teacher and queue. They do not depend on activation checkpointing either."""
    reference = metrics(folder / "0")
    assert len(reference) == 6
    last = "checkpoints/step-00000006/teacher.safetensors"
    teacher, weights = (load_file(folder / "0" / name) for name in (last, "model/model.safetensors"))
    for case in STAGES:
        logged = metrics(folder / case)
        for step, expected in reference.items():
            assert logged[step] == pytest.approx(expected, abs=1e-5), (case, step)
        for expected, name in ((teacher, last), (weights, "model/model.safetensors")):
            other = load_file(folder / case / name)
            for key, tensor in expected.items():
                torch.testing.assert_close(
                    other[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, where=f"{case}, {key}": f"{where}: {m}"
                )


def test_another_number_of_ranks_resumes(folder):
    """Two ranks, then one, then two, with the same global batches: the contrastive loss, which sees the whole batch, is
    that of two ranks throughout, for each ZeRO stage."""
    for ranks, steps in ((1, 6), (2, 9)):
        text = run_cases(CUT, folder, ranks=ranks, batch_size=8 // ranks, max_steps=steps, resume=True)
        assert "continuing in epoch 0, repeating about 0 of 256 samples" in text
    whole = metrics(folder / "whole")
    last = "checkpoints/step-00000009/teacher.safetensors"
    teacher = load_file(folder / "whole" / last)
    for case in CUT:
        cut = metrics(folder / case)
        assert [cut[step]["itc"] for step in whole] == pytest.approx([whole[step]["itc"] for step in whole], abs=1e-5)
        for name, tensor in load_file(folder / case / last).items():
            if "queue" not in name:  # the same rows in another order
                torch.testing.assert_close(
                    tensor, teacher[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        kept = folder / case / "checkpoints"
        assert not list(kept.glob("universal*")) and not list(kept.glob("latest*"))
