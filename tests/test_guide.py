"""docs/adapters.md: each block against the formula that it replaces, written here, on the same inputs."""

import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from code_blocks import ROOT, assert_sections_are_named, blocks_of, run_section
from compare import assert_as_accurate
from torch import nn

from softmask_fast.ops import FocalITCLoss

PAGE = ROOT / "docs" / "adapters.md"
ROWS, QUEUE, WIDTH, ALPHA = 6, 10, 16, 0.4


def run(heading, **namespace):
    return run_section(PAGE, heading, torch=torch, **namespace)


def test_every_block_of_the_page_has_a_test():
    assert_sections_are_named(PAGE, __file__)


def headings_of(codebase, column):
    """The headings with code that the page's table names for a codebase."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    (cell,) = [row[column] for row in rows if codebase in row[1]]
    names = {block.heading for block in blocks_of(PAGE, "python")}
    headings = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-"): name for name in names}
    return [headings[anchor] for anchor in re.findall(r"\(#([\w-]+)\)", cell)]


# ---- losses


def unit(rows):
    return F.normalize(torch.randn(rows, WIDTH, dtype=torch.float64), dim=-1)


def momentum_model(dtype):
    """Features, momentum features and queues, as the ALBEF family names them, from the same numbers for each dtype."""
    torch.manual_seed(3)
    values = {name: unit(ROWS) for name in ("image_feat", "text_feat", "image_feat_m", "text_feat_m")}
    queues = {name: unit(QUEUE).T for name in ("image_queue", "text_queue")}
    idx_queue = torch.full((1, QUEUE), -100)
    idx_queue[0, :4] = torch.tensor([7, 2, 9, 7])
    temp = torch.tensor(0.07, dtype=dtype, requires_grad=True)
    model = SimpleNamespace(temp=temp, idx_queue=idx_queue, **{name: q.to(dtype) for name, q in queues.items()})
    features = {name: value.to(dtype) for name, value in values.items()}
    for name in ("image_feat", "text_feat"):
        features[name].requires_grad_()
    return model, features


def soft_target_loss(rows, teacher, keys, hard, model, alpha):
    """Mean over the rows of the cross-entropy with alpha * teacher's softmax + (1 - alpha) * hard."""
    target = alpha * (teacher @ keys / model.temp.detach()).softmax(1) + (1 - alpha) * hard
    return -((rows @ keys / model.temp).log_softmax(1) * target).sum(1).mean()


def pair_losses(model, features, hard, alpha):
    """Image to text and text to image."""
    image, text, image_m, text_m = features.values()
    image_keys, text_keys = torch.cat([image_m.T, model.image_queue], 1), torch.cat([text_m.T, model.text_queue], 1)
    return (
        soft_target_loss(image, image_m, text_keys, hard, model, alpha),
        soft_target_loss(text, text_m, image_keys, hard, model, alpha),
        soft_target_loss(image, image_m, image_keys, hard, model, 0.0),
        soft_target_loss(text, text_m, text_keys, hard, model, 0.0),
    )


def one_hot(dtype):
    return torch.eye(ROWS, ROWS + QUEUE, dtype=dtype)


def by_id(idx, model, dtype):
    same = (idx[:, None] == torch.cat([idx, model.idx_queue[0]])).to(dtype)
    return same / same.sum(1, keepdim=True)


def assert_loss(block_loss, formula):
    """Loss and gradients: the block in float32, the formula in float32 and float64."""

    def found(loss_of, dtype):
        model, features = momentum_model(dtype)
        loss = loss_of(model, features)
        wanted = (features["image_feat"], features["text_feat"], model.temp)
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    ours, baseline = found(block_loss, torch.float32), found(formula, torch.float32)
    for values in zip(
        ours, baseline, found(formula, torch.float64), ("loss", "image", "text", "temperature"), strict=True
    ):
        assert_as_accurate(*values[:3], torch.float32, values[3])


IDX = torch.tensor([7, 2, 7, 5, 1, 2])


def test_retrieval_fine_tuning():
    atts = torch.arange(ROWS)[:, None].repeat(1, 3)
    found = []

    def block(model, features):
        embeds = dict(image_embeds=10.0 + torch.arange(ROWS), text_embeds=20.0 + torch.arange(ROWS))
        text = SimpleNamespace(attention_mask=atts)
        heading = "Retrieval fine-tuning: positives by id"
        found.append(run(heading, self=model, alpha=ALPHA, idx=IDX[:, None], text=text, **embeds, **features))
        return found[-1].loss_ita

    def formula(model, features):
        return sum(pair_losses(model, features, by_id(IDX, model, model.temp.dtype), ALPHA)[:2]) / 2

    assert_loss(block, formula)
    images, texts = (found[0].image_embeds_neg - 10).long(), (found[0].text_embeds_neg - 20).long()
    assert torch.equal(found[0].text_atts_neg, atts[texts])
    for negative in (images, texts):
        assert ((negative >= 0) & (negative < ROWS)).all() and (IDX[negative] != IDX).all()


