"""One pretraining step, batch -> losses: the method of SoftMask++ (Park & Han, CVPR 2023).

Read `PretrainingStep._losses` from top to bottom: encode, contrast (ITC), choose hard negatives, make the text-driven
soft mask, fuse all sequences in one batch, match (ITM), predict the masked tokens (MLM). `pretraining_reference.py` is
the same step in plain PyTorch, the oracle of this one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.types import Batch
from softmask_fast.model.fusion import KeyValue
from softmask_fast.model.layers import word_losses, word_probabilities
from softmask_fast.model.momentum import MomentumTeacher, StepSettings, distills
from softmask_fast.model.packing import Packing
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.ops import FocalITCLoss, FocalITCStats, word_soft_mask
from softmask_fast.ops.collectives import exchange, index_rows, take_rows, world_size

MATCHED, NOT_MATCHED, NOT_SCORED = 1, 0, -100  # labels of ITM; the last one also of MLM


@dataclass
class TeacherOutputs:
    """The teacher's outputs for a batch, without a graph."""

    image_features: Tensor  # (B, d) unit
    text_features: Tensor  # (B, d) unit
    words: Tensor | None  # (P, V) probabilities of the masked tokens; None: no soft targets for MLM


@dataclass
class Sequences:
    """S texts for the fusion encoder, each with the image that it attends to, and what is read of the result.

    All parts of a step have the same S.
    """

    kind: str  # of pair, as metrics name it
    text: Tensor  # (S, L, C)
    mask: Tensor  # (S, L) bool, True = token
    image_index: Tensor  # (S,) int64
    keep: Tensor | None = None  # (S, N) soft mask of the image; None: whole images
    target: Tensor | None = None  # (S,) int64 label that [CLS] is matched against; None: no ITM
    words: Tensor | None = None  # (P,) int64 positions, among the S * L tokens, of words to predict; None: no MLM
    token_bounds: tuple[int, int] | None = None  # of the number of tokens in `mask`, if the host knows any


