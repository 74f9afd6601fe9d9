"""The pretraining step the way ALBEF runs it: the oracle of the fast step's numbers and the baseline of its speed.

It owns no weights: it runs a `VisionLanguageModel` (and its momentum copy) as they are, so that losses and gradients of
both steps can be compared parameter by parameter. What it does as ALBEF (Li et al., NeurIPS 2021) does:

- captions padded to the longest length allowed;
- fusion passes of their own for the true pairs, the negatives, the soft-masked pairs and MLM, each of which projects
  the keys and values of its images again, in every layer; MLM encodes its text again, in model and momentum copy;
- cross-attention as softmax of a full (S, H, L, N) map, which the Grad-CAM reads and differentiates in the graph of the
  positive pass, retained for the loss;
- soft-masked image features written out, then projected like any others;
- MLM logits at every position, the unmasked ones ignored by the loss;
- contrastive logits as one full matrix; hard negatives drawn row by row;
- the momentum copy updated parameter by parameter.

Three things are kinder than ALBEF: self-attention and the image encoder run on PyTorch's fused attention as in the fast
step, and the Grad-CAM asks autograd for the gradient of the map alone, not a whole backward pass. The Grad-CAM sees the
dropout of the positive pass; with dropout off both steps compute the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.types import Batch
from softmask_fast.model.fusion import FusionLayer
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.vision_language import VisionLanguageModel

IGNORED = -100  # label of a position whose word is not to be predicted


class ReferenceStep(nn.Module):
    """The objectives around a model; one process, no gathering over ranks."""

    def __init__(self, model: VisionLanguageModel, objectives: ObjectiveConfig, bf16: bool = False):
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.bf16 = bf16

    def forward(
        self,
        batch: Batch,
        teacher: MomentumTeacher,
        alpha: float,
        use_queue: bool = True,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and the losses it is the weighted sum of; the momentum features enter the queues.

        negatives: the other image of each text and the other text of each image, (B,) int64 each; None: drawn from the
        contrastive softmax, with torch's generator.
        """
        with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return self._losses(batch, teacher, alpha, use_queue, negatives)

    def _losses(self, batch: Batch, teacher: MomentumTeacher, alpha: float, use_queue: bool, negatives):
        model, taught, objectives = self.model, teacher.model, self.objectives
        longest = model.config.max_tokens
        mask = pad(batch.attention_mask, longest)
        masked_ids = pad(batch.masked_ids, longest)
        text_ids = masked_ids if objectives.masked_captions else pad(batch.input_ids, longest)

        images, image_features = model.encode_image(batch.pixels)
        texts, text_features = model.encode_text(text_ids, mask)
        with torch.no_grad():
            taught_images, taught_image_features = taught.encode_image(batch.pixels)
            _, taught_text_features = taught.encode_text(text_ids, mask)

        # contrast
        queued = slice(None) if use_queue else slice(0)
        image_keys = torch.cat([taught_image_features, teacher.contrast.image_queue[queued].to(taught_image_features)])
        text_keys = torch.cat([taught_text_features, teacher.contrast.text_queue[queued].to(taught_text_features)])
        positive = (batch.ids[:, None] == torch.cat([batch.ids, teacher.contrast.queue_ids[queued]])).float()
        target = positive / positive.sum(1, keepdim=True)
        image_logits = image_features @ text_keys.T / model.temperature
        text_logits = text_features @ image_keys.T / model.temperature
        with torch.no_grad():
            taught_image_logits = taught_image_features @ text_keys.T / model.temperature
            taught_text_logits = taught_text_features @ image_keys.T / model.temperature
        itc = (
            focal_cross_entropy(image_logits, taught_image_logits, target, alpha, objectives.focal_gamma)
            + focal_cross_entropy(text_logits, taught_text_logits, target, alpha, objectives.focal_gamma)
        ) / 2

        # match
        matched, maps = fuse(model, texts, mask, images)
        if negatives is None:
            negatives = draw(text_logits, positive), draw(image_logits, positive)
        other_image, other_text = negatives
        unmatched, _ = fuse(
            model,
            torch.cat([texts, texts[other_text]]),
            torch.cat([mask, mask[other_text]]),
            torch.cat([images[other_image], images]),
        )
        classified = [matched[:, 0], unmatched[:, 0]]
        if objectives.soft_mask and objectives.itm_weight:
            soft_masked = self.soft_mask(images, matched, maps[model.config.soft_mask_layer], batch.word_index)
            classified.append(fuse(model, texts, mask, soft_masked)[0][:, 0])
        logits = model.match_head(torch.cat(classified)).float()
        label = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
        label[len(texts) : 3 * len(texts)] = 0
        itm = F.cross_entropy(logits, label)

        # predict the masked words
        labels = torch.full_like(batch.masked_ids, IGNORED)
        labels.view(-1)[batch.mlm_positions] = batch.mlm_labels
        labels = pad(labels, longest, IGNORED)
        logits = predict_words(model, masked_ids, mask, images).float()
        with torch.no_grad():
            soft_target = predict_words(taught, masked_ids, mask, taught_images).float().softmax(-1)
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        soft = -(soft_target * logits.log_softmax(-1)).sum(-1)[labels != IGNORED].mean()
        mlm = (1 - alpha) * hard + alpha * soft

        teacher.contrast.enqueue(taught_image_features, taught_text_features, batch.ids)
        losses = {"itc": itc, "itm": itm, "mlm": mlm}
        losses = {name: loss for name, loss in losses.items() if getattr(objectives, f"{name}_weight")}
        total = sum(getattr(objectives, f"{name}_weight") * loss for name, loss in losses.items())
        return total, {name: loss.detach() for name, loss in losses.items()}

    def soft_mask(self, images: Tensor, matched: Tensor, attention: Tensor, word_index: Tensor) -> Tensor:
        """images (B, N, Cv) times one minus the Grad-CAM of a word: attention (B, H, L, N) times its positive gradient,
        the mean over heads, normalised over the patches."""
        score = self.model.matched_score(matched[:, 0]).sum()
        (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
        cam = (attention.detach() * gradient.clamp(min=0)).mean(1)
        cam = cam[torch.arange(len(cam), device=cam.device), word_index, self.model.prefix_tokens :]
        low, high = cam.amin(1, keepdim=True), cam.amax(1, keepdim=True)
        keep = 1 - (cam - low) / (high - low)
        prefix, patches = images[:, : self.model.prefix_tokens], images[:, self.model.prefix_tokens :]
        return torch.cat([prefix, patches * keep[..., None]], 1)


@torch.no_grad()
def update_teacher(teacher: MomentumTeacher, model: VisionLanguageModel) -> None:
    """The exponential moving average, parameter by parameter."""
    for average, weight in zip(teacher.model.parameters(), model.parameters(), strict=True):
        average.data = average.data * teacher.momentum + weight.data * (1 - teacher.momentum)


def pad(tokens: Tensor, length: int, value: float = 0) -> Tensor:
    """tokens (B, L) -> (B, length), the rest filled with `value`."""
    return F.pad(tokens, (0, length - tokens.shape[1]), value=value)


def focal_cross_entropy(logits: Tensor, taught: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Cross-entropy of rows with soft targets, each term weighted by (1 - p)^gamma; logits, taught, target (B, M)."""
    target = alpha * taught.softmax(1) + (1 - alpha) * target
    log_p = logits.log_softmax(1)
    return -(target * (1 - log_p.exp()) ** gamma * log_p).sum(1).mean()


def draw(logits: Tensor, positive: Tensor) -> Tensor:
    """One other pair of the batch for each row, in proportion to its softmax: (B, M) -> (B,) int64."""
    with torch.no_grad():
        rows = len(logits)
        weight = logits[:, :rows].float().softmax(1) + 1e-4
        weight.masked_fill_(positive[:, :rows] > 0, 0)
        return torch.tensor([torch.multinomial(row, 1).item() for row in weight], device=logits.device)


def fuse(model: VisionLanguageModel, texts: Tensor, mask: Tensor, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """texts (S, L, C), mask (S, L), images (S, N, Cv) -> fused tokens (S, L, C) and the attention maps by layer."""
    maps = []
    for layer in model.fusion.layers:
        texts, attention = fusion_layer(layer, texts, mask, images)
        maps.append(attention)
    return texts, maps


def fusion_layer(layer: FusionLayer, text: Tensor, mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    cross = layer.cross_attention
    text = layer.attention(text, mask[:, None, None, :])[0]
    query, key, value = (
        projected.unflatten(-1, (cross.heads, -1)).transpose(1, 2)
        for projected in (cross.query(text), cross.key(images), cross.value(images) + cross.value_bias.flatten())
    )
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    attended = (attention @ value).transpose(1, 2).flatten(2)
    text = layer.cross_output(attended, text)
    return layer.output(layer.intermediate(text), text), attention


def predict_words(model: VisionLanguageModel, masked_ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
    """The vocabulary's logits (B, L, V) at every position."""
    return model.language_head(fuse(model, model.text(masked_ids, mask), mask, images)[0])
