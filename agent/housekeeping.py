"""What is done now and then so that the disk does not fill: old verdicts, the write-ahead log, old pictures."""

import asyncio

import structlog

from flawline.agent.outbox import Outbox
from flawline.config.errors import JournalError
from flawline.config.settings import JournalSettings

log = structlog.get_logger()
_CHECKPOINT_EVERY_S = 5.0
_PAUSE_S = 0.05  # between two steps of forgetting, so that commits come between


async def keep_house(outbox: Outbox, settings: JournalSettings) -> None:
    """Until cancelled. What fails because the disk is full is tried again; the outbox says that it is."""
    await outbox.on_archive(outbox.archive.scan)
    while True:
        await asyncio.sleep(_CHECKPOINT_EVERY_S)
        try:
            # First, and whatever comes of the rest: on a full disk it makes the room that forgetting needs.
            await asyncio.to_thread(outbox.journal.checkpoint)
            dropped = 1
            while dropped:
                dropped = await outbox.on_journal(
                    outbox.journal.drop_old, settings.keep_days, settings.keep_verdicts, settings.keep_mb
                )
                await asyncio.sleep(_PAUSE_S)
            if outbox.journal_fails or outbox.journal.unwritten:
                await outbox.try_journal()
            await outbox.on_archive(outbox.journal.lay_ballast)
        except (JournalError, OSError) as error:
            log.debug("housekeeping_failed", error=str(error))
