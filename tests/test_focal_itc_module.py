"""FocalITCLoss: its queue, and on 2 and 4 ranks each gather against focal_itc_loss on the joined batch."""

import itertools

import itc_cases
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_ranks import results_of_ranks
from largest_tensor import LargestTensor
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from softmask_fast.ops import FeatureQueue, FocalITCLoss, focal_itc_loss
from softmask_fast.ops.collectives import take_rows
from softmask_fast.ops.focal_itc import operators
from softmask_fast.ops.focal_itc.state import Keys, Options, Outputs, Rows

WIDTH, QUEUE, STEPS, RANKS = 24, 11, 2, 4
SIZES = {"even": [5, 5, 5, 5], "uneven": [4, 6, 1, 5]}  # rows of each rank; the first two of them where there are two
OPTIONS = {
    "soft targets, ids, queue": dict(gamma=2.0, alpha=0.4, ids=True, queue_size=QUEUE),
    "two passes": dict(gamma=2.5, alpha=0.4, ids=False, queue_size=0),
    "any positive": dict(gamma=1.0, alpha=0.3, ids=True, queue_size=QUEUE, positives="any"),
    "no teacher": dict(gamma=0.0, alpha=0.0, ids=False, queue_size=QUEUE),
    "sigmoid": dict(gamma=0.0, alpha=0.0, ids=False, queue_size=0, loss="sigmoid"),
    "sigmoid, ids, queue": dict(gamma=1.5, alpha=0.0, ids=True, queue_size=QUEUE, loss="sigmoid"),
}
GATHERS = ("momentum", "with_grad", "ring")
IMPLEMENTATIONS = ("cpp", "streamed")
CASES = [
    *itertools.product([2], ["even"], OPTIONS, GATHERS, ["cpp"]),
    *itertools.product([4], ["uneven"], OPTIONS, GATHERS, ["cpp"]),
    *itertools.product([4], ["even"], ["soft targets, ids, queue"], GATHERS, ["cpp"]),
    *itertools.product([4], ["uneven"], ["two passes", "any positive", "sigmoid, ids, queue"], GATHERS, ["streamed"]),
]


def unit(rows, seed, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def joined_inputs(rows, step):
    """image, text, their teachers, ids of a joined batch."""
    features = [unit(rows, 10 * step + index) for index in range(4)]
    return features, torch.randint(0, 7, (rows,), generator=torch.Generator().manual_seed(step))


def make_loss(gather, impl, *, gamma, queue_size, positives="mean", loss="softmax", group=None, **_):
    return FocalITCLoss(
        WIDTH, queue_size, gamma=gamma, positives=positives, loss=loss, gather=gather, impl=impl, seed=3, group=group
    )


def make_numbers(options):
    """Temperature and, for the sigmoid, bias."""
    return [torch.tensor(x, requires_grad=True) for x in ((0.1, -2.0) if "loss" in options else (0.1,))]


def step_options(options, gather, inputs, ids):
    """Keyword arguments of one forward pass; without alpha only "momentum" has a teacher."""
    keywords = dict(alpha=options["alpha"], ids=ids if options["ids"] else None)
    if options["alpha"] or gather == "momentum":
        keywords |= dict(teacher_image=inputs[2], teacher_text=inputs[3])
    return keywords


# ---- what every rank computes


def run_case(group, world, sizes, options, gather, impl):
    """Losses, statistics and gradients of this rank's rows, and the queue in the end."""
    sizes, rank = SIZES[sizes][:world], dist.get_rank(group)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    loss_module = make_loss(gather, impl, group=group, **OPTIONS[options])
    results = []
    for step in range(STEPS):
        inputs, ids = joined_inputs(sum(sizes), step)
        inputs, ids = [x[rows] for x in inputs], ids[rows]
        image, text = (x.clone().requires_grad_() for x in inputs[:2])
        numbers = make_numbers(OPTIONS[options])
        loss, stats = loss_module(
            image, text, return_stats=True, negatives="batch", seed=step,
            **dict(zip(("temperature", "bias"), numbers, strict=False)),
            **step_options(OPTIONS[options], gather, inputs, ids),
        )  # fmt: skip
        loss.backward()
        results.append([loss.detach(), *stats, image.grad, text.grad, *(number.grad for number in numbers)])
    return {"steps": results, "queue": dict(loss_module.queue.state_dict()) if loss_module.queue else {}}


def error_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except ValueError as error:
        return str(error)
    return None


def run_refusals(rank):
    x = unit(3, rank)
    loss_module = FocalITCLoss(gather="with_grad")
    rows = x[:0] if rank == 2 else x
    ids = torch.arange(3) if rank == 1 else None
    return {
        "no rows": error_of(loss_module, rows, rows, temperature=0.1),
        "ids": error_of(loss_module, x, x, temperature=0.1, ids=ids),
        "rows": error_of(take_rows, x[:, None], torch.tensor([12 if rank == 3 else 0])),
    }


def run_fetch(rank):
    """Rows of other ranks, as many as wanted on each, and the gradients that come back."""
    sizes = SIZES["uneven"]
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sizes[rank], 2, 3, generator=generator).requires_grad_()
    index = torch.randint(0, sum(sizes), (3 * rank,), generator=generator)
    found = take_rows(x, index)
    weight = torch.randn(found.shape, generator=generator)
    (found * weight).sum().backward()
    return {"x": x.detach(), "index": index, "found": found.detach(), "weight": weight, "grad": x.grad}


