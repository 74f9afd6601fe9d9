"""Cross-attention the plain way, to compare with: keys gathered and masked, full attention maps kept for autograd."""

import torch
from torch.nn.utils.rnn import pad_sequence


def plain_attention(maps: dict):
    """A CrossAttention.forward with full attention maps (S, H, L, N), kept by layer for autograd."""

    def forward(self, query, key_value, image_index, keep):
        key, value = key_value
        packed = query.dim() == 3
        if packed:
            lengths, image_index = image_index.boundaries.diff().tolist(), image_index.image_index
            query = pad_sequence(query.split(lengths), batch_first=True).transpose(1, 2)
        if image_index is not None:
            key, value = key[image_index], value[image_index]
        if keep is not None:
            key, value = key * keep[:, None, :, None], value * keep[:, None, :, None]
        attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        maps[self] = attention
        output = attention @ (value + self.value_bias[:, None])
        if not packed:
            return output
        return torch.cat([rows[:, :length].transpose(0, 1) for rows, length in zip(output, lengths, strict=True)])

    return forward
