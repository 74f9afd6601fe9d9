"""The vision-language model and its pretraining step."""
