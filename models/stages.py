"""Times of an inspection's stages, taken without making the host wait for the device."""

import time

import torch

from flawline.models.results import STAGES


class StageClock:
    """Laps in milliseconds. On CUDA they are events in the stream, read only when `stages` is called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("start", self._now())]

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lap(self, stage: str) -> None:
        """What has been done since the last lap belongs to `stage`; several laps of one stage add up."""
        self._marks.append((stage, self._now()))

    def stages(self) -> dict[str, float]:
        """Milliseconds of every stage (0.0 where it was skipped) and `total` until now."""
        end = self._now()
        if self._cuda:
            torch.cuda.synchronize(self._device)
        times = dict.fromkeys(STAGES, 0.0)
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            times[stage] += _between(before, after)
        times["total"] = _between(self._marks[0][1], end)
        return times


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return (after - before) * 1000.0
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    return float(before.elapsed_time(after))
