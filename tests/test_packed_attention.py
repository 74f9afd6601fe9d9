"""soft_masked_attention on packed rows, and the plans that its calls share."""

import pytest
import torch
from compare import assert_as_accurate, each_implementation, thin_out
from masked_attention import DTYPES, NAMES, SIZES, draw, plain, with_gradients

from softmask_fast.ops import plan_image_index, registry, soft_masked_attention

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
EACH = each_implementation("soft_masked_attention")


def packed(tensors, lengths, spare=0):
    """The tensors with the query as packed rows, of each sequence its first ``lengths``, and the boundaries.

    ``spare`` rows behind the last belong to nobody.
    """
    rows = [query[:, :length].transpose(0, 1) for query, length in zip(tensors["query"], lengths.tolist(), strict=True)]
    rows = torch.cat([*rows, torch.randn_like(tensors["query"])[0, :, :1].transpose(0, 1).expand(spare, -1, -1)])
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(rows.device, torch.int32)
    return tensors | {"query": rows}, boundaries


def plain_rows(query, key, value, keep=None, value_bias=None, image_index=None, boundaries=None, key_mask=None):
    """The definition for packed rows: each is a sequence of one token."""
    sequence = torch.repeat_interleave(boundaries.diff().long())
    keep, rows = None if keep is None else keep[sequence], query[: len(sequence), :, None]
    output = plain(rows, key, value, keep, value_bias, image_index[sequence], key_mask)[:, :, 0]
    nobody = torch.zeros_like(query[len(sequence) :])
    return torch.cat([output, nobody if value_bias is None else nobody + value_bias])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@EACH
def test_packed_rows(impl, sizes, dtype, device):
    """Sequences of any length, none and a tile's among them, behind each other; with a plan and without, the same."""
    thin_out(impl, SIZES.index(sizes), DTYPES.index(dtype))
    tensors, image_index = draw(sizes, dtype, device)
    key_mask = (torch.rand(sizes[1], sizes[4]) > 0.4).to(device)
    key_mask[:, :2] = True
    tensors, boundaries = packed(tensors, torch.randint(0, sizes[3] + 1, sizes[:1]), spare=2)
    plan = plan_image_index(image_index, sizes[1], boundaries=boundaries, rows=len(tensors["query"]))
    for mask in (None, key_mask):
        grad_output = torch.randn_like(tensors["query"])
        options = {"image_index": image_index, "boundaries": boundaries, "key_mask": mask}
        truth = with_gradients(plain_rows, tensors, grad_output, torch.float64, **options)
        baseline = with_gradients(plain_rows, tensors, grad_output, dtype, **options)
        actual = with_gradients(soft_masked_attention, tensors, grad_output, impl=impl, **options)
        for name, tensor in actual.items():
            assert_as_accurate(tensor, baseline[name], truth[name], dtype, name)
        planned = with_gradients(
            soft_masked_attention, tensors, grad_output, image_index=plan, key_mask=mask, impl=impl
        )
        assert all(torch.equal(actual[name], planned[name]) for name in actual)
        tensors.pop("keep", None)


def test_opcheck_of_the_plan():
    image_index, boundaries = torch.tensor([1, 0, 1]), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    for arguments in ((image_index, 2, None, 3), (image_index, 2, boundaries, 6)):
        torch.library.opcheck(torch.ops.softmask_fast.plan_image_index, arguments)


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_plan_of_packed_rows_compiles(made):
    def run(image_index, boundaries, plan, query, key, value, keep, value_bias):
        if plan is None:
            plan = plan_image_index(image_index, key.shape[0], boundaries=boundaries, rows=query.shape[0])
        return soft_masked_attention(query, key, value, keep, image_index=plan, value_bias=value_bias).square()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((4, 2, 2, 3, 5, 16), (9, 3, 2, 4, 7, 16)):
        tensors, image_index = draw(sizes, torch.float32, "cpu")
        tensors, boundaries = packed(tensors, torch.randint(1, sizes[3] + 1, sizes[:1]), spare=1)
        plan = plan_image_index(image_index, sizes[1], boundaries=boundaries, rows=len(tensors["query"]))
        arguments = (image_index, boundaries, plan if made == "outside" else None)
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        expected = torch.autograd.grad(run(*arguments, *leaves).sum(), leaves)
        actual = torch.autograd.grad(compiled(*arguments, *leaves).sum(), leaves)
        for name, *pair in zip(NAMES, actual, expected, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("is_packed", [False, True])
@each_implementation("soft_masked_attention", "triton")
def test_the_table_of_a_plan(is_packed, impl, device):
    """The kernel's is the definition's, but for rows of nobody, which are last. Images out of range count as one."""
    image_index = torch.tensor([2, 0, 5, 2, -1, 1, 2], device=device)
    boundaries = torch.tensor([0, 3, 3, 5, 6, 10, 12, 13], dtype=torch.int32, device=device) if is_packed else None
    arguments = (image_index, 4, boundaries, 15 if is_packed else 7)
    expected, actual = (
        registry.resolve("soft_masked_attention", name, device)["plan"](*arguments) for name in ("reference", impl)
    )
    starts = [0, 0, 2, 7, 7, 13] if is_packed else [0, 1, 2, 5, 5, 7]
    order = [10, 11, 0, 1, 2, 5, 12, 3, 4, 6, 7, 8, 9] if is_packed else [1, 5, 0, 3, 6, 2, 4]
    assert expected[:6].tolist() == starts and expected[6 : 6 + len(order)].tolist() == order
    if is_packed:
        assert expected[21:34].tolist() == [5, 5, 0, 0, 0, 3, 6, 2, 2, 4, 4, 4, 4]
    for part in (slice(0, 6 + len(order)), slice(21, 34)):
        assert torch.equal(actual[part], expected[part])


@pytest.mark.parametrize("values", [[1, 3, 4], [0, 4, 3], [0, 4, 7], [-1, 2, 3]])
def test_boundaries_ascend_from_zero(values):
    index, boundaries = torch.tensor([0, 0]), torch.tensor(values, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"boundaries: expected ascending values from 0 to at most 6, got \["):
        plan_image_index(index, 1, boundaries=boundaries, rows=6)
    with pytest.raises(ValueError, match=r"boundaries: expected ascending values from 0 to at most 6, got \["):
        soft_masked_attention(
            torch.ones(6, 1, 4),
            torch.ones(1, 1, 2, 4),
            torch.ones(1, 1, 2, 4),
            image_index=index,
            boundaries=boundaries,
        )


def test_a_plan_is_for_its_sizes():
    tensors, image_index = draw((4, 2, 2, 3, 5, 4), torch.float32, "cpu")
    for plan, message in (
        (plan_image_index(image_index, 3), "expected a plan for 2 images and 4 sequences, got one for 3 and 4"),
        (plan_image_index(image_index[:3], 2), r"expected size \(4\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=f"image_index: {message}"):
            soft_masked_attention(**tensors, image_index=plan)
    with pytest.raises(ValueError, match="image_index: expected values from 0 to 1, got 3"):
        plan_image_index(torch.tensor([0, 3]), 2)
    with pytest.raises(TypeError, match="rows: expected an integer, got NoneType"):
        plan_image_index(image_index, 2, boundaries=torch.zeros(5, dtype=torch.int32))
