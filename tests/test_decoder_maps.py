"""Word maps of decoders against the maps of eager attention and their gradients, on small random models."""

import sys
import weakref

import pytest
import torch
from code_blocks import ROOT
from small_decoders import FAMILIES, IMAGE, small_batch, small_decoder
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import AttentionInterface

from softmask_fast.adapters.decoders import decoder_attention
from softmask_fast.adapters.transformers import word_relevance
from softmask_fast.adapters.words import with_answer


def log_probability(outputs, batch, answer):
    """Of each answer, the plain way."""
    logits = outputs.logits.log_softmax(-1)
    scores = []
    for row, ids, mask, first in zip(logits, batch["input_ids"], batch["attention_mask"], answer, strict=True):
        places = [p for p in range(int(first), len(ids)) if mask[p]]
        scores.append(sum(row[p - 1, ids[p]] for p in places))
    return torch.stack(scores)


def full_maps(family, batch, answer, layer, **text):
    kept, model = {}, small_decoder(family, "eager", **text)
    handle = decoder_attention(model)[layer].register_forward_hook(lambda *call: kept.update(map=call[2][1]))
    score = log_probability(model(**batch), batch, answer)
    handle.remove()
    (gradient,) = torch.autograd.grad(score.sum(), kept["map"])
    return (kept["map"] * gradient.clamp(min=0)).mean(1).detach()


def of_image(full, batch, answer, word, sample):
    """The row of a word in a full map, at the image's places."""
    row = word - int(word >= answer[sample])
    return full[sample, row, batch["input_ids"][sample] == IMAGE]


def close(maps, expected):
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_of_eager_attention(family):
    """All words of a padded batch; sdpa, and eager itself."""
    for backend, layer, side in (("sdpa", 0, "left"), ("eager", 0, "right"), ("sdpa", 1, "right")):
        batch, answer = small_batch(family, side)
        full = full_maps(family, batch, answer, layer)
        model = small_decoder(family, backend)
        with torch.no_grad(), word_relevance(model, layer, answer=answer) as cam:
            model(**batch)
        maps = cam.maps()
        for sample in range(2):
            tokens = int((batch["input_ids"][sample] == IMAGE).sum())
            words = batch["attention_mask"][sample].nonzero()[:, 0].tolist()
            expected = torch.stack([of_image(full, batch, answer, word, sample) for word in words])
            close(maps[sample, words, :tokens], expected)
            assert (maps[sample, :, tokens:] == 0).all()
            assert expected.max() > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_flex_attention(family):
    """Its masks, in the last layer: flex attention has no backward pass on the CPU, and there none is needed."""
    batch, answer = small_batch(family)
    full, model = full_maps(family, batch, answer, 1, head_dim=16), small_decoder(family, "flex_attention", head_dim=16)
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), word_relevance(model, 1, answer=answer) as cam:
        model(**batch)
    maps = cam.maps()
    assert isinstance(cam.record.mask, BlockMask)
    for sample in range(2):
        tokens = int((batch["input_ids"][sample] == IMAGE).sum())
        for word in range(int(answer[sample]), batch["input_ids"].shape[1]):
            close(maps[sample, word, :tokens], of_image(full, batch, answer, word, sample))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2"])
def test_on_a_gpu(backend):
    """As eager attention on the CPU, below other layers of the same attention, whose backward passes it needs."""
    half = backend == "flash_attention_2"
    if half:
        pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    batch, answer = small_batch("llava")
    full, model = full_maps("llava", batch, answer, 0, head_dim=16), small_decoder("llava", backend, head_dim=16)
    model = model.to("cuda", torch.bfloat16 if half else torch.float32)
    batch_there = {name: value.cuda() for name, value in batch.items()}
    batch_there["pixel_values"] = batch_there["pixel_values"].to(model.dtype)
    maps = relevance(model, batch_there, answer=answer).maps().cpu()
    for sample in range(2):
        for word in batch["attention_mask"][sample].nonzero()[:, 0].tolist():
            expected = of_image(full, batch, answer, word, sample)
            error = (maps[sample, word, : len(expected)] - expected).abs().max()
            assert error <= (0.1 if half else 1e-3) * full.max()


