"""Dashboard and alert rules: read by their own tools, and asking for nothing that the agent does not tell."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from needs import need_command

from flawline.agent.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "systemd/monitoring"
RULES, DASHBOARD = FOLDER / "flawline.rules.yml", FOLDER / "grafana-dashboard.json"


def a_status() -> dict[str, Any]:
    return {
        "triggers": 0,
        "waiting": 0,
        "late_waiting": 0,
        "in_flight": 0,
        "worker": {"restarts": 0},
        "state": "running",
        "cameras": {"top": {"up": True, "state": "up"}},
        "journal": {"unwritten": 0},
    }


def text_of(status: dict[str, Any]) -> str:
    return Metrics(lambda: status, Counter(), Counter()).text().decode()


@pytest.fixture(scope="module")
def told() -> set[str]:
    """Names of the series that an agent exposes."""
    text = text_of(a_status())
    return set(re.findall(r"^(flawline_\w+)", text, re.MULTILINE)) | {"flawline_frames_dropped_total"}


def asked(text: str) -> set[str]:
    return set(re.findall(r"\bflawline_[a-z_]+\b", text))


def test_the_dashboard_asks_for_what_there_is_and_shows_all_of_it(told: set[str]) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    wanted = asked(" ".join(expressions))
    assert wanted <= told
    of_the_contract = {name for name in told if not name.endswith(("_created", "_bucket", "_count", "_sum"))}
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in wanted}
    assert of_the_contract - shown <= {"flawline_preview_viewers", "flawline_preview_frames_encoded_total"}
    # Panels lie beside each other, none on another one.
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_camera_is_down_only_where_something_is_wrong_with_it() -> None:
    def up(state: str, camera: str) -> dict[str, str]:
        status = a_status() | {"state": state, "cameras": {"top": {"up": camera == "up", "state": camera}}}
        return dict(re.findall(r'^flawline_camera_up{camera="(\w+)"} (\S+)', text_of(status), re.MULTILINE))

    assert up("starting", "closed") == {}, "the models are being loaded"
    assert up("degraded", "lost") == {"top": "0.0"}
    assert up("degraded", "closed") == {"top": "0.0"}, "it does not open"
    assert up("running", "ended") == {"top": "1.0"}, "a folder that was read to its end"
    assert up("running", "up") == {"top": "1.0"}


def test_verdicts_that_wait_for_the_journal_are_counted() -> None:
    text = text_of(a_status() | {"journal": {"unwritten": 17}})
    assert "flawline_journal_unwritten_verdicts 17.0" in text


def test_the_rules_ask_for_what_there_is(told: set[str]) -> None:
    expressions = re.findall(r"expr: (.*?)\n {8}(?:for|labels):", RULES.read_text(), re.DOTALL)
    assert len(expressions) == RULES.read_text().count("- alert:")
    assert asked(" ".join(expressions)) <= told


@pytest.fixture(scope="module")
def promtool() -> str:
    """Of Debian's package `prometheus`."""
    return need_command("promtool", "prometheus")


def test_promtool_finds_nothing_wrong_and_alerts_fire_when_they_should(promtool: str, tmp_path: Path) -> None:
    done = subprocess.run([promtool, "check", "rules", RULES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    scenario = tmp_path / "scenario.yml"
    scenario.write_text(f"""
rule_files: [{RULES}]
evaluation_interval: 15s
tests:
  - interval: 15s
    input_series:
      - {{series: 'flawline_camera_up{{camera="top", instance="a", job="flawline"}}', values: '1x8 0x40'}}
      - {{series: 'flawline_camera_up{{camera="side", instance="a", job="flawline"}}', values: '1x48'}}
      - {{series: 'flawline_triggers_total{{instance="a", job="flawline"}}', values: '0+1x8 12x40'}}
      - {{series: 'flawline_verdicts_total{{result="pass", instance="a", job="flawline"}}', values: '0+1x8 8x40'}}
      - {{series: 'flawline_last_verdict_timestamp_seconds{{instance="a", job="flawline"}}', values: '0+15x8 120x40'}}
      - {{series: 'flawline_worker_restarts_total{{instance="a", job="flawline"}}', values: '0x48'}}
      - {{series: 'flawline_journal_unwritten_verdicts{{instance="a", job="flawline"}}', values: '0x8 7x40'}}
    alert_rule_test:
      - {{eval_time: 1m, alertname: FlawlineJournalNotWritten}}
      - eval_time: 8m
        alertname: FlawlineJournalNotWritten
        exp_alerts:
          - exp_labels: {{severity: critical, instance: a, job: flawline}}
            exp_annotations:
              summary: "7 verdicts of a are not in its journal: its disk takes nothing"
              remedy: "df -h on the journal's disk; journalctl -u flawline@STATION -p warning"
      - {{eval_time: 1m, alertname: FlawlineCameraDown}}
      - {{eval_time: 1m, alertname: FlawlineVerdictsOwed}}
      - {{eval_time: 8m, alertname: FlawlineWorkerRestarts}}
      - eval_time: 8m
        alertname: FlawlineCameraDown
        exp_alerts:
          - exp_labels: {{severity: critical, camera: top, instance: a, job: flawline}}
            exp_annotations:
              summary: "camera top of a sends no frames; its triggers are answered camera_fault"
              remedy: "cable and power of the camera; flawline cameras list"
      - eval_time: 8m
        alertname: FlawlineVerdictsOwed
        exp_alerts:
          - exp_labels: {{severity: critical, instance: a, job: flawline}}
            exp_annotations:
              summary: "a owes 4 verdicts and has published none for a minute"
              remedy: "journalctl -u flawline@STATION; the service restarts by its watchdog where nothing moves"
""")
    done = subprocess.run([promtool, "test", "rules", scenario], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