def test_hard_negatives_have_the_distribution_of_the_softmax():
    """With the rows' own ids masked, as ALBEF and LAVIS draw them."""
    model, features = momentum_model(torch.float32)
    model.temp = model.temp.detach() * 4  # so that no negative is rare
    embeds = dict(image_embeds=torch.arange(ROWS), text_embeds=torch.arange(ROWS))
    text = SimpleNamespace(attention_mask=torch.arange(ROWS))
    counts = torch.zeros(ROWS, ROWS)
    for _ in range(300):
        found = run(
            "Retrieval fine-tuning: positives by id", self=model, alpha=ALPHA, idx=IDX, text=text, **embeds, **features
        )
        counts[torch.arange(ROWS), found.text_embeds_neg] += 1
    logits = features["image_feat"].detach() @ features["text_feat_m"].T / model.temp
    expected = logits.masked_fill(IDX[:, None] == IDX, -torch.inf).softmax(1)
    assert (counts / 300 - expected).abs().max() < 0.12  # four standard deviations of a fraction of one half


def test_retrieval_of_blip():
    """As its models/blip_retrieval.py computes the loss since March 2022; it draws hard negatives by itself."""

    def formula(model, features):
        idx = IDX.view(-1, 1)
        same = torch.eq(idx, torch.cat([idx.T, model.idx_queue], 1)).to(model.temp.dtype)
        hard = same / same.sum(1, keepdim=True)
        keys = {
            kind: torch.cat([features[f"{kind}_feat_m"].T, getattr(model, f"{kind}_queue")], 1)
            for kind in ("image", "text")
        }
        losses = []
        for rows, columns in (("image", "text"), ("text", "image")):
            teacher = features[f"{rows}_feat_m"] @ keys[columns] / model.temp
            targets = (ALPHA * teacher.softmax(1) + (1 - ALPHA) * hard).detach()
            logits = features[f"{rows}_feat"] @ keys[columns] / model.temp
            losses.append(-(logits.log_softmax(1) * targets).sum(1).mean())
        return sum(losses) / 2

    embeds = dict(image_embeds=torch.zeros(ROWS), text_embeds=torch.zeros(ROWS))
    text = SimpleNamespace(attention_mask=torch.zeros(ROWS))
    (heading,) = headings_of("blip_retrieval.py", 2)
    assert_loss(
        lambda model, features: (
            run(heading, self=model, alpha=ALPHA, idx=IDX, text=text, **embeds, **features).loss_ita
        ),
        formula,
    )


def test_pretraining():
    assert_loss(
        lambda model, features: run("Pretraining: one positive", self=model, alpha=ALPHA, **features).loss_ita,
        lambda model, features: sum(pair_losses(model, features, one_hot(model.temp.dtype), ALPHA)[:2]) / 2,
    )


def test_tcl():
    local = dict(loss_t2t_inMod_l=0.7, loss_i2i_inMod_l=0.9)

    def formula(model, features):
        return (sum(pair_losses(model, features, one_hot(model.temp.dtype), ALPHA)) + sum(local.values())) / 6

    assert_loss(
        lambda model, features: (
            run("TCL: within modalities as well", self=model, alpha=ALPHA, **local, **features).loss_ita
        ),
        formula,
    )


def test_egonce():
    verb, noun = torch.tensor([3, 3, 1, 3, 1, 0]), torch.tensor([5, 5, 5, 2, 5, 5])

    def block(model, features):
        embeds = dict(video_embeds=3 * features["image_feat"], text_embeds=2 * features["text_feat"])
        return run("EgoVLPv2: any positive", verb=verb, noun=noun, **embeds).loss + 0 * model.temp

    def formula(model, features):
        """Minus the log of the fraction of the softmax that the positives have, summed over the directions."""
        cosine = F.cosine_similarity(features["text_feat"][:, None], features["image_feat"][None], dim=-1)
        positive = (verb[:, None] == verb) & (noun[:, None] == noun)
        shares = [((x / 0.05).softmax(1) * positive).sum(1) for x in (cosine, cosine.T)]
        return -sum(share.log().mean() for share in shares) + 0 * model.temp

    assert_loss(block, formula)


