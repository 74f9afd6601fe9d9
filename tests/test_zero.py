"""One run in several ways: under every ZeRO stage, on another number of ranks, compiled. Every run is real."""

import pytest
import torch
from runs import metrics, run_cases
from safetensors.torch import load_file


def test_zero_stages_agree(tmp_path):
    """ZeRO 0 to 3 in fp32 on two ranks, 20 steps each, in one launch: losses, teacher and queue. They do not depend on
    activation checkpointing either."""
    others = ("1", "2", "3", "3+activation_checkpointing")
    run_cases(",".join(("0", *others)), tmp_path, ranks=2, max_steps=20, checkpoint_steps=20)
    reference = metrics(tmp_path / "0")
    assert len(reference) == 20
    last = "checkpoints/step-00000020/teacher.safetensors"
    teacher, weights = (load_file(tmp_path / "0" / name) for name in (last, "model/model.safetensors"))
    for case in others:
        logged = metrics(tmp_path / case)
        for step, expected in reference.items():
            assert logged[step] == pytest.approx(expected, abs=1e-5), (case, step)
        for expected, name in ((teacher, last), (weights, "model/model.safetensors")):
            other = load_file(tmp_path / case / name)
            for key, tensor in expected.items():
                torch.testing.assert_close(
                    other[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, where=f"{case}, {key}": f"{where}: {m}"
                )


def test_another_number_of_ranks_resumes(tmp_path):
    """Two ranks, then one, then two, with the same global batches: the contrastive loss, which sees the whole batch, is
    that of two ranks throughout, for each ZeRO stage."""
    same = dict(itm_weight=0, mlm_weight=0, hidden_dropout=0, learning_rate=1e-3, final_learning_rate=1e-3)
    same |= dict(queue_warmup_steps=400)  # not a share of the run, whose length is told in parts
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    run_cases("1", tmp_path / "whole", ranks=2, max_steps=9, **same)
    for ranks, steps in ((2, 3), (1, 6), (2, 9)):
        options = same | dict(ranks=ranks, batch_size=8 // ranks, max_steps=steps, resume=steps > 3)
        text = run_cases("0,1,3", tmp_path / "cut", **options)
        assert steps == 3 or "continuing in epoch 0, where about 0 of 256 samples will be visited twice" in text
    whole = metrics(tmp_path / "whole" / "1")
    last = "checkpoints/step-00000009/teacher.safetensors"
    teacher = load_file(tmp_path / "whole" / "1" / last)
    for stage in (0, 1, 3):
        folder = tmp_path / "cut" / str(stage)
        cut = metrics(folder)
        assert [cut[step]["itc"] for step in whole] == pytest.approx([whole[step]["itc"] for step in whole], abs=1e-5)
        for name, tensor in load_file(folder / last).items():
            if "queue" not in name:  # the same rows in another order
                torch.testing.assert_close(
                    tensor, teacher[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert not list((folder / "checkpoints").glob("universal*")) and not list(folder.glob("checkpoints/latest*"))
