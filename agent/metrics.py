"""Prometheus metrics: counters and histograms fed by verdicts, gauges read from the status at every scrape."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from flawline import __version__
from flawline.agent.wire import Header

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STAGES = ("queue", "clip", "encode", "prompt", "cascade", "total")
_DROPPED = {
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
    """An observer with a registry of its own. `status` gives the station's status as it is on the wire."""

    def __init__(self, status: Callable[[], Header]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each counter, which nothing here reads
        self.registry = CollectorRegistry()
        self._verdicts = Counter(
            "flawline_verdicts", "Verdicts published", ["result", "reason"], registry=self.registry
        )
        self._dropped = Counter(
            "flawline_frames_dropped", "Frames that were not judged", ["stage", "reason"], registry=self.registry
        )
        self._missed = Counter("flawline_deadline_missed", "Verdicts that came too late", registry=self.registry)
        self._stages = Histogram(
            "flawline_stage_duration_seconds",
            "Time an inspection spent in a stage",
            ["stage"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "flawline_trigger_to_verdict_seconds",
            "From trigger to publish",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._last = Gauge(
            "flawline_last_verdict_timestamp_seconds", "When the last verdict was published", registry=self.registry
        )
        build = Gauge("flawline_build_info", "1; its labels tell the version", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        # Every series exists from the start, so that the first error already is an increase.
        for result in ("pass", "fail"):
            self._verdicts.labels(result, "")
        for reason, stage in _DROPPED.items():
            self._verdicts.labels("error", reason)
            self._dropped.labels(stage, reason)
        for stage in _STAGES:
            self._stages.labels(stage)
        self.viewers = Gauge("flawline_preview_viewers", "Videos that are watched", registry=self.registry)
        self.encoded = Counter(
            "flawline_preview_frames_encoded",
            "Pictures encoded for the preview, whatever the number of viewers",
            ["camera"],
            registry=self.registry,
        )
        self.registry.register(_StatusCollector(status))

    def judged(
        self,
        header: Header,
        picture: NDArray[np.uint8] | None,
        mask: NDArray[np.uint8] | None,
        anomaly_map: NDArray[np.uint8] | None,
        points: list[list[float]],
    ) -> None:
        """Count one verdict."""
        reason = header["reason"] or ""
        self._verdicts.labels(header["result"], reason).inc()
        if header["result"] == "error":
            self._dropped.labels(_DROPPED.get(reason, "worker"), reason).inc()
        for stage, milliseconds in header["stage_ms"].items():
            self._stages.labels(stage).observe(milliseconds / 1000)
        published = header["t_publish"]
        self._last.set(published / 1e9)
        if header["t_trigger"] is not None:
            seconds = (published - header["t_trigger"]) / 1e9
            self._whole.observe(max(0.0, seconds))
            late = header["deadline_ms"] is not None and seconds * 1000 > header["deadline_ms"]
            if reason == "deadline" or late:
                self._missed.inc()

    def text(self) -> bytes:
        """What `/metrics` answers: the text exposition format."""
        return generate_latest(self.registry)


class _StatusCollector(Collector):
    """Gauges and counters that others keep already: nothing is counted twice."""

    def __init__(self, status: Callable[[], Header]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        worker: dict[str, Any] = status["worker"]
        yield CounterMetricFamily("flawline_triggers", "Frames that are owed a verdict", value=status["triggers"])
        yield CounterMetricFamily("flawline_worker_restarts", "Workers that were replaced", value=worker["restarts"])
        depth = GaugeMetricFamily("flawline_queue_depth", "Frames that wait", labels=["stage"])
        depth.add_metric(["inspect"], status["waiting"])
        depth.add_metric(["publish"], status.get("deciding", 0))
        yield depth
        up = GaugeMetricFamily("flawline_camera_up", "1 while the camera is open", labels=["camera"])
        for name, camera in status["cameras"].items():
            up.add_metric([name], float(camera["up"]))
        yield up
        memory = GaugeMetricFamily("flawline_gpu_memory_bytes", "Memory the worker holds on the GPU; 0 without one")
        memory.add_metric([], float(worker.get("gpu_memory_bytes") or 0))
        yield memory