@pytest.fixture(scope="module")
def qwen():
    return small_decoder("qwen2_5_vl")


def relevance(model, batch, layer=0, **options):
    with torch.no_grad(), word_relevance(model, layer, **options) as cam:
        model(**batch)
    return cam


def test_a_cached_prefix_gives_the_maps_of_one_pass():
    model, (batch, answer) = small_decoder("llava"), small_batch("llava")
    whole = relevance(model, batch, answer=answer).maps()
    length, image = batch["input_ids"].shape[1], batch["input_ids"] == IMAGE
    kept = length - 5
    head = {name: value[:, :kept] if value.shape == (2, length) else value for name, value in batch.items()}
    tail = dict(input_ids=batch["input_ids"][:, kept:], attention_mask=batch["attention_mask"])
    with torch.no_grad():
        tail["past_key_values"] = model(**head, use_cache=True).past_key_values
    cam = relevance(model, tail, image_tokens=image, answer=answer - kept)
    close(cam.maps(), whole[:, kept:])
    cam._given_tokens = None
    with pytest.raises(ValueError, match="image_tokens: expected .* bool, as the pass continues a KV cache"):
        cam.maps()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma", "gemma3", "idefics3"])
def test_a_generated_answer_is_explained_by_a_second_pass(family):
    model, (batch, _) = small_decoder(family), small_batch(family)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
    with torch.no_grad():
        generated = model.generate(**batch, **options)
    full, answer = with_answer(model, batch, generated)
    assert full["input_ids"].shape == full["attention_mask"].shape and answer == batch["input_ids"].shape[1]
    layer = int(family == "gemma3")  # the image is outside the window of its first
    with torch.no_grad(), word_relevance(model, layer, answer=answer) as cam:
        logits = model(**full).logits.detach()
        maps = cam.maps()
    logits[..., [IMAGE, 2]] = float("-inf")
    for step in range(4):  # the second pass is the model's own: at each step the same token is the likeliest
        assert torch.equal(logits[:, answer - 1 + step].argmax(-1), generated[:, answer + step])
    expected = full_maps(family, full, torch.full((2,), answer), layer)
    for sample in range(2):
        tokens = int((full["input_ids"][sample] == IMAGE).sum())
        row = of_image(expected, full, [answer] * 2, answer + 2, sample)
        close(maps[sample, answer + 2, :tokens], row)
        assert row.max() > 0
    with pytest.raises(ValueError, match="one forward pass over the finished answer, got the steps of generate"):
        with word_relevance(model, 0) as cam:
            model.generate(**batch, **options)
            cam.maps()


def test_what_follows_the_end_of_an_answer_is_padding(qwen):
    batch, _ = small_batch("qwen2_5_vl")
    answer = torch.tensor([[7, 2, 0, 0], [7, 8, 9, 2]])  # 2 ends
    full, first = with_answer(qwen, batch, answer)
    assert full["attention_mask"][:, first:].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert torch.equal(full["input_ids"][:, first:], answer) and (full["mm_token_type_ids"][:, first:] == 0).all()
    whole, same = with_answer(qwen, batch, torch.cat([batch["input_ids"], answer], 1))
    assert same == first and torch.equal(whole["input_ids"], full["input_ids"])
    with pytest.raises(ValueError, match="generated: expected at least one token"):
        with_answer(qwen, batch, batch["input_ids"])


def test_labels_say_where_the_answer_begins(qwen):
    batch, answer = small_batch("qwen2_5_vl")
    places = torch.arange(batch["input_ids"].shape[1])
    labels = batch["input_ids"].where(places >= answer[:, None], -100)
    close(relevance(qwen, dict(batch, labels=labels)).maps(), relevance(qwen, batch, answer=answer).maps())