class PretrainingStep(nn.Module):
    """The objectives around a model, under bfloat16 autocast with `bf16`; this is the module that DeepSpeed owns."""

    def __init__(self, model: VisionLanguageModel, objectives: ObjectiveConfig, bf16: bool = False) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.bf16 = bf16
        self.itc = FocalITCLoss(gamma=objectives.focal_gamma, gather=objectives.itc_gather)

    def forward(
        self, batch: Batch, teacher: MomentumTeacher, settings: StepSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this rank's batch. In training mode the teacher's features enter its queue. A collective.

        Returns:
            The loss and the detached metrics, all float32 scalars: "loss"; "itc", "itm" and "mlm" if they have a
            weight; "temperature"; "itc_image_accuracy", "itc_text_accuracy", "itm_accuracy" and "mlm_accuracy", from 0
            to 1; "itm_<kind>" and "itm_<kind>_accuracy", those of one kind of pair ("true_pair", "other_image",
            "other_text" or "soft_masked_other_text", "soft_masked"), NaN without such pairs; "soft_mask_mean", the
            fraction of the patches that the soft masks remove.
        """
        with (
            torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.bf16),
            self.model.holding_weights(self._dtype),
        ):
            return self._losses(batch, teacher, settings)

    @property
    def _dtype(self) -> torch.dtype | None:
        """Of the held weights; None: that of the parameters."""
        return torch.bfloat16 if self.bf16 else None

    def _losses(
        self, batch: Batch, teacher: MomentumTeacher, settings: StepSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        model, objectives = self.model, self.objectives
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if objectives.gathered_negatives:
            batch = _padded(batch, int(exchange([batch.input_ids.shape[1]]).max()))
        mask, bounds = batch.attention_mask, batch.token_bounds
        packing = Packing.of(mask, *bounds)

        # Encode
        text_ids = batch.masked_ids if objectives.masked_captions else batch.input_ids
        image_tokens, image_features = model.encode_image(batch.pixels)
        text_tokens, text_features = model.encode_text(text_ids, mask, packing)
        teacher_out = self._encode_with_teacher(batch, teacher, packing, settings.alpha)

        # Contrast
        itc, stats = self._contrast(batch, image_features, text_features, teacher_out, teacher, settings)
        if objectives.itc_weight:
            losses["itc"] = itc
            metrics["itc_image_accuracy"], metrics["itc_text_accuracy"] = stats.image_accuracy, stats.text_accuracy
        if not (objectives.itm_weight or objectives.mlm_weight):
            return self._total(losses, metrics)

        # Collect the sequences. All attend to one of the images, whose keys and values are computed once.
        pairs = torch.arange(len(mask), device=mask.device)
        matched = torch.full_like(pairs, MATCHED) if objectives.itm_weight else None
        true_pairs = Sequences("true_pair", text_tokens, mask, pairs, target=matched, token_bounds=bounds)
        sequences, images = [true_pairs], image_tokens
        if objectives.itm_weight:
            images, wrong_image, wrong_text = self._negatives(stats, image_tokens, true_pairs)
            sequences += [wrong_image, wrong_text]
        keys_values = model.fusion.keys_values(images)
        if objectives.itm_weight and objectives.soft_mask:
            keep = self._soft_mask(batch, text_tokens, keys_values, packing)
            sequences.append(replace(true_pairs, kind="soft_masked", keep=keep))
            if objectives.soft_masked_negatives:
                wrong_text.kind, wrong_text.keep = "soft_masked_other_text", keep
            metrics["soft_mask_mean"] = 1 - keep[:, model.prefix_tokens :].mean()
        if objectives.mlm_weight and objectives.masked_captions:
            true_pairs.words = batch.mlm_positions
        elif objectives.mlm_weight:
            text, _ = model.encode_text(batch.masked_ids, mask, packing)
            positions = batch.mlm_positions
            sequences.append(Sequences("masked_caption", text, mask, pairs, words=positions, token_bounds=bounds))

        # Fuse, match, predict the masked tokens
        first_tokens, masked_words = self._fuse(sequences, keys_values)
        if objectives.itm_weight:
            losses["itm"], by_kind = self._match(sequences, first_tokens)
            metrics |= by_kind
        if objectives.mlm_weight:
            losses["mlm"], metrics["mlm_accuracy"] = self._predict_words(
                masked_words, batch.mlm_labels, teacher_out, settings.alpha
            )
        return self._total(losses, metrics)

    def _total(self, losses: dict[str, Tensor], metrics: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sum(getattr(self.objectives, f"{name}_weight") * value for name, value in losses.items())
        metrics |= {"loss": loss, **losses, "temperature": self.model.temperature}
        return loss, {name: value.detach().float() for name, value in metrics.items()}

    @torch.no_grad()
    def _encode_with_teacher(
        self, batch: Batch, teacher: MomentumTeacher, packing: Packing, alpha: float | Tensor
    ) -> TeacherOutputs:
        with teacher.model.holding_weights(self._dtype):
            return self._teacher_outputs(batch, teacher.model, packing, alpha)

    def _teacher_outputs(
        self, batch: Batch, model: VisionLanguageModel, packing: Packing, alpha: float | Tensor
    ) -> TeacherOutputs:
        mask, positions = batch.attention_mask, batch.mlm_positions
        image_tokens, image_features = model.encode_image(batch.pixels)
        masked_tokens, text_features = model.encode_text(batch.masked_ids, mask, packing)
        if not self.objectives.masked_captions:
            _, text_features = model.encode_text(batch.input_ids, mask, packing)
        words = None
        if distills(alpha) and self.objectives.mlm_weight:
            keys_values = model.fusion.keys_values(image_tokens)
            hidden = model.fusion(masked_tokens, mask, keys_values, positions=positions, packing=packing)
            words = model.language_head(hidden, function=word_probabilities)
        return TeacherOutputs(image_features, text_features, words)

    def _contrast(
        self, batch: Batch, image_features: Tensor, text_features: Tensor, teacher_out: TeacherOutputs,
        teacher: MomentumTeacher, settings: StepSettings,
    ) -> tuple[Tensor, FocalITCStats]:  # fmt: skip
        """Focal ITC against the batches of all ranks and the queue, and a negative for each row."""
        features = (image_features, text_features, teacher_out.image_features, teacher_out.text_features)
        if self.bf16:  # as autocast casts the inputs of a product; sums and statistics stay float32
            features = tuple(feature.bfloat16() for feature in features)
        itc, stats, newest = self.itc(
            *features[:2],
            temperature=self.model.temperature,
            teacher_image=features[2],
            teacher_text=features[3],
            alpha=settings.alpha,
            ids=batch.ids,
            queue=teacher.queue,
            use_queue=settings.use_queue,
            return_stats=True,
            negatives="batch" if self.objectives.gathered_negatives else "rank",
            seed=settings.seed,
        )
        if newest is not None:
            teacher.queue.enqueue(*newest)
        if not (self.objectives.hard_negatives and settings.hard_negatives):
            generator = torch.Generator(batch.ids.device).manual_seed(settings.seed)
            image, text = (draw_any_other(batch.ids, generator) for _ in range(2))
            stats = stats._replace(image_hard_negative=image, text_hard_negative=text)
        return itc, stats

    def _negatives(
        self, stats: FocalITCStats, image_tokens: Tensor, pairs: Sequences
    ) -> tuple[Tensor, Sequences, Sequences]:
        """All images to attend to (B or 2 B, N, Cv), the texts with their negative images, the images with their
        negative texts. What other ranks own is fetched from there, and its gradient sent back."""
        # -1 for a row without a negative: the whole batch shows its image, or its probabilities are not finite
        chosen = stats.text_hard_negative, stats.image_hard_negative
        image_target, text_target = (torch.where(rows < 0, NOT_SCORED, NOT_MATCHED) for rows in chosen)
        text, mask = pairs.text, pairs.mask
        if self.objectives.gathered_negatives and world_size() > 1:
            other_image, other_text = (rows.clamp(min=0) for rows in chosen)
            images = torch.cat([image_tokens, take_rows(image_tokens, other_image)])
            other_image = torch.arange(len(mask), len(images), device=mask.device)
            text, mask = take_rows(text, other_text), take_rows(mask.byte(), other_text).bool()
        else:
            other_image, other_text = ((rows - _first_row(len(mask))).clamp(min=0) for rows in chosen)
            images, text, mask = image_tokens, index_rows(text, other_text), mask[other_text]
        wrong_image = replace(pairs, kind="other_image", image_index=other_image, target=image_target)
        return images, wrong_image, Sequences("other_text", text, mask, pairs.image_index, target=text_target)

    @torch.no_grad()
    def _soft_mask(self, batch: Batch, text_tokens: Tensor, keys_values: list[KeyValue], packing: Packing) -> Tensor:
        """What is kept of each image token (B, N): 1 minus the word's Grad-CAM, normalized over the patches."""
        layer = self.model.config.soft_mask_layer
        keys_values = [(key[: len(text_tokens)], value[: len(text_tokens)]) for key, value in keys_values]
        query, key, value, gradient = self.model.relevance_inputs(
            text_tokens, batch.attention_mask, keys_values, layer, packing
        )
        return word_soft_mask(query, key, value, gradient, batch.word_index, prefix_tokens=self.model.prefix_tokens)

    def _fuse(self, sequences: list[Sequences], keys_values: list[KeyValue]) -> tuple[Tensor, Tensor]:
        """All sequences through the fusion encoder in one batch.

        Returns fused [CLS] tokens of those with a target (M, C), and fused words (P, C).
        """
        text, mask, image_index = (
            torch.cat([getattr(part, name) for part in sequences]) for name in ("text", "mask", "image_index")
        )
        keep = None
        if any(part.keep is not None for part in sequences):
            keep = text.new_ones(len(text), keys_values[0][0].shape[2], dtype=torch.float32)
        first_tokens, words = [], []  # positions among the tokens of all sequences
        fewest_tokens = most_tokens = start = 0
        for part in sequences:
            rows, length = part.mask.shape
            if part.keep is not None:
                keep[start : start + rows] = part.keep
            if part.target is not None:
                first_tokens.append(torch.arange(start, start + rows, device=mask.device) * length)
            if part.words is not None:
                words.append(start * length + part.words)
            fewest, most = part.token_bounds or (0, part.mask.numel())
            fewest_tokens += fewest
            most_tokens += most
            start += rows
        packing = Packing.of(mask, fewest_tokens, most_tokens)
        positions = torch.cat(first_tokens + words)
        fused = self.model.fusion(text, mask, keys_values, image_index, keep, positions, packing)
        return fused.split([sum(map(len, first_tokens)), sum(map(len, words))])

    def _match(self, sequences: list[Sequences], first_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ITM of the fused [CLS] tokens (M, C): the loss, and the metrics of all pairs and of each kind."""
        logits = self.model.match_head(first_tokens)
        scored = [part for part in sequences if part.target is not None]
        target = torch.cat([part.target for part in scored])
        log_p = logits.float().log_softmax(-1)
        loss = F.nll_loss(log_p, target, ignore_index=NOT_SCORED)
        each = F.nll_loss(log_p.detach(), target, ignore_index=NOT_SCORED, reduction="none")
        rows = torch.stack([each, logits.argmax(-1) == target, target != NOT_SCORED])  # (3, M) float32
        sums = rows.unflatten(1, (len(scored), -1)).sum(-1)  # (3, kinds)
        _, right, count = sums.sum(1).unbind()
        names = [f"itm_{part.kind}{what}" for what in ("", "_accuracy") for part in scored]
        by_kind = dict(zip(names, (sums[:2] / sums[2]).flatten().unbind(), strict=True))
        return loss, {"itm_accuracy": right / count} | by_kind

    def _predict_words(
        self, masked_words: Tensor, labels: Tensor, teacher_out: TeacherOutputs, alpha: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """MLM of the fused masked tokens (P, C), with the teacher's predictions as soft targets: loss and accuracy.

        Words with the label NOT_SCORED, which fill a batch up to a fixed number, do not count.
        """
        loss, soft_loss, accuracy = self.model.language_head(
            masked_words, labels, teacher_out.words, function=word_losses
        )
        if teacher_out.words is not None:
            loss = (1 - alpha) * loss + alpha * soft_loss
        return loss, accuracy


def draw_any_other(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Image ids (B,) int64 -> for each row one of this rank's rows with another id, each equally likely, as its number
    in the joined batch of all ranks (B,) int64; -1 if all ids are equal."""
    others = (ids[:, None] != ids).float()
    found = others.any(dim=1)
    drawn = torch.multinomial(torch.where(found[:, None], others, 1.0), 1, generator=generator)[:, 0]
    return torch.where(found, drawn + _first_row(len(ids)), -1)


def _padded(batch: Batch, length: int) -> Batch:
    """The batch with captions padded to that length."""
    present = batch.input_ids.shape[1]
    texts = {name: getattr(batch, name) for name in ("input_ids", "masked_ids", "attention_mask")}
    positions = batch.mlm_positions + batch.mlm_positions // present * (length - present)
    return replace(batch, mlm_positions=positions, **{n: F.pad(x, (0, length - present)) for n, x in texts.items()})


def _first_row(rows: int) -> int:
    """The number in the joined batch of this rank's first row."""
    return dist.get_rank() * rows if dist.is_initialized() else 0
