"""The results of an evaluation as results.json and results.md. No torch here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flawline.models.class_report import METRICS, mean_report
from flawline.models.study import AGENT, Printed, Row

HEADINGS = ("AUROC", "F1-max", "AP", "AUPRO", "image AUROC", "image AP", "image F1-max")
CLASSES = {"mvtec": 15, "visa": 12}  # of the published sets
_LOCALISERS = {"adapter": "trained layers", "windows": "windows, not as in the paper"}
HIDDEN = ("curves", "image_scores")


def results(
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    reports: Mapping[str, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """results.json: `sets` and `mean` are the agent's own; `rows` holds every row of the tables.

    `left_out`: why a row could not run here, by key.
    """
    by_row: dict[str, Any] = {}
    for row in rows:
        not_here = row.source is None or (row.source == "peer" and row.key in left_out)
        if not_here and _printed(row, settings) is None:
            continue  # nothing is known of it on this data set
        entry: dict[str, Any] = {"title": row.title, "note": row.note, "printed": _printed(row, settings)}
        if row.source is None:
            entry["note"] = "printed numbers only: this method cannot be rebuilt exactly here"
        elif row.key in left_out:
            entry["note"] = f"{'printed numbers only' if row.source == 'peer' else 'not run'}: {left_out[row.key]}"
        else:
            sets = {name: _without(report[row.key]) for name, report in reports.items()}
            entry |= {"sets": sets, "mean": mean_report(sets)}
        by_row[row.key] = entry
    own = by_row[AGENT.key]
    return {"settings": dict(settings), "sets": own["sets"], "mean": own["mean"], "rows": by_row}


def _without(report: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in report.items() if name not in HIDDEN}


def _printed(row: Row, settings: Mapping[str, Any]) -> dict[str, float | None] | None:
    numbers: Printed | None = row.printed.get(str(settings.get("dataset")))
    if numbers is None:
        return None
    names = ("pixel_auroc", "pixel_f1_max", "pixel_ap")
    return {name: None if value is None else round(value / 100, 4) for name, value in zip(names, numbers, strict=True)}


def percent(value: float | None) -> str:
    """A metric as tables print it."""
    return "-" if value is None else f"{100 * value:.1f}"


def class_lines(content: Mapping[str, Any]) -> list[list[str]]:
    """The agent's own numbers: one line per class and one of means; name, pictures, defective, metrics."""
    lines = [
        [name, str(entry["n_images"]), str(entry["n_defective"]), *(percent(entry[metric]) for metric in METRICS)]
        for name, entry in content["sets"].items()
    ]
    pictures = sum(entry["n_images"] for entry in content["sets"].values())
    defective = sum(entry["n_defective"] for entry in content["sets"].values())
    lines.append(["mean", str(pictures), str(defective), *(percent(content["mean"][metric]) for metric in METRICS)])
    return lines