def test_volta_pretraining():
    """Texts keep their own image or take another one, by the softmax of their similarity to the others."""
    torch.manual_seed(4)
    ret = {name: unit(ROWS).float().requires_grad_() for name in ("image_out", "text_out")}
    itm_labels = torch.tensor([1.0, 0, 1, 0, 0, 0])
    counts = torch.zeros(ROWS, ROWS)
    for _ in range(300):
        found = run("VoLTA, pretraining: hard negatives", ret=ret, itm_labels=itm_labels)
        counts[torch.arange(ROWS), found.false_idx] += 1
    logits = (ret["text_out"] @ ret["image_out"].T).detach() / 0.07
    expected = logits.fill_diagonal_(-torch.inf).softmax(1)
    expected[itm_labels == 1] = torch.eye(ROWS)[itm_labels == 1]
    assert (counts / 300 - expected).abs().max() < 0.12


def test_volta_fine_tuning():
    """On one rank; the sum over several is tested with the module."""
    atts = torch.arange(ROWS)[:, None].repeat(1, 3)
    gathered = dict(gathered_text_ids=[atts + 10], gathered_text_masks=[atts], gathered_image=[atts + 20])
    found = []

    def block(model, features):
        module = SimpleNamespace(contrast=FocalITCLoss(gamma=0.0, gather="with_grad"))
        pair = dict(image_features=features["image_feat"], text_features=features["text_feat"])
        heading = "VoLTA, fine-tuning: all ranks"
        found.append(run(heading, pl_module=module, logit_scale=1 / model.temp, **pair, **gathered))
        return found[-1].itc_loss

    def formula(model, features):
        logits = features["image_feat"] @ features["text_feat"].T / model.temp
        return -(logits.log_softmax(1).diag() + logits.log_softmax(0).diag()).mean() / 2

    assert_loss(block, formula)
    images, texts = found[0].images_neg[:, 0] - 20, found[0].text_masks_neg[:, 0]
    assert torch.equal(found[0].text_ids_neg, atts[texts] + 10)
    for negative in (images, texts):
        assert ((negative >= 0) & (negative < ROWS) & (negative != torch.arange(ROWS))).all()


# ---- Grad-CAM


class Attention(nn.Module):
    """Cross-attention with BERT's projections, in plain PyTorch; its probabilities stay for autograd."""

    def __init__(self, width, heads):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.num_attention_heads = heads

    def forward(self, hidden_states, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask=None):
        projected = self.query(hidden_states), self.key(encoder_hidden_states), self.value(encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for x in projected)
        logits = query @ key.mT / query.shape[-1] ** 0.5
        if encoder_attention_mask is not None:
            logits = logits + encoder_attention_mask
        self.probabilities = logits.softmax(-1)
        if self.probabilities.requires_grad:
            self.probabilities.retain_grad()
        return ((self.probabilities @ value).transpose(1, 2).flatten(2),)


