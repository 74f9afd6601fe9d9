"""Images and captions: sources, augmentation (DALI), masking, tokenizer, and the loader that joins them."""