def test_scores_can_be_given(qwen):
    batch, answer = small_batch("qwen2_5_vl")

    def score(outputs):
        return outputs.logits[:, -1].log_softmax(-1).amax(-1)

    default = relevance(qwen, batch).maps()
    close(relevance(qwen, batch, score=score).maps(), default)
    with torch.no_grad(), word_relevance(qwen, 0) as cam:
        outputs = qwen(**batch)
        close(cam.maps(score(outputs)), default)
    word = torch.tensor([9, 11])
    close(cam.maps(score(outputs), word), default[torch.arange(2), word])
    close(cam.maps(score(outputs), word[:, None]), default[torch.arange(2), word][:, None])


@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_low_precision(qwen, precision):
    batch, answer = small_batch("qwen2_5_vl")
    expected = relevance(qwen, batch, answer=answer).maps()
    if precision == "bfloat16":
        model = small_decoder("qwen2_5_vl").to(torch.bfloat16)
        maps = relevance(model, dict(batch, pixel_values=batch["pixel_values"].bfloat16()), answer=answer).maps()
    else:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), word_relevance(qwen, 0, answer=answer) as cam:
            qwen(**batch)
            maps = cam.maps()
    assert maps.dtype == torch.float32
    assert (maps - expected).abs().max() < 0.1 * expected.max()
    assert torch.nn.functional.cosine_similarity(maps.flatten(), expected.flatten(), dim=0) > 0.99


class Live(TorchDispatchMode):
    """The most bytes at a time that operators made, and the largest tensor."""

    def __init__(self, *known):
        """known: tensors that do not count."""
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.known = [tensor.untyped_storage() for tensor in known]
        self.seen = weakref.WeakSet(self.known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.largest = max(self.largest, tensor.numel())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._end, storage.nbytes())
        return result

    def _end(self, size):
        self.now -= size


