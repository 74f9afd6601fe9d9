"""Where the time of a training step goes: one line in the log that says what limits the run."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

BEFORE, STEPS = 11, 10  # steps of this process that are skipped, and those that are measured
IDLE = 0.2  # waiting for this fraction of a step counts as what limits the run

Mark = tuple[str, float, "torch.cuda.Event | None"]  # the part that ended, the time, an event in the GPU's queue


class StepTimes:
    """Splits ten steps of this process into parts, by the host's clock.

    On a GPU each part's end is also an event in its queue. The GPU reaches the event some time after the host. For that
    long it certainly had work during the next part; for the rest of that part it may have waited. No step waits for an
    event. The two clocks are compared once, before the last step that is skipped.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.steps = device.type == "cuda", 0
        self.marks: list[Mark] = []

    def begin(self) -> None:
        """Mark the start of a step. Time since the end of the last part belongs to no part."""
        if self.steps == BEFORE - 1 and self.on_gpu:
            torch.cuda.synchronize()
            self.start = self._mark("")
        if BEFORE <= self.steps < BEFORE + STEPS:
            self.marks.append(self._mark(""))

    def end(self, part: str) -> None:
        """Mark the end of a part of the step."""
        if BEFORE <= self.steps < BEFORE + STEPS:
            self.marks.append(self._mark(part))

    def finish(self) -> str | None:
        """Mark the end of a step. Returns the line for the log once, as soon as the GPU too has done the measured
        steps."""
        self.steps += 1
        if self.steps < BEFORE + STEPS or not self.marks or (self.on_gpu and not self.marks[-1][2].query()):
            return None
        text = self._text()
        self.marks = []
        return text

    def _mark(self, part: str) -> Mark:
        now, event = time.perf_counter(), None
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return part, now, event

    def _text(self) -> str:
        seconds, idle = defaultdict(float), defaultdict(float)
        for before, (part, now, _) in zip(self.marks, self.marks[1:], strict=False):
            if part:
                seconds[part] += now - before[1]
                idle[part] += max(0.0, now - before[1] - self._behind(before)) if self.on_gpu else 0.0
        whole = sum(seconds.values())
        shares = ", ".join(f"{part} {value / whole:.0%}" for part, value in seconds.items() if value >= 0.005 * whole)
        text = f"where a step's time goes ({1000 * whole / STEPS:.4g} ms, {STEPS} steps): {shares}"
        if not self.on_gpu:
            return text + ("; the data limit the run" if seconds["data"] >= IDLE * whole else "")
        waits = {"data": idle.pop("data", 0.0) / whole, "its host": sum(idle.values()) / whole}
        text += f"; the GPU has work queued for {1 - sum(waits.values()):.0%} of a step"
        if sum(waits.values()) < IDLE:
            return f"{text}, so it limits the run"
        waits = sorted(waits.items(), key=lambda item: -item[1])
        return f"{text} and waits " + " and ".join(f"up to {x:.0%} for {what}" for what, x in waits if x >= 0.005)

    def _behind(self, mark: Mark) -> float:
        """How many seconds after the host the GPU reached a mark."""
        _, began, first = self.start
        return first.elapsed_time(mark[2]) / 1000 - (mark[1] - began)
