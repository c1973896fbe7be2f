"""Prometheus metrics: counters and histograms fed by verdicts, gauges read from the status at every scrape."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flawline import __version__
from flawline.agent.observer import JudgedFrame
from flawline.agent.verdict import TIMED
from flawline.agent.wire import Header

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LOST_AT = {
    "overrun": "queue",
    "paused": "queue",
    "deadline": "queue",
    "agent_restart": "queue",
    "camera_fault": "camera",
    "bad_frame": "camera",
    "worker_lost": "worker",
    "out_of_memory": "worker",
    "internal": "worker",
}
"""Reason of an `error` verdict -> the stage at which its frame was lost."""


class Metrics:
    """An observer with a registry of its own; what others count already is read from them at a scrape.

    `reasons` counts verdicts by (result, reason), `dropped` counts frames without a verdict of their own, or whose
    verdict does not tell why, by (stage, reason); `status` gives the station's status as it is on the wire.
    """

    def __init__(
        self,
        status: Callable[[], Header],
        reasons: Mapping[tuple[str, str | None], int],
        dropped: Mapping[tuple[str, str], int],
    ) -> None:
        self.registry = CollectorRegistry()
        self._stages = Histogram(
            "flawline_stage_duration_seconds",
            "Time an inspection spent in a stage",
            ["stage"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "flawline_trigger_to_verdict_seconds", "From trigger to publish", buckets=_BUCKETS, registry=self.registry
        )
        self._last = Gauge(
            "flawline_last_verdict_timestamp_seconds", "When the last verdict was published", registry=self.registry
        )
        build = Gauge("flawline_build_info", "1; its labels tell the version", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        for stage in TIMED:  # every series exists from the start
            self._stages.labels(stage)
        self.viewers = Gauge("flawline_preview_viewers", "Videos that are watched", registry=self.registry)
        self.encoded = Counter(
            "flawline_preview_frames_encoded",
            "Pictures encoded for the preview, whatever the number of viewers",
            ["camera"],
            registry=self.registry,
        )
        self.registry.register(_Counts(status, reasons, dropped))

    def judged(self, frame: JudgedFrame) -> None:
        """Measure one verdict."""
        if frame.kind != "verdict":
            return
        header = frame.header
        for stage, milliseconds in header["stage_ms"].items():
            self._stages.labels(stage).observe(milliseconds / 1000)
        self._last.set(header["t_publish"] / 1e9)
        if header["t_trigger"] is not None and header["reason"] != "agent_restart":  # a dead one's trigger
            self._whole.observe(max(0.0, (header["mono_publish"] - header["mono_trigger"]) / 1e9))

    def text(self) -> bytes:
        """What `/metrics` answers: the text exposition format."""
        return generate_latest(self.registry)


class _Counts(Collector):
    """Counters and gauges of what others know: nothing is counted twice, so the counters reconcile."""

    def __init__(
        self,
        status: Callable[[], Header],
        reasons: Mapping[tuple[str, str | None], int],
        dropped: Mapping[tuple[str, str], int],
    ) -> None:
        self._status = status
        self._reasons = reasons
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        worker: dict[str, Any] = status["worker"]
        yield CounterMetricFamily("flawline_triggers", "Frames that are owed a verdict", value=status["triggers"])
        # Every series exists from the start, so that the first error already is an increase.
        counts = {("pass", ""): 0, ("fail", ""): 0} | {("error", reason): 0 for reason in _LOST_AT}
        for (result, reason), count in self._reasons.items():
            counts[result, reason or ""] = count
        verdicts = CounterMetricFamily("flawline_verdicts", "Verdicts published", labels=["result", "reason"])
        dropped = CounterMetricFamily(
            "flawline_frames_dropped",
            "Frames that were judged too late, without SAM, or not at all",
            labels=["stage", "reason"],
        )
        for (result, reason), count in counts.items():
            verdicts.add_metric([result, reason], count)
            if result == "error":
                dropped.add_metric([_LOST_AT.get(reason, "worker"), reason], count)
        yield verdicts
        # An overrun counts once: its verdict, not also the queue that was full.
        for (stage, reason), count in self._dropped.items():
            if stage not in ("queue", "trigger", "late"):
                dropped.add_metric([stage, reason], count)
        yield dropped
        missed = counts["error", "deadline"]
        yield CounterMetricFamily("flawline_deadline_missed", "Verdicts that were `error: deadline`", value=missed)
        yield CounterMetricFamily("flawline_worker_restarts", "Workers that were replaced", value=worker["restarts"])
        depth = GaugeMetricFamily("flawline_queue_depth", "Frames that wait", labels=["stage"])
        for stage, key in (("inspect", "waiting"), ("late", "late_waiting"), ("worker", "in_flight")):
            depth.add_metric([stage], status[key])
        yield depth
        up = GaugeMetricFamily(
            "flawline_camera_up",
            "1 while the camera delivers or has come to its end; none before it was first opened",
            labels=["camera"],
        )
        for name, camera in status["cameras"].items():
            # While models are loaded no camera is open yet, and no fault. One that does not open later on is one.
            if camera["state"] != "closed" or status["state"] not in ("starting", "stopping"):
                up.add_metric([name], float(camera["up"] or camera["state"] == "ended"))
        yield up
        unwritten = status["journal"]["unwritten"]
        yield GaugeMetricFamily(
            "flawline_journal_unwritten_verdicts", "Verdicts that the journal could not yet take", value=unwritten
        )
        memory = GaugeMetricFamily("flawline_gpu_memory_bytes", "Memory the worker holds on the GPU; 0 without one")
        memory.add_metric([], float(worker.get("gpu_memory_bytes") or 0))
        yield memory