class Layer(nn.Module):
    """Words mix (a mean over the attended ones), then attend to the image where the layer has cross-attention."""

    def __init__(self, width, heads, cross):
        super().__init__()
        self.mix = nn.Linear(width, width)
        if cross:
            setattr(self, cross, nn.Module())
            getattr(self, cross).self = Attention(width, heads)
        self.cross = cross

    def forward(self, words, mask, image, image_mask):
        mean = (words * mask[:, :, None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        words = words + torch.tanh(self.mix(words) + mean)
        if self.cross:
            words = words + getattr(self, self.cross).self(words, None, None, image, image_mask)[0]
        return words


class Encoder(nn.Module):
    def __init__(self, cross, first_cross, width=24, heads=3, depth=12):
        super().__init__()
        self.embeddings, self.encoder = nn.Embedding(40, width), nn.Module()
        layers = [Layer(width, heads, cross if number >= first_cross else None) for number in range(depth)]
        self.encoder.layer = nn.ModuleList(layers)

    @property
    def base_model(self):
        return self

    def forward(self, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask, return_dict=True):
        image_mask = -10000.0 * (1 - encoder_attention_mask[:, None, None].float())
        words = self.embeddings(input_ids)
        for layer in self.encoder.layer:
            words = layer(words, attention_mask, encoder_hidden_states, image_mask)
        return SimpleNamespace(last_hidden_state=words)


class Matching(nn.Module):
    """A stand-in for the models of the guide: their names, any weights."""

    def __init__(self, patches, cross="crossattention", first_cross=6, frames=1, width=24):
        super().__init__()
        self.text_encoder = self.text_model = Encoder(cross, first_cross, width)
        self.itm_head = nn.Linear(width, 2)
        self.num_frames = frames
        torch.manual_seed(5)
        self.words = SimpleNamespace(
            input_ids=torch.randint(1, 40, (2, 7)), attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
        )
        self.image = torch.randn(2, 1 + frames * patches, width)
        self.image_mask = torch.ones(2, 1 + frames * patches, dtype=torch.long)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def logits(self):
        output = self.text_encoder(self.words.input_ids, self.words.attention_mask, self.image, self.image_mask)
        return self.itm_head(output.last_hidden_state[:, 0])

    def forward(self, samples, match_head):
        assert samples == {"image": "pixels", "text_input": "words"} and match_head == "itm"
        return self.logits()

    def infer(self, data, task_names, ret):
        assert data == "data" and task_names == "ITM"
        return ret | {"cross_attn_itm_logits": self.logits()}

    def full_maps(self, attention):
        """(B, L, patches): mean over the heads of A * relu(dS/dA), from stored attention maps and a whole backward."""
        self.logits()[:, 1].sum().backward()
        probabilities = attention.probabilities
        return (probabilities * probabilities.grad.clamp(min=0)).mean(1).detach()[:, :, 1:]


def assert_maps(ours, formula):
    torch.testing.assert_close(ours, formula, rtol=1e-4, atol=1e-6 * formula.abs().max().item())
    assert formula.abs().max() > 0


def test_gradcam_of_albef():
    model = Matching(24 * 24).eval()
    found = run(
        "Grad-CAM of ALBEF and TCL", model=model, block_num=8, text_input=model.words, image_embeds=model.image,
        image_atts=model.image_mask,
    )  # fmt: skip
    maps = model.full_maps(found.attention) * model.words.attention_mask[:, :, None]
    assert_maps(found.gradcam, maps.mean(1).reshape(2, 24, 24))


def test_gradcam_of_lavis():
    model = Matching(24 * 24, first_cross=0).eval()
    found = run(
        "Grad-CAM of LAVIS and BLIP", model=model, block_num=8, visual_input="pixels", text_input="words",
        tokenized_text=model.words,
    )  # fmt: skip
    maps = model.full_maps(model.text_encoder.encoder.layer[8].crossattention.self)
    maps = (maps * model.words.attention_mask[:, :, None]).reshape(2, 7, 24, 24)
    for ours, image, words in zip(found.gradcam_list, maps, (5, 3), strict=True):
        assert_maps(ours, torch.cat([image[:1], image[1 : words + 1].sum(0, keepdim=True) / words, image[1:]]))


def test_gradcam_of_albef_in_lavis():
    """Whose models take samples alone, no `match_head`."""

    class Albef(Matching):
        def forward(self, samples):
            raise AssertionError("a training step")

    model = Albef(24 * 24).eval()
    heading, _ = headings_of("albef_retrieval", 3)
    found = run(
        heading, model=model, block_num=8, text_input=model.words, image_embeds=model.image, image_atts=model.image_mask
    )
    maps = model.full_maps(found.attention) * model.words.attention_mask[:, :, None]
    assert_maps(found.gradcam, maps.mean(1).reshape(2, 24, 24))


def test_gradcam_of_egovlpv2():
    model = Matching(9, "crossattention_t2i", frames=4).eval()
    found = run("Grad-CAM of EgoVLPv2", model=model, data="data")
    assert_maps(found.word_maps, model.full_maps(found.attention).reshape(2, 7, 4, 9))


class Volta(Matching):
    """Its text comes by another name, its head takes what `infer` leaves, its image has no [CLS]."""

    def __init__(self, patches):
        super().__init__(patches - 1, "crossattention_t2i")
        self.text_transformer, self.itm_score = self.text_encoder, self.itm_head

    def infer(self, batch):
        assert batch == "batch"
        output = self.text_encoder(self.words.input_ids, self.words.attention_mask, self.image, self.image_mask)
        return {"cls_feats": output.last_hidden_state[:, 0]}


def test_gradcam_of_volta():
    model = Volta(24 * 24).eval()
    found = run("Grad-CAM of VoLTA", model=model, batch="batch")
    model.logits()[:, 1].sum().backward()
    probabilities = found.attention.probabilities
    maps = (probabilities * probabilities.grad.clamp(min=0)).mean(1).detach()
    assert_maps(torch.stack(found.word_maps), maps.reshape(2, 7, 24, 24))
