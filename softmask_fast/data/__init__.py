"""Images and captions: sources, distortions (DALI), masking, tokeniser, and the loader that joins them."""
