"""Where the time of a training step goes, said once in the log: what holds the run back."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

BEFORE, STEPS = 11, 10  # steps of this process before the measured ones, and measured ones
IDLE = 0.2  # from this fraction of a step on, waiting counts as what holds a run back

Mark = tuple[str, float, "torch.cuda.Event | None"]  # the part that ended, when, and after which work of the GPU


class StepTimes:
    """Splits ten steps of this process into parts, by the host's clock.

    On a GPU each part's end is also an event among its work. How far the GPU gets to it behind the host is how long it
    certainly had work in the next part; for the rest of the part it may have waited. No step waits for an event; the
    clocks are set side by side once, before the step that precedes the measured ones.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.steps = device.type == "cuda", 0
        self.marks: list[Mark] = []

    def begin(self) -> None:
        """A step begins. What passed since the last part's end is of no part."""
        if self.steps == BEFORE - 1 and self.on_gpu:
            torch.cuda.synchronize()
            self.start = self._mark("")
        if BEFORE <= self.steps < BEFORE + STEPS:
            self.marks.append(self._mark(""))

    def end(self, part: str) -> None:
        """A part of the step ends."""
        if BEFORE <= self.steps < BEFORE + STEPS:
            self.marks.append(self._mark(part))

    def finish(self) -> str | None:
        """A step is over; returns the text for the log once, as soon as the measured steps are done on the GPU, too."""
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
            return text + ("; data hold the run back" if seconds["data"] >= IDLE * whole else "")
        waits = {"data": idle.pop("data", 0.0) / whole, "its host": sum(idle.values()) / whole}
        text += f"; the GPU has work queued for {1 - sum(waits.values()):.0%} of a step"
        if sum(waits.values()) < IDLE:
            return f"{text}, it sets the pace"
        waits = sorted(waits.items(), key=lambda item: -item[1])
        return f"{text} and waits " + " and ".join(f"up to {x:.0%} for {what}" for what, x in waits if x >= 0.005)

    def _behind(self, mark: Mark) -> float:
        """How long after the host the GPU came to a mark."""
        _, began, first = self.start
        return first.elapsed_time(mark[2]) / 1000 - (mark[1] - began)
