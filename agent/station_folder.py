"""A station's folder and what lies in it by name: the journal, what belongs to it, and the archived pictures."""

from pathlib import Path

from flawline.config.settings import Settings

JOURNAL = "journal.sqlite"
BESIDE_JOURNAL = ("-wal", "-shm")
"""What SQLite appends to the journal's name for the files that it keeps beside it."""
NUMBER_MARK = "seq.mark"
LOCK = "lock"  # held by the agent that runs there
PICTURES = "pictures"


def station_folder(settings: Settings) -> Path:
    """Below `journal.path`, where several stations may have theirs."""
    return settings.journal.path / settings.station
