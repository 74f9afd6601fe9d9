"""Cross-attention the plain way, to compare with: keys gathered and masked, full attention maps kept for autograd."""


def plain_attention(maps: dict):
    """A CrossAttention.forward with full attention maps, kept by layer for autograd."""

    def forward(self, query, key_value, image_index, keep):
        key, value = key_value
        if image_index is not None:
            key, value = key[image_index], value[image_index]
        if keep is not None:
            key, value = key * keep[:, None, :, None], value * keep[:, None, :, None]
        attention = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        maps[self] = attention
        return attention @ (value + self.value_bias[:, None])

    return forward
