"""Whether the station makes progress: grabbing, inference and publishing. Waiting for triggers is progress.

The watchdog of a service is fed only while nothing is named here. What has remedies of its own (a worker that is
being replaced, a camera that is opened again) counts as progress while the remedy is under way.
"""

import time
from collections.abc import Iterator

from flawline.agent.intake import Intake
from flawline.agent.outbox import Outbox
from flawline.agent.worker_client import WorkerClient

_CAMERA_S = 30.0  # a camera's task comes round four times a second; opening one may take long
_PONG_S = 4.0  # pings are answered by a thread of their own, also while a frame is judged
_PUBLISH_S = 10.0  # a decided verdict moves on within milliseconds


def what_stands_still(intake: Intake, worker: WorkerClient, outbox: Outbox) -> Iterator[str]:
    """Names and ages of what makes no progress, for the log and the status line."""
    now = time.monotonic()
    if intake.running:
        for line in intake.lines.values():
            if line.state != "ended" and (age := now - line.seen_mono) > _CAMERA_S:
                yield f"camera {line.name} (for {age:.0f} s)"
    if (age := worker.silent_s) > _PONG_S:
        yield f"worker (silent for {age:.0f} s)"
    elif worker.hopeless:
        yield "worker (dies again and again)"
    if (age := outbox.stuck_s) > _PUBLISH_S:
        yield f"publishing (for {age:.0f} s)"
