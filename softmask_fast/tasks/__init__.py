"""Tasks a pretrained model is measured by."""