def row_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and one line per row of the study: title, means of this run, and the printed numbers where the
    data set has some."""
    rows = content["rows"].values()
    with_printed = any(entry["printed"] for entry in rows)
    headings = ["method", *HEADINGS[:5], *(f"{name} printed" for name in HEADINGS[:3] if with_printed)]
    lines = []
    for entry in rows:
        mean, printed = entry.get("mean") or {}, entry["printed"] or {}
        line = [entry["title"], *(percent(mean.get(metric)) for metric in METRICS[:5])]
        line += [percent(printed.get(metric)) for metric in METRICS[:3] if with_printed]
        lines.append(line)
    return headings, lines


def row_notes(content: Mapping[str, Any]) -> list[str]:
    """What must be known of single rows."""
    notes = [f"{entry['title']}: {entry['note']}" for entry in content["rows"].values() if entry["note"]]
    classes, here = CLASSES.get(content["settings"]["dataset"], 0), len(content["sets"])
    if classes != here and any(entry["printed"] for entry in content["rows"].values()):
        notes.append(f"printed: means over all {classes} classes of {content['settings']['dataset']}; here {here}")
    return notes


SHOT_HEADINGS = (
    "class",
    "good parts",
    *(f"{kind} AUROC: {name}" for kind in ("pixel", "image") for name in ("words", "memory", "both")),
    "pixel: both - better",
    "image: both - better",
)


def shot_lines(shots: Mapping[str, Any]) -> list[list[str]]:
    """Of `evaluate --shots`: one line per class and number of good parts; values with their 95 % intervals."""
    lines = []
    for name, entry in shots["sets"].items():
        for one in entry["lines"]:
            line = [name, str(one["good_parts"])]
            for metric in ("pixel_auroc", "image_auroc"):
                bounds = one[f"{metric}_ci95"]
                line += [_between(one[metric].get(map_), bounds.get(map_)) for map_ in ("words", "memory", "both")]
            gains = [one[f"{metric}_gain"] for metric in ("pixel_auroc", "image_auroc")]
            line += ["-" if gain is None else _between(gain["value"], gain["ci95"], "+") for gain in gains]
            lines.append(line)
    return lines


def _between(value: float | None, bounds: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    around = "" if bounds is None else f" [{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]"
    return f"{100 * value:{sign}.1f}{around}"


def _shots(shots: Mapping[str, Any]) -> list[str]:
    """The section of results.md."""
    parts = [
        "## With a few good parts",
        _table(SHOT_HEADINGS, shot_lines(shots)),
        f"Means of {shots['draws']} draws of good parts; in brackets 95 % intervals over draws and pictures. Maps "
        f"before SAM, of pictures squeezed to a square, measured at {shots['edge']} px; the image score is the map's "
        "maximum. `both - better`: over the better of words and memory, the interval from the same pictures for each.",
    ]
    for name, entry in shots["sets"].items():
        if (cost := entry["cost"]) is not None:
            parts.append(
                f"* {name}: a memory of {cost['rows']} rows adds {cost['memory_ms']:.1f} ms to the "
                f"{cost['clip_ms']:.1f} ms of CLIP's stage ({100 * cost['share']:.0f} %)"
            )
    parts += [f"* {name}: left out, it has no good pictures to learn from" for name in shots["without_good"]]
    return parts


CLASS_HEADINGS = ("class", "pictures", "defective", *HEADINGS)


def write_results(out: Path, content: Mapping[str, Any]) -> None:
    """results.json and results.md in `out`."""
    (out / "results.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "results.md").write_text(markdown(content), encoding="utf-8", errors="backslashreplace")


def markdown(content: Mapping[str, Any]) -> str:
    """Both tables, what was evaluated, and what did not fit together."""
    settings = content["settings"]
    size = "captured frames" if settings["size"] is None else f"{settings['size']} x {settings['size']} px"
    parts = [
        f"# {settings['dataset']}: {settings['root']}",
        f"Bundle `{settings['bundle']}` ({settings['bundle_sha256'][:12]}), {settings['activation']}, "
        f"{settings['device']}, {settings['precision']}; CLIP's map by {_LOCALISERS[settings['localiser']]}"
        f"{_layers(settings)}, S_a {_region(settings)}; metrics at {size}; all values in percent.",
        _recipe(settings),
    ]
    if settings["limit"] is not None:
        parts.append(
            f"**A subset: at most {settings['limit']} good and {settings['limit']} defective pictures a class.**"
        )
    parts.append(_table(CLASS_HEADINGS, class_lines(content)))
    parts.append("95 % intervals by bootstrap over pictures stand in `results.json` (`ci95`).")
    if len(content["rows"]) > 1:
        parts += ["## Side by side (means over classes)", _table(*row_table(content))]
        parts += ["\n".join(f"* {note}" for note in row_notes(content))]
    if "shots" in content:
        parts += _shots(content["shots"])
    if settings["problems"]:
        parts += [
            "## Pictures and masks that do not fit together",
            *(f"* {problem}" for problem in settings["problems"]),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _layers(settings: Mapping[str, Any]) -> str:
    return f" of {settings['adapter']}" if settings["adapter"] else ""


def _region(settings: Mapping[str, Any]) -> str:
    """How S_a was cut."""
    prompt = settings["recipe"]["prompt"]
    if prompt["region"] == "otsu":
        return "by Otsu's method"
    if prompt["region"] == "top_percent":
        return f"the highest {prompt['region_percent']:g} % of the pixels"
    told = "" if settings["region_threshold_stated"] else " (stated by neither bundle nor recipe)"
    return f"from {settings['region_threshold']:g} on{told}"


def _recipe(settings: Mapping[str, Any]) -> str:
    """Words and fusion."""
    recipe, objects = settings["recipe"], set(settings["objects"].values())
    named = f"`{objects.pop()}` in every prompt" if len(objects) == 1 else "the class's name in the prompts"
    fusion = recipe["fusion"]
    return f"The object's name: {named}; maps joined by `{fusion['preset']}`, a = {fusion['a']:g}."


def _table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
