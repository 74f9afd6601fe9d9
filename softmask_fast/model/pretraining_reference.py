"""The definition of the pretraining step, in plain PyTorch as ALBEF (Li et al., NeurIPS 2021) runs it.

It is to `pretraining.py` what each operator's `reference.py` is to its kernels: the oracle of the numbers and the
baseline of the speed. It owns no weights but runs a `VisionLanguageModel` and its momentum copy, so that losses and
gradients of both steps can be compared parameter by parameter. As in ALBEF:

- Captions are padded to the longest length allowed.
- The true pairs, the negatives, the soft-masked pairs and MLM have a fusion pass each, which projects the keys and
  values of its images again in every layer. MLM encodes its text again, in model and momentum copy.
- Cross-attention is the softmax of a full (S, H, L, N) map. The Grad-CAM reads it and differentiates it in the graph of
  the positive pass, which is retained for the loss.
- Soft-masked image features are written out, then projected like any others.
- MLM computes logits at every position, and the loss ignores the unmasked ones.
- Contrastive logits are one full matrix; hard negatives are drawn row by row.
- The momentum copy is updated parameter by parameter.

Two things are faster than in ALBEF: self-attention and the image encoder use PyTorch's fused attention as in the fast
step, and the Grad-CAM asks autograd for the gradient of the map only, not for a whole backward pass. The Grad-CAM sees
the dropout of the positive pass; without dropout both steps compute the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.types import Batch
from softmask_fast.model.fusion import FusionLayer
from softmask_fast.model.momentum import MomentumTeacher, StepSettings
from softmask_fast.model.vision_language import VisionLanguageModel

IGNORED = -100  # label of positions without a word to predict


class ReferenceStep(nn.Module):
    """The objectives around a model, for one process. The arguments are those of `PretrainingStep`."""

    def __init__(self, model: VisionLanguageModel, objectives: ObjectiveConfig, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.bf16 = bf16

    def forward(
        self,
        batch: Batch,
        teacher: MomentumTeacher,
        settings: StepSettings,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch. The momentum features enter the queue.

        Args:
            batch: as for `PretrainingStep`, like the next two.
            teacher: the momentum copy and its queue.
            settings: of the step.
            negatives: the other image of each text and the other text of each image, (B,) int64 each; None: drawn from
                the contrastive softmax, with torch's generator.

        Returns:
            The loss, and the detached losses "itc", "itm" and "mlm" that it is the weighted sum of.
        """
        with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return self._losses(batch, teacher, settings, negatives)

    def _losses(
        self, batch: Batch, teacher: MomentumTeacher, settings: StepSettings, negatives: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model, objectives, alpha = self.model, self.objectives, settings.alpha
        longest = model.config.max_tokens
        mask = pad(batch.attention_mask, longest)
        masked_ids = pad(batch.masked_ids, longest)
        text_ids = masked_ids if objectives.masked_captions else pad(batch.input_ids, longest)

        images, image_features = model.encode_image(batch.pixels)
        texts, text_features = model.encode_text(text_ids, mask)
        with torch.no_grad():
            teacher_images, teacher_image_features = teacher.model.encode_image(batch.pixels)
            _, teacher_text_features = teacher.model.encode_text(text_ids, mask)

        # contrast
        image_keys, text_keys, key_ids = teacher_image_features, teacher_text_features, batch.ids
        if settings.use_queue:
            queued = teacher.queue.keys(image_keys)
            image_keys, text_keys = torch.cat([image_keys, queued.image]), torch.cat([text_keys, queued.text])
            key_ids = torch.cat([key_ids, queued.ids])
        positive = (batch.ids[:, None] == key_ids).float()
        target = positive / positive.sum(1, keepdim=True)
        image_logits = image_features @ text_keys.T / model.temperature
        text_logits = text_features @ image_keys.T / model.temperature
        with torch.no_grad():
            teacher_image_logits = teacher_image_features @ text_keys.T / model.temperature
            teacher_text_logits = teacher_text_features @ image_keys.T / model.temperature
        itc = (
            focal_cross_entropy(image_logits, teacher_image_logits, target, alpha, objectives.focal_gamma)
            + focal_cross_entropy(text_logits, teacher_text_logits, target, alpha, objectives.focal_gamma)
        ) / 2

        # match
        matched, maps = fuse(model, texts, mask, images)
        if negatives is None:
            negatives = draw(text_logits, positive), draw(image_logits, positive)
        other_image, other_text = negatives
        soft_masked, seen = None, images  # by the wrong texts
        if objectives.soft_mask and objectives.itm_weight:
            soft_masked = self.soft_mask(images, matched, maps[model.config.soft_mask_layer], batch.word_index)
            seen = soft_masked if objectives.soft_masked_negatives else images
        unmatched, _ = fuse(
            model,
            torch.cat([texts, texts[other_text]]),
            torch.cat([mask, mask[other_text]]),
            torch.cat([images[other_image], seen]),
        )
        classified = [matched[:, 0], unmatched[:, 0]]
        if soft_masked is not None:
            classified.append(fuse(model, texts, mask, soft_masked)[0][:, 0])
        logits = model.match_head(torch.cat(classified)).float()
        label = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
        label[len(texts) : 3 * len(texts)] = 0
        itm = F.cross_entropy(logits, label)

        # predict the masked tokens
        labels = torch.full_like(batch.masked_ids, IGNORED)
        labels.view(-1)[batch.mlm_positions] = batch.mlm_labels
        labels = pad(labels, longest, IGNORED)
        logits = predict_words(model, masked_ids, mask, images).float()
        with torch.no_grad():
            soft_target = predict_words(teacher.model, masked_ids, mask, teacher_images).float().softmax(-1)
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        soft = -(soft_target * logits.log_softmax(-1)).sum(-1)[labels != IGNORED].mean()
        mlm = (1 - alpha) * hard + alpha * soft

        teacher.queue.enqueue(teacher_image_features, teacher_text_features, batch.ids)
        losses = {"itc": itc, "itm": itm, "mlm": mlm}
        losses = {name: loss for name, loss in losses.items() if getattr(objectives, f"{name}_weight")}
        total = sum(getattr(objectives, f"{name}_weight") * loss for name, loss in losses.items())
        return total, {name: loss.detach() for name, loss in losses.items()}

    def soft_mask(self, images: Tensor, matched: Tensor, attention: Tensor, word_index: Tensor) -> Tensor:
        """images (B, N, Cv) times 1 minus the Grad-CAM of a word: attention (B, H, L, N) times its positive gradient,
        averaged over heads, normalized over the patches."""
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


def focal_cross_entropy(logits: Tensor, teacher_logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Cross-entropy of rows with soft targets, each term weighted by (1 - p)^gamma; all tensors (B, M)."""
    target = alpha * teacher_logits.softmax(1) + (1 - alpha) * target
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
    """One layer of `fuse`: fused tokens (S, L, C) and the attention map (S, H, L, N)."""
    cross = layer.cross_attention
    text = layer.attention(text, mask[:, None, None, :])[0]
    query, key, value = (
        projected.unflatten(-1, (cross.heads, -1)).transpose(1, 2)
        for projected in (cross.query(text), cross.key(images), cross.value(images) + cross.value_bias.flatten())
    )
    attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    attended = (attention @ value).transpose(1, 2).flatten(2)
    if layer.words_alone:
        words = F.pad(mask, (1, 0))[:, :-1] & F.pad(mask, (0, 1))[:, 1:]  # neither [CLS] nor [SEP]
        attended = attended * words[..., None]
    text = layer.cross_output(attended, text)
    return layer.output(layer.intermediate(text), text), attention


def predict_words(model: VisionLanguageModel, masked_ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
    """Logits over the vocabulary (B, L, V) at every position."""
    return model.language_head(fuse(model, model.text(masked_ids, mask), mask, images)[0])