def encoders():
    torch.manual_seed(8)
    return nn.ModuleList([nn.Linear(6, WIDTH), nn.Linear(5, WIDTH)])


class Encoded(nn.Module):
    """Two encoders and the loss of their features, to be wrapped by DistributedDataParallel."""

    def __init__(self, gather, sizes):
        super().__init__()
        self.encoders, self.log_temperature = encoders(), nn.Parameter(torch.tensor([-2.0]))
        self.loss = FocalITCLoss(gather=gather)

    def forward(self, image, text):
        features = [F.normalize(encoder(x), dim=-1) for encoder, x in zip(self.encoders, (image, text), strict=True)]
        teachers = dict(teacher_image=features[0].detach(), teacher_text=features[1].detach())
        return self.loss(*features, temperature=self.log_temperature.exp()[0], alpha=0.2, **teachers)


def run_ddp(rank, gather):
    sizes = SIZES["uneven"]
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    model = DistributedDataParallel(Encoded(gather, sizes))
    model(unit(sum(sizes), 1, 6)[rows], unit(sum(sizes), 2, 5)[rows]).backward()
    return [parameter.grad for parameter in model.parameters()]


def run_memory(gather, impl):
    rows, width = 16, 64
    image, text = (unit(rows, seed, width).requires_grad_() for seed in range(2))
    loss_module = FocalITCLoss(gather=gather, impl=impl)
    with LargestTensor() as largest:
        loss_module(image, text, temperature=0.1, ids=torch.arange(rows)).backward()
    return largest.elements / (rows * width)


def run_rank(rank):
    pair = dist.new_group([0, 1])
    results = {}
    for case in CASES:
        if rank < case[0]:
            results["|".join(map(str, case))] = run_case(pair if case[0] == 2 else None, *case)
    results |= {"refusals": run_refusals(rank), "fetch": run_fetch(rank)}
    results["ddp"] = {gather: run_ddp(rank, gather) for gather in GATHERS[1:]}
    results["memory"] = {
        f"{gather} {impl}": run_memory(gather, impl) for gather in GATHERS[1:] for impl in IMPLEMENTATIONS
    }
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank computed, in one launch."""
    return results_of_ranks(run_rank, RANKS, tmp_path_factory.mktemp("ranks"))


# ---- one process, joined batch


def joined_steps(world, sizes, options, gather, impl):
    """The steps of ``run_case`` by focal_itc_loss on the joined batch, with queues kept by hand."""
    options, total = OPTIONS[options], sum(SIZES[sizes][:world])
    size, results = options["queue_size"], []
    queue_image, queue_text, queue_ids = (x.flip(0) for x in FeatureQueue(WIDTH, size, seed=3).keys(torch.empty(0)))
    for step in range(STEPS):
        inputs, ids = joined_inputs(total, step)
        image, text = (x.clone().requires_grad_() for x in inputs[:2])
        numbers = make_numbers(options)
        keywords = step_options(options, gather, inputs, ids)
        keywords |= zip(("temperature", "bias"), numbers, strict=False)
        new = inputs[2:] if "teacher_image" in keywords else inputs[:2]
        batch = inputs[2:] if gather == "momentum" else (image, text)
        loss, stats = focal_itc_loss(
            image, text, torch.cat([batch[0], queue_image]), torch.cat([batch[1], queue_text]), gamma=options["gamma"],
            positives=options.get("positives", "mean"), loss=options.get("loss", "softmax"), seed=step,
            key_ids=torch.cat([ids, queue_ids]) if options["ids"] else None, negative_range=(0, total), impl=impl,
            return_stats=True, **keywords,
        )  # fmt: skip
        loss.backward()
        results.append([loss.detach(), *stats, image.grad, text.grad, *(number.grad for number in numbers)])
        # the newest first: the order of the keys does not change the loss
        queue_image = torch.cat([new[0].flip(0), queue_image])[:size]
        queue_text = torch.cat([new[1].flip(0), queue_text])[:size]
        queue_ids = torch.cat([ids.flip(0), queue_ids])[:size]
    return results, (queue_image, queue_text, queue_ids)


def assert_equal_to(actual, expected, what):
    """1e-6 of the largest value, in float32."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-6 * max(1e-3, expected.abs().max().item()), msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ranks_agree_with_one_process_on_the_joined_batch(ranks, case):
    world = case[0]
    of_ranks = [results["|".join(map(str, case))] for results in ranks[:world]]
    expected_steps, expected_queue = joined_steps(*case)
    for step, expected in enumerate(expected_steps):
        got = list(zip(*(of_rank["steps"][step] for of_rank in of_ranks), strict=True))
        for index in range(7):  # the loss, and the averages of the statistics
            assert_equal_to(torch.stack(got[index]).mean(), expected[index], f"step {step}, metric {index}")
        for index in (7, 8):  # hard negatives
            assert torch.equal(torch.cat(got[index]), expected[index])
        for index in (9, 10):  # gradients of image and text, which DDP would average
            assert_equal_to(torch.cat(got[index]) / world, expected[index], f"step {step}, gradient {index}")
        for index in range(11, len(expected)):
            assert_equal_to(torch.stack(got[index]).mean(), expected[index], f"step {step}, number {index - 11}")
    for of_rank in of_ranks:
        queue = of_rank["queue"]
        assert all(torch.equal(queue[name], of_ranks[0]["queue"][name]) for name in queue)
        if not queue:
            continue
        order = (int(queue["queue_position"]) - 1 - torch.arange(QUEUE)) % QUEUE
        assert torch.equal(queue["image_queue"][order], expected_queue[0])
        assert torch.equal(queue["text_queue"][order], expected_queue[1])
        if OPTIONS[case[2]]["ids"]:
            assert torch.equal(queue["queue_ids"][order], expected_queue[2])


