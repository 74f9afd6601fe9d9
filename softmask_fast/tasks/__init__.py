"""The tasks that a pretrained model is fine-tuned for: their data, models, recipes and evaluation."""
