"""Curves and histograms of an evaluation as PNG files, by matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_plots(folder: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Per class NAME_curves.png (ROC and precision-recall, pixels and images) and NAME_scores.png.

    `reports`: one row's report per class.
    """
    from matplotlib.figure import Figure  # slow to import

    for name, report in reports.items():
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        roc, pr = figure.subplots(1, 2)
        for kind, colour in (("pixel", "tab:red"), ("image", "tab:blue")):
            points = report["curves"][kind]
            if points is None:
                continue
            auroc, ap = report[f"{kind}_auroc"], report[f"{kind}_ap"]
            roc.plot(points["fpr"], points["tpr"], color=colour, label=f"{kind}: {auroc:.3f}")
            pr.step(points["recall"], points["precision"], where="pre", color=colour, label=f"{kind}: {ap:.3f}")
        roc.plot([0, 1], [0, 1], color="0.8", linewidth=0.8)
        roc.set(xlabel="false positive rate", ylabel="true positive rate", title=f"{name}: ROC (AUROC)")
        pr.set(xlabel="recall", ylabel="precision", title="precision-recall (AP)", xlim=(0, 1), ylim=(0, 1.02))
        for axes in (roc, pr):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower right" if axes is roc else "upper right")
        figure.savefig(folder / f"{name}_curves.png", dpi=110)
        _histogram(Figure, folder / f"{name}_scores.png", name, report)


def write_shot_curves(folder: Path, shots: Mapping[str, Any]) -> None:
    """shots.png: AUROC by words and memory over the number of good parts, one line per class, with its interval.

    `shots`: the entry of results.json.
    """
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("pixel_auroc", "image_auroc"), strict=True):
        for name, entry in shots["sets"].items():
            points = []
            for line in entry["lines"]:
                key = "both" if "both" in line[metric] else "words"
                if key in line[metric]:
                    value = line[metric][key]
                    points.append((line["good_parts"], value, *line[f"{metric}_ci95"].get(key, (value, value))))
            if points:
                number, value, low, high = zip(*points, strict=True)
                (drawn,) = axes.plot(number, value, marker="o", label=name)
                axes.fill_between(number, low, high, color=drawn.get_color(), alpha=0.15)
        axes.set(xlabel="good parts", ylabel="AUROC", title=metric.replace("_auroc", "s"))
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(shots["shots"], [str(number) for number in shots["shots"]])
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(loc="lower right")
    figure.savefig(folder / "shots.png", dpi=110)


def _histogram(figure_type: Any, path: Path, name: str, report: Mapping[str, Any]) -> None:
    good, defective = report["image_scores"]["good"], report["image_scores"]["defective"]
    figure = figure_type(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    low, high = min([*good, *defective]), max([*good, *defective])
    bins = np.linspace(low, high if high > low else low + 1e-3, 31)
    axes.hist(good, bins, alpha=0.6, color="tab:green", label=f"good ({len(good)})")
    axes.hist(defective, bins, alpha=0.6, color="tab:red", label=f"defective ({len(defective)})")
    axes.set(xlabel="image score", ylabel="pictures", title=name)
    axes.legend()
    figure.savefig(path, dpi=110)