@pytest.mark.parametrize("gather", GATHERS[1:])
def test_gradients_under_ddp_are_those_of_the_joined_batch(ranks, gather):
    sizes = SIZES["uneven"]
    model = Encoded("with_grad", sizes)
    model(unit(sum(sizes), 1, 6), unit(sum(sizes), 2, 5)).backward()
    for results in ranks:
        for actual, parameter in zip(results["ddp"][gather], model.parameters(), strict=True):
            assert_equal_to(actual, parameter.grad, "gradient")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_ring_holds_nothing_of_the_size_of_the_joined_batch(ranks, impl):
    """The largest tensor, in units of a rank's features: image and text together, or the whole joined batch."""
    for results in ranks:
        assert results["memory"][f"ring {impl}"] <= 2 < RANKS <= results["memory"][f"with_grad {impl}"]


def test_what_does_not_fit_together_is_refused_on_every_rank(ranks):
    for results in ranks:
        refusals = results["refusals"]
        assert refusals["no rows"] == "image: expected at least one row on every rank, got [3, 3, 0, 3]"
        assert refusals["ids"] == "FocalITCLoss: expected the same on every rank, got ids [0, 1, 0, 0]"
        assert refusals["rows"] == "index: expected rows from 0 to 11 of the joined batch, got 0 to 12"


def test_rows_are_fetched_from_their_ranks_and_gradients_return(ranks):
    fetched = [results["fetch"] for results in ranks]
    leaves = [found["x"].clone().requires_grad_() for found in fetched]
    joined = torch.cat(leaves)
    sum((joined[found["index"]] * found["weight"]).sum() for found in fetched).backward()
    for found, leaf in zip(fetched, leaves, strict=True):
        assert torch.equal(found["found"], joined.detach()[found["index"]])
        torch.testing.assert_close(found["grad"], leaf.grad)


# ---- on one process


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [5, 8, 1, 7], [20], [2, 25, 4]])
@pytest.mark.parametrize("with_ids", [True, False])
def test_the_queue_holds_the_newest_features_whatever_the_batch_sizes(sizes, with_ids):
    loss_module = FocalITCLoss(WIDTH, 8)
    images, texts, ids = torch.empty(0, WIDTH), torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64)
    for size in sizes:
        new = unit(2 * size, size).unflatten(0, (2, size))
        new_ids = torch.randint(0, 1000, (size,))
        loss_module(
            *unit(2 * size, 1).unflatten(0, (2, size)),
            teacher_image=new[0],
            teacher_text=new[1],
            temperature=0.1,
            ids=new_ids if with_ids else None,
        )
        images, texts, ids = torch.cat([images, new[0]]), torch.cat([texts, new[1]]), torch.cat([ids, new_ids])
    queue = loss_module.queue
    order = (int(queue.queue_position) + torch.arange(8)) % 8
    assert torch.equal(queue.image_queue[order], images[-8:])
    assert torch.equal(queue.text_queue[order], texts[-8:])
    if with_ids:
        assert torch.equal(queue.queue_ids[order], ids[-8:])
    else:
        assert (queue.queue_ids < 0).all() and len(set(queue.queue_ids.tolist())) == 8


