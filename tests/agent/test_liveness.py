"""That the outbox says so when nothing goes out, and that an idle one is well."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import zmq

from flawline.agent.archive import Archive
from flawline.agent.journal import Journal
from flawline.agent.outbox import Outbox
from flawline.agent.publisher import Publisher
from flawline.agent.verdict import Trigger
from flawline.camera.ring import FrameRing
from flawline.config.settings import JournalSettings, PublishSettings


class HangingDisk(Journal):
    """A journal whose commits hang while `hangs` is set, as on a share that is gone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.goes_on = threading.Event()

    def commit(self, *arguments: Any, **more: Any) -> None:
        assert self.goes_on.wait(60)
        super().commit(*arguments, **more)


async def test_a_hanging_commit_is_no_progress_and_an_idle_outbox_is(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    journal, ring = HangingDisk(tmp_path / "line1"), FrameRing(1, 1000)
    settings = PublishSettings(endpoint="ipc://" + str(tmp_path / "out"))
    publisher = Publisher(context, settings, "line1")
    outbox = Outbox(settings, ring, journal, publisher, Archive(tmp_path / "pictures", JournalSettings()))
    running = asyncio.create_task(outbox.run())
    await asyncio.sleep(0.3)
    assert outbox.stuck_s == 0.0
    accepted = outbox.accept(Trigger("top", "A", None, 1, "default", 1))
    await asyncio.sleep(0.5)
    assert 0.4 < outbox.stuck_s < 30
    journal.goes_on.set()
    assert await asyncio.wait_for(accepted, 30)
    await outbox.until_empty(10)
    assert outbox.stuck_s == 0.0
    running.cancel()
    await asyncio.wait([running])
    outbox.close()
    publisher.close()
    context.destroy(linger=0)
    ring.close()
    journal.close()
