"""The two ledgers of tests/chaos.py, what was triggered and what a subscriber got, and the reckoning between them."""

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_MS = 50
GOOD = {"good", "oom_once"}
_RESULTS = {"good": "pass", "oom_once": "pass", "bad": "fail", "degraded": "fail"}  # of the others: none but `error`
Orders = dict[str, list[tuple[str, int]]]
"""Camera -> its pictures' orders for the scripted engine: kind, wait in ms."""


@dataclass
class Sent:
    """One line of the sender's ledger."""

    camera: str
    at: float
    reply: str = "unknown"  # accepted, unjournalled, refused
    t: int = field(default_factory=time.time_ns)  # UTC: no frame of its own can be older


@dataclass
class Ledgers:
    """Both sides' books."""

    sent: dict[str, Sent] = field(default_factory=dict)
    got: list[dict[str, Any]] = field(default_factory=list)  # verdict headers as they came, with `t_received`
    late: list[dict[str, Any]] = field(default_factory=list)
    fetched: list[dict[str, Any]] = field(default_factory=list)  # by replay, at the end
    answered: set[str] = field(default_factory=set)


@dataclass
class Report:
    """What the two ledgers say."""

    triggers: int
    accepted: int
    refused: int
    unknown: int
    verdicts: int
    replayed: int
    unanswered: int
    strangers: int
    gaps: int
    duplicates: int
    wrongful_passes: int
    worst_overshoot_ms: float
    overshoot_p999_ms: float
    deadlines: int
    results: dict[str, int]
    faults: dict[str, int]
    fuzz: int
    fuzz_replies: dict[str, int]
    lost_unjournalled: int
    fuzz_wanted: int
    misplaced: int

    @property
    def flawless(self) -> bool:
        """Nothing missing, nothing twice, nothing passed that was not inspected."""
        wrong = (self.gaps, self.duplicates, self.wrongful_passes, self.misplaced, self.unanswered, self.strangers)
        return not any(wrong) and self.fuzz >= self.fuzz_wanted

    def __str__(self) -> str:
        return (
            f"triggers {self.triggers} (accepted {self.accepted}, refused {self.refused}, "
            f"no reply {self.unknown}), verdicts {self.verdicts} ({self.replayed} by replay), unanswered "
            f"{self.unanswered}, gaps {self.gaps}, duplicates {self.duplicates}, strangers {self.strangers}, "
            f"wrongful passes {self.wrongful_passes}, not of their own picture {self.misplaced}, deadline overshoot "
            f"p99.9 {self.overshoot_p999_ms:.1f} ms, worst {self.worst_overshoot_ms:.1f} ms of {self.deadlines}; "
            f"malformed messages {self.fuzz} of {self.fuzz_wanted}\n"
            f"results: {self.results}\nfaults: {self.faults}\nmalformed: {self.fuzz_replies}; accepted while the disk "
            f"was full and lost with the agent: {self.lost_unjournalled}"
        )


def reckon(
    books: Ledgers,
    orders: Orders,
    noted: Path,
    faults: Counter[str],
    fuzz: tuple[int, int],
    fuzz_replies: Counter[str],
) -> Report:
    """Hold the two ledgers against each other, and against what the engine noted in the file `noted`.

    `fuzz` is how many malformed messages were sent, and how many should have been.
    """
    verdicts = books.got + books.fetched
    seqs = Counter(header["seq"] for header in verdicts)
    answers = Counter(header["trigger_id"] for header in verdicts)
    per_camera = {
        name: sorted(header["camera_seq"] for header in verdicts if header["camera"] == name) for name in orders
    }
    gaps = len(set(range(1, max(seqs, default=0) + 1)) - set(seqs))
    gaps += sum(len(set(range(1, max(own, default=0) + 1)) - set(own)) for own in per_camera.values())
    missing = [name for name, sent in books.sent.items() if name not in answers]
    overshoots = sorted(
        (header["t_received"] - books.sent[header["trigger_id"]].at) * 1000 - DEADLINE_MS
        for header in books.got
        if header["deadline_ms"] and header["reason"] != "agent_restart" and header["trigger_id"] in books.sent
    )
    replies = Counter(sent.reply for sent in books.sent.values())
    return Report(
        triggers=len(books.sent),
        accepted=replies["accepted"] + replies["unjournalled"],
        refused=replies["refused"],
        unknown=replies["unknown"],
        verdicts=len(verdicts),
        replayed=len(books.fetched),
        unanswered=sum(books.sent[name].reply == "accepted" for name in missing),
        lost_unjournalled=sum(books.sent[name].reply == "unjournalled" for name in missing),
        strangers=sum(name not in books.sent or books.sent[name].reply == "refused" for name in answers),
        gaps=gaps,
        duplicates=sum(count - 1 for count in seqs.values()) + sum(count - 1 for count in answers.values()),
        wrongful_passes=_wrongful(orders, noted, [*verdicts, *books.late]),
        misplaced=misplaced(books, orders, [*verdicts, *books.late]),
        worst_overshoot_ms=overshoots[-1] if overshoots else 0.0,
        overshoot_p999_ms=overshoots[int(len(overshoots) * 0.999)] if overshoots else 0.0,
        deadlines=len(overshoots),
        results=dict(Counter(header["reason"] or header["result"] for header in verdicts).most_common()),
        faults=dict(faults),
        fuzz=fuzz[0],
        fuzz_wanted=fuzz[1],
        fuzz_replies=dict(fuzz_replies),
    )


def _wrongful(orders: Orders, noted: Path, verdicts: list[dict[str, Any]]) -> int:
    """Passes of pictures that are not good, and more passes than the engine has completed inspections."""
    inspected = Counter(line.split()[0] for line in noted.read_text().splitlines())
    wrong = passes = 0
    for header in {(header["schema"], header["seq"], header["reason"]): header for header in verdicts}.values():
        if header["result"] == "pass":
            own = orders[header["camera"]]
            wrong += own[header["frame_id"] % len(own)][0] not in GOOD
            passes += 1
    return wrong + max(0, passes - sum(inspected[kind] for kind in GOOD))


def misplaced(books: Ledgers, all_orders: Orders, headers: list[dict[str, Any]]) -> int:
    """Verdicts that are not of their trigger's own picture.

    The picture was taken after the trigger was sent; while one agent runs, a camera's pictures answer its triggers in
    order, each once; and a result is what the picture orders.
    """
    answers = {header["trigger_id"]: header for header in headers if header["frame_id"] is not None}
    newest: dict[tuple[str, str], int] = {}
    wrong = 0
    for name in sorted(answers):
        header, sent = answers[name], books.sent.get(name)
        orders = all_orders[header["camera"]]
        run = (header["camera"], header["boot_id"])
        fits = sent is not None and header["t_grab"] >= sent.t and header["frame_id"] > newest.get(run, -1)
        kind = orders[header["frame_id"] % len(orders)][0]
        wrong += not (fits and header["result"] in ("error", _RESULTS.get(kind)))
        newest[run] = max(header["frame_id"], newest.get(run, -1))
    return wrong
