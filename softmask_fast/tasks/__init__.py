"""Tasks that a pretrained model is measured by and fine-tuned for."""