def test_state_dict_restores_the_queue():
    first, second = (FocalITCLoss(WIDTH, 8, gather="with_grad", seed=seed) for seed in range(2))
    x, y, ids = unit(5, 0), unit(5, 1), torch.arange(5) % 3
    first(x, y, temperature=0.1, ids=ids)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(y, x, temperature=0.1, ids=ids), second(y, x, temperature=0.1, ids=ids))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


@pytest.mark.parametrize("queue_size", [0, 8])
def test_older_state_dicts_load(queue_size):
    """Those from before the queue was a module, alone and as a part of another module."""
    queue = FeatureQueue(WIDTH, queue_size, seed=5).state_dict()
    loss_module = FocalITCLoss(WIDTH, queue_size)
    loss_module.load_state_dict(queue)
    assert all(torch.equal(tensor, queue[name[6:]]) for name, tensor in loss_module.state_dict().items())
    whole = nn.Sequential(FocalITCLoss(WIDTH, queue_size))
    whole.load_state_dict({f"0.{name}": tensor for name, tensor in queue.items()})
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), loss_module.buffers(), strict=True))


def test_a_queue_of_the_caller_is_the_same_and_updated_by_the_caller():
    own, other = FocalITCLoss(WIDTH, 8, gather="with_grad", seed=2), FocalITCLoss(gather="with_grad")
    queue = FeatureQueue(WIDTH, 8, seed=2)
    for step in range(2):
        (x, y, teacher_x, teacher_y), ids = joined_inputs(5, step)
        options = dict(temperature=0.1, ids=ids, alpha=0.4, teacher_image=teacher_x, teacher_text=teacher_y)
        before = [buffer.clone() for buffer in queue.buffers()]
        loss, newest = other(x, y, queue=queue, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, queue.buffers(), strict=True))
        queue.enqueue(*newest)
        assert torch.equal(loss, own(x, y, **options))
        assert all(torch.equal(a, b) for a, b in zip(own.queue.buffers(), queue.buffers(), strict=True))
    assert other.eval()(x, y, queue=queue, return_stats=True, **options)[2] is None
    assert other.train()(x, y, queue=FeatureQueue(WIDTH, 0), **options)[1] is None
    assert not other.state_dict()


def test_evaluation_leaves_the_queue_alone():
    loss_module = FocalITCLoss(WIDTH, 8, gather="with_grad").eval()
    before = [buffer.clone() for buffer in loss_module.buffers()]
    loss_module(unit(5, 0), unit(5, 1), temperature=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, loss_module.buffers(), strict=True))


def test_without_use_queue_the_queue_gives_no_keys_but_fills():
    full, empty = FocalITCLoss(WIDTH, 8, gather="with_grad"), FocalITCLoss(gather="with_grad")
    x, y = unit(5, 0), unit(5, 1)
    assert torch.equal(full(x, y, temperature=0.1, use_queue=False), empty(x, y, temperature=0.1))
    assert torch.equal(full.queue.image_queue[:5], x)


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_batch_that_is_all_there_is_is_its_own_keys(with_ids, monkeypatch):
    """Then both directions are computed together; the momentum features or a queue are other keys."""
    seen, together = [], operators.together
    monkeypatch.setattr(operators, "together", lambda *given: seen.append(together(*given)) or seen[-1])
    x, y, ids = unit(5, 0), unit(5, 1), torch.arange(5) % 3 if with_ids else None
    for gather, queue_size, own in (("with_grad", 0, True), ("ring", 0, True), ("with_grad", 8, False)):
        loss = FocalITCLoss(WIDTH, queue_size, gather=gather, impl="cpp").eval()(x, y, temperature=0.1, ids=ids)
        assert seen.pop() == own
        if own:
            torch.testing.assert_close(loss, focal_itc_loss(x, y, temperature=0.1, ids=ids, impl="reference"))


