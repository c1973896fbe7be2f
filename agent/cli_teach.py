"""`flawline learn --from-feedback`: shows what was learnt from wrong rejects and what it changes, then activates."""

import json
import statistics
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from flawline.agent.feedback import Mark
from flawline.agent.teaching import GROUPS, Part, Report, Twice
from flawline.config.errors import FlawlineError
from flawline.config.memory_versions import activate, number_pending
from flawline.config.recipe import Recipe

LISTED = 20  # parts named of one kind; all of them stand in --json


def finish(
    report: Report, recipe: str, configured: Recipe, file: Path | None, *, go: bool, force: bool, as_json: bool
) -> None:
    """Show what was learnt and what it changes; then activate it where that is wanted and nothing speaks against it.

    Raises FlawlineError where confirmed defects would pass and it is to be activated without `force`.
    """
    if not as_json:
        for line in lines(report, recipe, configured):
            click.echo(line)
    refused = bool(report.let_through) and not force
    if not go and report.memory is not None and file is not None and not refused and not as_json:
        go = sys.stdin.isatty() and click.confirm("judge by it from now on?")
    active: Path | None = None
    if go and report.memory is not None and report.memory_sha256 is not None and file is not None and not refused:
        active = number_pending(report.memory, recipe, report.memory_sha256)
        activate(file, recipe, active, configured.memory)
    if as_json:
        content = _table(report) | {"recipe": recipe, "refused": refused, "activated": active is not None}
        if active is not None:
            content["memory"] = str(active)
        click.echo(json.dumps(content))
    elif active is not None:
        click.echo(
            f"active: {active}, written to recipes.{recipe} in {file}; a running agent takes it up when it reloads its "
            "configuration (SIGHUP, `systemctl reload`); `flawline learn --rollback` takes it back"
        )
    elif report.memory is not None and not refused:
        click.echo("not active: nothing judges by it; the same command with --activate (and --config) changes that")
    if refused:
        numbers = ", ".join(str(one.seq) for one in report.let_through[:LISTED])
        text = f"recipes.{recipe}: would pass what operators confirmed as defective: verdict {numbers}"
        if go:
            raise FlawlineError(f"{text}; not activated (--force does it all the same)")
        if not as_json:
            click.echo(f"{text}; --activate will refuse it")


def lines(report: Report, recipe: str, configured: Recipe) -> Iterator[str]:
    """The report in words."""
    yield f"marked as wrongly rejected: {len(report.parts)}"
    for part in report.parts:
        yield f"  {_of_mark(part.mark)}: {_use(part)}"
    if report.memory is None:
        yield (
            "nothing new to learn: the memory knows these parts. What is still rejected is rejected by the words or "
            "the threshold: see `flawline inspect`, `flawline calibrate`"
        )
        return
    yield f"new memory of {report.remembered} good parts: {report.memory}, sha256 {report.memory_sha256}"
    yield f"{len(report.judged)} archived parts judged by the memory before and by the new one:"
    yield f"  {'':26}{'parts':>7}{'pass now':>10}{'would pass':>12}   median score"
    for group, title in GROUPS.items():
        own = [one for one in report.judged if one.group == group]
        if own:
            now, then = sum(one.passed_before for one in own), sum(one.passed_after for one in own)
            before = statistics.median(one.score_before for one in own)
            after = statistics.median(one.score_after for one in own)
            yield f"  {title:26}{len(own):7}{now:10}{then:12}   {before:.3f} -> {after:.3f}"
    yield from _named("DEFECTS that would pass", report.let_through)
    rejects = [one for one in report.judged if one.group in ("wrong_rejects", "other_rejects")]
    yield from _named("rejects that would pass", [one for one in rejects if one.passed_after and not one.passed_before])
    yield from _named("that would be rejected", [o for o in report.judged if o.passed_before and not o.passed_after])
    still = [one for one in report.judged if one.group == "wrong_rejects" and not one.passed_after]
    yield from _named("marked as wrong and still rejected", still)
    yield from (f"note: {text}" for text in _notes(report, recipe, configured))


def _of_mark(mark: Mark) -> str:
    when = datetime.fromtimestamp(mark.t / 1e9).astimezone().strftime("%Y-%m-%d %H:%M")
    who = f" by {mark.who}" if mark.who else ""
    return f"verdict {mark.seq}, camera {mark.camera}, marked{who} {when}" + (f" ({mark.note})" if mark.note else "")


def _use(part: Part) -> str:
    numbers = "" if part.distance is None else f" (distance {part.distance:.3f}, good parts {part.typical or 0.0:.3f})"
    return {
        "learnt": f"learnt{numbers}",
        "known": f"known already{numbers}",
        "duplicate": "left out, the same picture again",
        "outlier": f"left out, unlike the others{numbers}; if it is good, --keep-all learns it too",
    }.get(part.use, f"left out: {part.reason}")


def _named(title: str, parts: list[Twice]) -> Iterator[str]:
    if not parts:
        return
    yield f"{title}: {len(parts)}"
    for one in sorted(parts, key=lambda one: -one.score_before)[:LISTED]:
        scores = f"score {one.score_before:.3f} -> {one.score_after:.3f}"
        yield f"  verdict {one.seq}, camera {one.camera}: {scores}, {one.picture}"
    if len(parts) > LISTED:
        yield f"  and {len(parts) - LISTED} more (--json names all)"


def _notes(report: Report, recipe: str, configured: Recipe) -> Iterator[str]:
    if report.memory_before_sha256 is None:
        yield "the recipe had no memory: this one knows only these parts; `flawline learn --good` gives it more"
    if report.version is not None:
        yield f"the line judges by version {report.version} of {recipe}, activated by command: that was compared"
        now, then = (one.model_dump(exclude={"memory"}) for one in (configured, report.recipe))
        if differing := [key for key in now if now[key] != then[key]]:
            yield f"the file has other values for {', '.join(differing)}: they hold as soon as the file is reloaded"
    if report.recipe.calibration is not None:
        yield "the recipe's threshold was calibrated with the memory before: run `flawline calibrate` again"
    if not any(one.group == "confirmed_defects" for one in report.judged):
        yield (
            "no archived part is marked as a defect (`feedback`, label `bad`): look at the rejects that would pass "
            "before you activate"
        )
    if report.unchecked:
        numbers = ", ".join(str(mark.seq) for mark in report.unchecked[:LISTED])
        yield f"confirmed defects without a picture, not checked: {len(report.unchecked)} (verdict {numbers})"
    for text in report.not_judged[:LISTED]:
        yield f"not judged: {text}"


def _table(report: Report) -> dict[str, Any]:
    """The report for `--json`."""
    return {
        "memory_before": report.recipe.memory,
        "memory_before_sha256": report.memory_before_sha256,
        "memory": None if report.memory is None else str(report.memory),
        "memory_sha256": report.memory_sha256,
        "marked": [
            {
                "seq": part.mark.seq,
                "camera": part.mark.camera,
                "who": part.mark.who,
                "t": part.mark.t,
                "label": part.mark.label,
                "note": part.mark.note,
                "picture": None if part.picture is None else str(part.picture),
                "use": part.use,
                "reason": part.reason or None,
                "distance": part.distance,
                "typical": part.typical,
            }
            for part in report.parts
        ],
        "judged": [{**vars(one), "picture": str(one.picture)} for one in report.judged],
        "not_judged": report.not_judged,
        "defects_that_would_pass": [one.seq for one in report.let_through],
        "defects_unchecked": [mark.seq for mark in report.unchecked],
    }
