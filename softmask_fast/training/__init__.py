"""The trainer and its parts: launch, DeepSpeed engine, checkpoints, schedules, metrics, periodic evaluation."""

import logging


def errors_alone(record: logging.LogRecord) -> bool:
    """Filter for DeepSpeed's log. It is installed here because DeepSpeed already logs while it is imported."""
    return record.levelno >= logging.ERROR


logging.getLogger("DeepSpeed").addFilter(errors_alone)
