"""The trainer and its parts: launch, DeepSpeed engine, checkpoints, schedules, metrics, periodic evaluation."""

import logging


def errors_alone(record: logging.LogRecord) -> bool:
    """The filter of DeepSpeed's log, which begins when it is imported."""
    return record.levelno >= logging.ERROR


logging.getLogger("DeepSpeed").addFilter(errors_alone)
