"""One pretraining step, batch -> losses: the method of SoftMask++ (Park & Han, CVPR 2023).

Read `_losses` from top to bottom: encode, contrast (ITC), choose hard negatives, make the text-driven soft mask, fuse
all sequences in one batch, match (ITM), predict the masked words (MLM).
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
from softmask_fast.model.momentum import MomentumTeacher, StepSettings
from softmask_fast.model.packing import Packing
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.ops import FocalITCStats, word_soft_mask
from softmask_fast.ops.collectives import exchange, take_rows, world_size

MATCHED, NOT_MATCHED, NOT_SCORED = 1, 0, -100


@dataclass
class TeacherOutputs:
    """What the momentum copy says of a batch, without graph."""

    image_tokens: Tensor  # (B, N, Cv)
    text_tokens: Tensor  # (B, L, C), of the text that MLM sees
    image_features: Tensor  # (B, d) unit
    text_features: Tensor  # (B, d) unit, of the text that ITC sees


class PretrainingStep(nn.Module):
    """The objectives around a model; this is the module that DeepSpeed owns."""

    def __init__(self, model: VisionLanguageModel, objectives: ObjectiveConfig, bf16: bool = False):
        super().__init__()
        self.model = model
        self.objectives = objectives
        self.bf16 = bf16

    def forward(
        self, batch: Batch, teacher: MomentumTeacher, settings: StepSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its detached figures.

        Adds the batch's momentum features to the teacher's queues.
        """
        with torch.autocast(batch.pixels.device.type, torch.bfloat16, enabled=self.bf16):
            return self._losses(batch, teacher, settings.alpha, settings.seed, settings.use_queue)

    def _losses(self, batch: Batch, teacher: MomentumTeacher, alpha: float, seed: int, use_queue: bool):
        model, objectives = self.model, self.objectives
        if objectives.gathered_negatives:
            batch = _padded(batch, int(exchange([batch.input_ids.shape[1]]).max()))
        mask = batch.attention_mask
        text_ids = batch.masked_ids if objectives.masked_captions else batch.input_ids

        packing = Packing.of(mask, batch.token_count or 0, batch.token_count)

        image_tokens, image_features = model.encode_image(batch.pixels)
        text_tokens, text_features = model.encode_text(text_ids, mask, packing)
        taught = self._teach(batch, teacher, packing)

        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        itc, stats = self._contrast(batch, image_features, text_features, taught, teacher, alpha, seed, use_queue)
        if objectives.itc_weight:
            losses["itc"] = itc
            figures["itc_image_accuracy"], figures["itc_text_accuracy"] = stats.image_accuracy, stats.text_accuracy
        if not (objectives.itm_weight or objectives.mlm_weight):
            return self._total(losses, figures)

        pairs = torch.arange(len(mask), device=mask.device)
        images = image_tokens
        if objectives.itm_weight:
            # -1 where a row has no negative: the whole batch shows its image, or its probabilities are not finite
            negatives = {"other image": stats.text_hard_negative, "other text": stats.image_hard_negative}
            images, other_image, other_text, other_mask = self._others(negatives, image_tokens, text_tokens, mask)

        # Every sequence below looks at one of these images, whose keys and values are computed once.
        keys_values = model.fusion.keys_values(images)
        sequences = _Sequences(image_tokens.shape[1], batch.token_count)
        sequences.add("matched", text_tokens, mask, pairs)
        if objectives.itm_weight:
            sequences.add("other image", text_tokens, mask, other_image)
            sequences.add("other text", other_text, other_mask, pairs, same_texts=False)
            if objectives.soft_mask:
                keep = self._soft_mask(batch, text_tokens, keys_values, packing)
                sequences.add("soft-masked", text_tokens, mask, pairs, keep)
                figures["soft_mask_mean"] = 1 - keep[:, model.prefix_tokens :].mean()
        language_rows = "matched"
        if objectives.mlm_weight and not objectives.masked_captions:
            language_rows = "masked words"
            sequences.add(language_rows, model.encode_text(batch.masked_ids, mask, packing)[0], mask, pairs)

        # Of the fused sequences [CLS] is read to match, and the masked words to predict them.
        scored = ["matched", "other image", "other text"] + ["soft-masked"] * objectives.soft_mask
        scored *= bool(objectives.itm_weight)
        first_tokens = [sequences.places(name, pairs * mask.shape[1]) for name in scored]
        masked_words = [sequences.places(language_rows, batch.mlm_positions)] * bool(objectives.mlm_weight)
        fused = self._fuse(sequences, keys_values, first_tokens + masked_words)
        if objectives.itm_weight:
            logits = model.match_head(torch.cat(fused[: len(scored)]))
            matched = torch.full_like(pairs, MATCHED)
            target = torch.cat(
                [
                    torch.where(negatives[name] < 0, NOT_SCORED, NOT_MATCHED) if name in negatives else matched
                    for name in scored
                ]
            )
            losses["itm"] = F.cross_entropy(logits.float(), target, ignore_index=NOT_SCORED)
            figures["itm_accuracy"] = (logits.argmax(-1) == target).float().sum() / (target != NOT_SCORED).sum()
        if objectives.mlm_weight:
            losses["mlm"], figures["mlm_accuracy"] = self._predict_words(
                batch, fused[-1], taught, teacher, alpha, packing
            )

        return self._total(losses, figures)

    def _total(self, losses: dict[str, Tensor], figures: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sum(getattr(self.objectives, f"{name}_weight") * value for name, value in losses.items())
        figures |= {"loss": loss, **losses, "temperature": self.model.temperature}
        return loss, {name: value.detach().float() for name, value in figures.items()}

    @torch.no_grad()
    def _teach(self, batch: Batch, teacher: MomentumTeacher, packing: Packing) -> TeacherOutputs:
        mask = batch.attention_mask
        image_tokens, image_features = teacher.model.encode_image(batch.pixels)
        text_tokens, text_features = teacher.model.encode_text(batch.masked_ids, mask, packing)
        if not self.objectives.masked_captions:
            _, text_features = teacher.model.encode_text(batch.input_ids, mask, packing)
        return TeacherOutputs(image_tokens, text_tokens, image_features, text_features)

    def _contrast(
        self, batch, image_features, text_features, taught: TeacherOutputs, teacher, alpha, seed, use_queue
    ) -> tuple[Tensor, FocalITCStats]:
        """Focal ITC against the batches of all ranks and the queues, and a negative of each row."""
        itc, stats = teacher.contrast(
            image_features,
            text_features,
            temperature=self.model.temperature,
            teacher_image=taught.image_features,
            teacher_text=taught.text_features,
            alpha=alpha,
            ids=batch.ids,
            use_queue=use_queue,
            return_stats=True,
            negatives="batch" if self.objectives.gathered_negatives else "rank",
            seed=seed,
        )
        if not self.objectives.hard_negatives:
            generator = torch.Generator(batch.ids.device).manual_seed(seed)
            image, text = (_any_other(batch.ids, generator) for _ in range(2))
            stats = stats._replace(image_hard_negative=image, text_hard_negative=text)
        return itc, stats

    def _others(
        self, negatives: dict[str, Tensor], image_tokens: Tensor, text_tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The images to look at, which of them is each text's negative, and each image's negative text with its mask.

        Those of other ranks are fetched from there, and their gradients go back.
        """
        if self.objectives.gathered_negatives and world_size() > 1:
            other_image, other_text = (column.clamp(min=0) for column in negatives.values())
            images = torch.cat([image_tokens, take_rows(image_tokens, other_image)])
            place = torch.arange(len(mask), len(images), device=mask.device)
            return images, place, take_rows(text_tokens, other_text), take_rows(mask.byte(), other_text).bool()
        offset = _row_offset(len(mask))
        other_image, other_text = ((column - offset).clamp(min=0) for column in negatives.values())
        return image_tokens, other_image, text_tokens[other_text], mask[other_text]

    @torch.no_grad()
    def _soft_mask(self, batch: Batch, text_tokens: Tensor, keys_values: list[KeyValue], packing: Packing) -> Tensor:
        """What the masked image keeps (B, N): one minus the word's normalised Grad-CAM over the patches."""
        layer = self.model.config.soft_mask_layer
        keys_values = [(key[: len(text_tokens)], value[: len(text_tokens)]) for key, value in keys_values]
        query, key, value, gradient = self.model.relevance_inputs(
            text_tokens, batch.attention_mask, keys_values, layer, packing
        )
        return word_soft_mask(query, key, value, gradient, batch.word_index, prefix_tokens=self.model.prefix_tokens)

    def _fuse(self, sequences: _Sequences, keys_values: list[KeyValue], places: list[Tensor]) -> list[Tensor]:
        """The fused tokens at each of the places, (R, C) for places (R,)."""
        text, mask, image_index, keep = sequences.joined()
        packing = Packing.of(mask, *sequences.token_bounds)
        fused = self.model.fusion(text, mask, keys_values, image_index, keep, torch.cat(places), packing)
        return list(fused.split([len(part) for part in places]))

    def _predict_words(
        self,
        batch: Batch,
        hidden: Tensor,
        taught: TeacherOutputs,
        teacher: MomentumTeacher,
        alpha: float,
        packing: Packing,
    ) -> tuple[Tensor, Tensor]:
        """MLM at the masked positions alone, hidden (P, C), with the teacher's predictions as soft targets."""
        logits = self.model.language_head(hidden).float()
        loss = F.cross_entropy(logits, batch.mlm_labels)
        accuracy = (logits.argmax(-1) == batch.mlm_labels).float().mean()
        if alpha > 0:
            with torch.no_grad():
                keys_values = teacher.model.fusion.keys_values(taught.image_tokens)
                taught_hidden = teacher.model.fusion(
                    taught.text_tokens, batch.attention_mask, keys_values, places=batch.mlm_positions, packing=packing
                )
                soft_target = teacher.model.language_head(taught_hidden).float().softmax(-1)
            loss = (1 - alpha) * loss + alpha * F.cross_entropy(logits, soft_target)
        return loss, accuracy


class _Sequences:
    """The text sequences of a step, joined into one batch for the fusion encoder."""

    def __init__(self, image_tokens: int, token_count: int | None):
        """token_count: of the batch's captions, where the host knows it."""
        self.image_tokens, self.token_count = image_tokens, token_count
        self.token_bounds = (0, 0)  # fewest and most tokens of all sequences
        self.rows: dict[str, slice] = {}  # of each kind in the joined batch
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self.count = 0

    def add(
        self,
        name: str,
        text: Tensor,
        mask: Tensor,
        image_index: Tensor,
        keep: Tensor | None = None,
        same_texts: bool = True,
    ) -> None:
        """text (S, L, C), mask (S, L) bool, image_index (S,), keep (S, N) or None for an unmasked image; same_texts:
        whether they are the batch's captions, each once."""
        self.rows[name] = slice(self.count, self.count + len(text))
        self.count += len(text)
        self.parts.append((text, mask, image_index, keep))
        known = self.token_count if same_texts else None
        fewest, most = self.token_bounds
        self.token_bounds = fewest + (known or 0), most + (mask.numel() if known is None else known)

    def places(self, name: str, positions: Tensor) -> Tensor:
        """Positions in the (S * L) tokens of one kind -> in those of the joined batch."""
        return positions + self.rows[name].start * self.parts[0][1].shape[1]

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """text, mask, image_index and keep of all sequences."""
        text, mask, image_index = (torch.cat([part[i] for part in self.parts]) for i in range(3))
        keep = None
        if any(part[3] is not None for part in self.parts):
            keep = text.new_ones(self.count, self.image_tokens, dtype=torch.float32)
            for rows, part in zip(self.rows.values(), self.parts, strict=True):
                if part[3] is not None:
                    keep[rows] = part[3]
        return text, mask, image_index, keep


def _padded(batch: Batch, length: int) -> Batch:
    """The batch with captions padded to that length."""
    present = batch.input_ids.shape[1]
    texts = {name: getattr(batch, name) for name in ("input_ids", "masked_ids", "attention_mask")}
    positions = batch.mlm_positions + batch.mlm_positions // present * (length - present)
    return replace(batch, mlm_positions=positions, **{n: F.pad(x, (0, length - present)) for n, x in texts.items()})


def _any_other(ids: Tensor, generator: torch.Generator) -> Tensor:
    """ids (B,) of images -> (B,) the number, among the gathered rows, of one of this rank's rows with another id, each
    as likely; -1 where there is none."""
    others = (ids[:, None] != ids).float()
    found = others.any(dim=1)
    drawn = torch.multinomial(torch.where(found[:, None], others, 1.0), 1, generator=generator)[:, 0]
    return torch.where(found, drawn + _row_offset(len(ids)), -1)


def _row_offset(rows: int) -> int:
    """Where this rank's rows begin among the gathered ones."""
    return dist.get_rank() * rows if dist.is_initialized() else 0