def test_maps_take_memory_by_words_and_image_tokens_alone():
    """Beside the same partial backward; and nothing has the size of a whole attention map."""
    model, (batch, _) = small_decoder("llava"), small_batch("llava")
    text = torch.randint(5, 80, (2, 600))
    ids = torch.cat([batch["input_ids"], text], 1)
    batch = dict(input_ids=ids, pixel_values=batch["pixel_values"])
    length = ids.shape[1]
    words = torch.arange(length - 8, length).expand(2, -1)
    with torch.no_grad(), word_relevance(model, 0, answer=length - 3) as cam:
        model(**batch)
        score = cam._score()
        with Live() as backward:
            cam.record.gradient(score)
        with Live() as maps:
            result = cam.maps(score, words)
    heads, image = 4, 16
    assert result.shape == (2, 8, image)
    row_bytes = 4 * 2 * 8 * length  # a word's logits over all keys, of one key head, are made for their sum
    assert maps.peak - backward.peak < 4 * 2 * 8 * image * heads * 4 + 3 * (heads // 2) * row_bytes
    assert backward.largest < length * length  # the attention of the layers above is fused
    assert maps.largest < length * length


def test_zero_maps_are_said(qwen):
    batch, answer = small_batch("qwen2_5_vl")
    cam = relevance(qwen, batch, layer=1, answer=answer)
    maps = cam.maps()
    length = batch["input_ids"].shape[1]
    first = int(batch["attention_mask"][0].argmax())
    image = int((batch["input_ids"][0] == IMAGE).int().argmax())
    assert f"sample 0: zero at {first}-{image - 1}: before the image, which it cannot see" in cam.notes
    assert f"sample 0: zero at {image}-{length - 5}: not read by the score" in cam.notes
    assert (maps[0, : length - 4] == 0).all() and (maps[0, length - 3 :].amax(1) > 0).all()


def test_an_image_outside_the_window_is_said():
    batch, answer = small_batch("gemma3")
    cam = relevance(small_decoder("gemma3", sliding_window=3), batch, answer=answer)
    maps, length = cam.maps(), batch["input_ids"].shape[1]
    assert (maps[:, -1] == 0).all()
    assert f"sample 0: zero at 10-{length - 1}: the image is outside this layer's window" in cam.notes


def test_mistakes_are_named(qwen):
    batch, answer = small_batch("qwen2_5_vl")
    with pytest.raises(ValueError, match="layer: expected a number from 0 to 1 of Qwen2_5_VL.*, got 2"):
        word_relevance(qwen, 2).__enter__()
    with word_relevance(qwen, 0) as cam, pytest.raises(ValueError, match="the layer has not run yet"):
        cam.maps()
    cam = relevance(qwen, batch)
    with pytest.raises(ValueError, match="does not depend on it"):
        cam.maps(torch.ones(2))
    with pytest.raises(ValueError, match=r"word_index: expected \(2, words\) positions from 0 to 17, got .* 99"):
        cam.maps(word_index=torch.tensor([1, 99]))
    with pytest.raises(ValueError, match="answer: expected a position from 1 to 17 for every sample"):
        relevance(qwen, batch, answer=18).maps()
    text = dict(input_ids=torch.randint(5, 80, (1, 6)))
    with pytest.raises(ValueError, match="input_ids: expected an image's tokens among them, got a text alone"):
        relevance(qwen, text).maps()
    with pytest.raises(ValueError, match=r"image_tokens: expected \(B, 18\) bool, got \(2, 3\)"):
        relevance(qwen, batch, image_tokens=torch.ones(2, 3, dtype=torch.bool)).maps()
    compiled = small_decoder("llava")
    compiled.compile()
    for model in (compiled, torch.compile(small_decoder("llava"))):
        with pytest.raises(ValueError, match="model: expected .* before torch.compile.* got it compiled"):
            word_relevance(model, 0).__enter__()


def test_two_layers_in_one_pass(qwen):
    batch, answer = small_batch("qwen2_5_vl")
    with torch.no_grad(), word_relevance(qwen, 0, answer=answer) as low, word_relevance(qwen, 1, answer=answer) as high:
        qwen(**batch)
    close(low.maps(), relevance(qwen, batch, 0, answer=answer).maps())
    close(high.maps(), relevance(qwen, batch, 1, answer=answer).maps())


def test_blocks_of_several_threads_end_in_any_order(qwen):
    """Each wrapped lookup would otherwise put back the one that it had found."""
    other = small_decoder("llava")
    interface = AttentionInterface.get_interface
    first, second = word_relevance(qwen, 0), word_relevance(other, 0)
    first.__enter__()
    cam = second.__enter__()
    first.__exit__(None, None, None)
    other(**small_batch("llava")[0])
    assert cam.maps().max() > 0
    second.__exit__(None, None, None)
    assert AttentionInterface.get_interface is interface
    torch.set_grad_enabled(True)


def test_nothing_stays(qwen):
    batch, answer = small_batch("qwen2_5_vl")
    before, interface = qwen(**batch).logits, AttentionInterface.get_interface
    with pytest.raises(RuntimeError, match="inside"), word_relevance(qwen, 0):
        qwen(**batch)
        raise RuntimeError("inside")
    assert torch.is_grad_enabled() and AttentionInterface.get_interface is interface
    after = qwen(**batch).logits
    assert torch.equal(before, after) and after.requires_grad
    assert all(parameter.grad is None for parameter in qwen.parameters())


def test_the_benchmark_at_a_small_size():
    """Its variants agree; the memory of ours is far below the map's, as counted."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_word_maps

    problem = bench_word_maps.Problem(tokens=512, image=256, words=8)
    close(problem.ours(), problem.eager())
    given = (problem.query, problem.key, problem.value, problem.gradient, problem.rows, problem.columns)
    with Live(*given) as counted:
        problem.ours()
    assert counted.peak < 0.05 * problem.map_bytes
    with Live() as counted:
        problem.eager()
    assert counted.peak > 2 * problem.map_bytes
