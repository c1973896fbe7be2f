"""What a one-shot inspection of many pictures comes to: counts, the scores' histogram, one offline page."""

import base64
import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BINS = 20
BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Line:
    """One picture: what was printed of it, and for the page its overlay as JPEG bytes."""

    record: dict[str, Any]
    thumbnail: bytes | None = None


def histogram(scores: Sequence[float]) -> list[int]:
    """Counts of scores in [0, 1] in BINS equal bins; 1.0 belongs to the last."""
    counts = [0] * BINS
    for score in scores:
        counts[min(int(score * BINS), BINS - 1)] += 1
    return counts


def summary(records: Sequence[dict[str, Any]]) -> list[str]:
    """How many pictures would be rejected, and how the scores lie, as lines of text."""
    results = Counter(record["result"] for record in records)
    rejected = len(records) - results["pass"]
    lines = [
        f"{len(records)} pictures: {results['pass']} pass, {results['fail']} fail, {results['error']} error; "
        f"{rejected} would be rejected ({100 * rejected / len(records):.1f} %)"
    ]
    judged = [record for record in records if record["score"] is not None]
    if not judged:
        return lines
    counts = histogram([record["score"] for record in judged])
    shown = [number for number, count in enumerate(counts) if count]
    threshold = judged[0]["threshold"]
    for number in range(shown[0], shown[-1] + 1):
        low, high = number / BINS, (number + 1) / BINS
        bar = "#" * -(-counts[number] * BAR // max(counts))
        here = (
            f"  <- threshold {threshold:g}"
            if low <= threshold < high or (number == BINS - 1 and threshold == 1.0)
            else ""
        )
        lines.append(f"score {low:.2f} to {high:.2f} {counts[number]:6} {bar}{here}")
    return lines


def page(title: str, facts: dict[str, str], lines: Sequence[Line]) -> str:
    """A page of HTML that needs nothing from elsewhere: pictures are in it, there are no scripts.

    Errors come first, then the pictures by falling score.
    """
    records = [line.record for line in lines]
    ordered = sorted(lines, key=lambda line: -(2.0 if line.record["score"] is None else line.record["score"]))
    about = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary(records)[0]),
        facts=about,
        histogram=_bars(records),
        cards="\n".join(_card(line) for line in ordered),
    )


def _bars(records: Sequence[dict[str, Any]]) -> str:
    """The histogram as SVG, with a line at the threshold."""
    judged = [record for record in records if record["score"] is not None]
    if not judged:
        return ""
    counts = histogram([record["score"] for record in judged])
    top = max(counts)
    parts = []
    for number, count in enumerate(counts):
        height = 100 * count / top
        parts.append(
            f'<rect x="{number * 20 + 1}" y="{100 - height:.1f}" width="18" height="{height:.1f}">'
            f"<title>{number / BINS:.2f} to {(number + 1) / BINS:.2f}: {count}</title></rect>"
        )
    at = judged[0]["threshold"] * BINS * 20
    parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="100"/>')
    parts += [f'<text x="{tenth * 40}" y="114">{tenth / 10:g}</text>' for tenth in range(0, 11, 2)]
    return f'<svg viewBox="-8 0 420 118" role="img" aria-label="scores">{"".join(parts)}</svg>'


def _card(line: Line) -> str:
    record = line.record
    picture = ""
    if line.thumbnail is not None:
        data = base64.b64encode(line.thumbnail).decode("ascii")
        picture = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    if record["result"] == "error":
        said = html.escape(f"{record['reason']}: {record.get('detail', '')}")
    else:
        defects = len(record["defects"])
        said = f"score {record['score']:.4f}, {defects} defect{'' if defects == 1 else 's'}"
    result, path = record["result"], html.escape(record["path"])
    caption = f"<figcaption><b>{result}</b> {said}<br>{path}</figcaption>"
    return f'<figure class="{result}">{picture}{caption}</figure>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: 0 1rem; color: #555 }}
dd {{ margin: 0; overflow-wrap: anywhere }}
svg {{ width: min(100%, 640px); fill: #567; font-size: 10px }}
svg line {{ stroke: #c22; stroke-dasharray: 3 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem }}
figure {{ margin: 0; border: 3px solid #2a7; padding: 4px }}
figure.fail, figure.error {{ border-color: #d33 }}
figure img {{ width: 100%; display: block }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere; padding-top: 4px }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<dl>{facts}</dl>
{histogram}
<main>
{cards}
</main>
</body>
</html>
"""