def test_a_ring_of_one_rank_and_bfloat16_features():
    x, y, ids = unit(5, 0).bfloat16(), unit(5, 1).bfloat16(), torch.arange(5) % 4
    losses = [FocalITCLoss(WIDTH, 8, gather=gather)(x, y, temperature=0.1, ids=ids) for gather in GATHERS[1:]]
    assert torch.equal(*losses) and losses[0].dtype == torch.float32


@pytest.mark.parametrize("gather", GATHERS)
def test_compiles_as_one_graph(gather):
    plain, compiled = FocalITCLoss(WIDTH, 8, gather=gather), FocalITCLoss(WIDTH, 8, gather=gather)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(2):
        inputs, ids = joined_inputs(5, step)
        results = []
        for function in (plain, run):
            image, text = (x.clone().requires_grad_() for x in inputs[:2])
            temperature = torch.tensor(0.1, requires_grad=True)
            loss, stats = function(
                image, text, teacher_image=inputs[2], teacher_text=inputs[3], temperature=temperature, alpha=0.4,
                ids=ids, return_stats=True,
            )  # fmt: skip
            results.append([loss.detach(), *stats, *torch.autograd.grad(loss, (image, text, temperature))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), compiled.buffers(), strict=True))


@pytest.mark.parametrize("impl", itc_cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("gamma", [2.0, 2.5])
def test_blocks_of_keys_may_come_in_any_order(impl, gamma):
    """As in a ring. The first key is there once more in every block: of equal ones the first counts, in any order."""
    device = itc_cases.device_of(impl)
    rows, teacher, keys = (tensor.to(device) for tensor in (unit(6, 0), unit(6, 1), unit(40, 2)))
    keys[10::10] = keys[0] = rows[0]
    numbers = torch.tensor(0.4, dtype=torch.float64, device=device), torch.tensor(5, device=device)  # alpha, seed
    options = Options(*numbers, gamma, False, 0, 0, len(keys))
    six_rows = Rows(rows, teacher, None, torch.tensor(0.1, device=device), options)
    results = []
    for order in ([0, 10, 20, 30], [20, 10, 0, 30], [30, 20, 10, 0]):
        run = operators.resolve(impl, rows)["forward"](six_rows)
        for second_pass in range(run.passes):
            for first in order:
                run.add(Keys(keys[first : first + 10], None, first), bool(second_pass))
        results.append(Outputs.empty(six_rows))
        run.finish(results[-1])
    loss, row_state, dominant, statistics, hard_negative = results[0]
    assert dominant[0] == 0 and statistics[0, 0] == 1
    for other in results[1:]:
        assert torch.equal(other[2], dominant) and torch.equal(other[4], hard_negative)
        for actual, expected in ((other[0], loss), (other[1], row_state), (other[3], statistics)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_named():
    x = unit(4, 0)
    for options, message in (
        (dict(gather="all"), "gather: expected 'momentum' or 'with_grad' or 'ring', got 'all'"),
        (dict(gamma=-1.0), "gamma: expected a number of at least 0"),
        (dict(queue_size=-1), "queue_size: expected an integer of at least 0, got -1"),
        (dict(positives="sum"), "positives: expected 'mean' or 'any'"),
    ):
        with pytest.raises(ValueError, match=message):
            FocalITCLoss(**options)
    with pytest.raises(TypeError, match="width: expected an integer, got NoneType"):
        FocalITCLoss(queue_size=8)
    for options, arguments, message in (
        (dict(), dict(), "teacher_image: expected the teacher's features, the keys of gather='momentum', got None"),
        (
            dict(gather="ring"),
            dict(teacher_text=x),
            "teacher_image: expected a tensor along with teacher_text, got None",
        ),
        (dict(gather="ring"), dict(alpha=0.4), "teacher_image: expected a tensor of size .* as alpha is 0.4, got None"),
        (dict(gather="ring"), dict(negatives="all"), "negatives: expected 'keys' or 'batch' or 'rank', got 'all'"),
        (dict(width=8, queue_size=2), dict(), r"image: expected size \(B, 8\), got \(4, 24\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FocalITCLoss(**options)(x, x, temperature=0.1, **arguments)


def test_bad_arguments_are_named_before_anything_travels(monkeypatch):
    """A rank that raises later would leave the others waiting; a ring would not look at a bias at all."""
    x = unit(4, 0)
    loss = FocalITCLoss(gather="ring")
    monkeypatch.setattr(loss, "_join", lambda *_: pytest.fail("the ranks have exchanged sizes"))
    with pytest.raises(ValueError, match="bias: expected None with loss='softmax'"):
        loss(x, x, temperature=0.1, bias=1.0)
    with pytest.raises(TypeError, match="seed: expected an integer, got float"):
        loss(x, x, temperature=0.1, seed=0.5)
