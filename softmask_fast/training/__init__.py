"""The trainer and its parts: launch, DeepSpeed engine, checkpoints, schedules, metrics, periodic evaluation."""
