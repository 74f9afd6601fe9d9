"""A batch, a model and its teacher for one pretraining step."""

import torch

from softmask_fast.config import ObjectiveConfig
from softmask_fast.data.types import Batch
from softmask_fast.model.momentum import MomentumTeacher
from softmask_fast.model.vision_language import VisionLanguageModel
from softmask_fast.training.options import make_config

PAIRS, TOKENS, VOCABULARY, QUEUE = 6, 9, 40, 10
SIZES = dict(
    vocab_size=VOCABULARY, image_size=32, vision_width=64, vision_depth=2, vision_heads=2, text_width=64, text_heads=2,
    text_layers=1, vision_contrast_blocks=0, text_contrast_layers=0, fusion_layers=3, soft_mask_layer=1,
    embed_dim=32, hidden_dropout=0.0, max_tokens=12,
)  # fmt: skip


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 4, 7, 6, 9, 5])
    mask = torch.arange(TOKENS) < lengths[:, None]
    ids = torch.randint(5, VOCABULARY, (PAIRS, TOKENS), generator=generator) * mask
    positions = torch.arange(PAIRS) * TOKENS + torch.tensor([1, 2, 5, 3, 7, 1])
    masked = ids.clone()
    masked.view(-1)[positions] = 4
    return Batch(
        pixels=torch.randn(PAIRS, 3, 32, 32, generator=generator),
        input_ids=ids,
        masked_ids=masked,
        attention_mask=mask,
        mlm_positions=positions,
        mlm_labels=ids.view(-1)[positions],
        word_index=torch.tensor([2, 1, 3, 4, 1, 2]),
        ids=torch.tensor([7, 3, 9, 5, 2, 8]),
        keys=list("abcdef"),
    )


def make_model(gamma: float = 2.0, queue_size: int = QUEUE, **changes):
    torch.manual_seed(4)
    model = VisionLanguageModel(make_config("tiny", **SIZES | changes).model)
    with torch.no_grad():  # parameters that start at zero must not hide a term
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    torch.manual_seed(5)
    teacher = MomentumTeacher(
        VisionLanguageModel(model.config), ObjectiveConfig(queue_size=queue_size, momentum=0.9, focal_gamma=gamma)
    )
    if queue_size:
        teacher.queue.queue_ids[2] = 9  # an older picture of the batch's third image: one more positive
    return model, teacher
