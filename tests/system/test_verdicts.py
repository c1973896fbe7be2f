"""One trigger, exactly one verdict: what a PLC programmer relies on, seen from a subscriber and a client."""

import contextlib
import os
import resource
import signal
import subprocess
import time
import urllib.request
from typing import Any

import cv2
import pytest
from station import Make, Station


def by_trigger(verdicts: list[dict[str, Any]]) -> dict[str, str]:
    """trigger_id -> result or reason; a trigger that was answered twice fails the test."""
    answers: dict[str, str] = {}
    for verdict in verdicts:
        assert verdict["trigger_id"] not in answers
        answers[verdict["trigger_id"]] = verdict["reason"] or verdict["result"]
    return answers


def test_triggers_are_answered_in_order_and_only_when_they_make_sense(make_station: Make) -> None:
    station = make_station({"top": [("good", 0), ("bad", 0), ("wrong", 0), ("unreadable", 0)], "free": [("good", 0)]})
    text = station.config.read_text().replace('"free", "loop": true', "")
    station.config.write_text(text)
    station.start("--set", "cameras.free.trigger=free", "--set", "cameras.free.loop=false")
    (own,) = station.until("verdict", 1)
    assert (own["camera"], own["result"], own["trigger_id"]) == ("free", "pass", None)
    for camera, said in (("none", "there is no 'none'"), ("free", "commands need 'software'")):
        with pytest.raises(ValueError, match=said):
            station.ask("trigger", camera=camera)
    with pytest.raises(ValueError, match="camera must be a text"):
        station.ask("trigger")
    station.trigger("top", "A", "B", "C", "D")
    verdicts = station.until("verdict", 5)[1:]
    assert by_trigger(verdicts) == {"A": "pass", "B": "fail", "C": "internal", "D": "bad_frame"}
    assert [verdict["seq"] for verdict in station.of("verdict")] == [1, 2, 3, 4, 5]
    assert [verdict["camera_seq"] for verdict in verdicts] == [1, 2, 3, 4]
    assert verdicts[0]["part_id"] == "part of A"
    assert verdicts[0]["t_trigger"] <= verdicts[0]["t_grab"] <= verdicts[0]["t_done"] <= verdicts[0]["t_publish"]
    (mask,) = station.until("mask", 1)
    assert (mask["seq"], mask["refined"]) == (verdicts[1]["seq"], False)
    status = station.status()
    assert (status["triggers"], status["pass"], status["fail"], status["error"]) == (5, 2, 1, 2)
    assert status["counters"]["owed"] == 0
    station.stop()
    last = station.of("status")[-1]
    assert (last["state"], last["last_seq"]) == ("stopping", 5)


def test_a_deadline_is_kept_and_the_real_result_follows_late(make_station: Make) -> None:
    orders = [("good", 300), ("bad", 300), ("degraded", 400), ("good", 0)]
    station = make_station({"top": orders}, "[recipes.default]\ndeadline_ms = 150\n").start()
    for name in ("slow and good", "slow and bad"):
        sent = time.monotonic()
        station.trigger("top", name)
        verdict = station.until("verdict", len(station.of("verdict")) + 1)[-1]
        assert (verdict["result"], verdict["reason"]) == ("error", "deadline")
        assert 0.140 < verdict["t_received"] - sent < 0.260
        assert 149e6 < verdict["mono_publish"] - verdict["mono_trigger"] < 260e6
        late = station.until("late", len(station.of("late")) + 1)[-1]
        assert (late["seq"], late["camera_seq"]) == (verdict["seq"], verdict["camera_seq"])
        assert late["result"] == name.rsplit(" ", 1)[-1].replace("good", "pass").replace("bad", "fail")
    station.trigger("top", "degraded", "waits behind it")
    # The first one is answered from the CLIP map; the second waits for SAM's refinement of the first.
    assert by_trigger(station.until("verdict", 4)[2:]) == {"degraded": "clip_only", "waits behind it": "deadline"}
    degraded = next(verdict for verdict in station.of("verdict") if verdict["degraded"])
    assert (degraded["result"], degraded["defects"][0]["area_px"]) == ("fail", 16)
    assert station.until("late", 3)[-1]["trigger_id"] == "waits behind it"
    masks = [mask for mask in station.until("mask", 3) if mask["seq"] == degraded["seq"]]
    assert [mask["refined"] for mask in masks] == [False, True]
    payloads = [payload for topic, head, payload in station.messages if topic.startswith("mask/") and head in masks]
    assert payloads[0] != payloads[1]
    replayed = station.ask("replay", from_seq=1)
    assert [late["seq"] for late in replayed["late"]] == sorted(late["seq"] for late in station.of("late"))
    station.stop()


def test_a_refinement_gives_way_to_frames_that_wait(make_station: Make) -> None:
    station = make_station(
        {"top": [("hurried", 400), ("hurried", 0)]}, "[recipes.default]\ndeadline_ms = 5000\n"
    ).start()
    station.trigger("top", "A", "B")
    first, second = station.until("verdict", 2)
    assert (first["trigger_id"], first["reason"], second["reason"]) == ("A", "clip_only", "clip_only")
    masks = station.until("mask", 3)
    assert sorted((mask["seq"], mask["refined"]) for mask in masks) == [(1, False), (2, False), (2, True)]
    station.wait_for(lambda: station.status()["dropped"].get("refinement:busy") == 1)
    station.wait_for(lambda: station.status()["in_flight"] == 0)
    station.stop()


def test_overruns_are_answered_by_the_recipes_policy(make_station: Make) -> None:
    station = make_station({"top": [("good", 400)]}, "[worker]\nqueue_depth = 2\n").start()
    station.trigger("top", *"ABCDEFG")
    answers = by_trigger(station.until("verdict", 7))
    assert list(answers.values()).count("overrun") == 3  # two with the worker, two that wait
    assert [name for name, answer in answers.items() if answer == "pass"] == list("ABCD")
    station.stop()


def test_a_worker_that_dies_hangs_or_stops_costs_only_its_frame(make_station: Make) -> None:
    orders = [
        ("crash", 0),
        ("good", 0),
        ("hang", 0),
        ("good", 0),
        ("stop", 0),
        ("good", 0),
        ("oom", 0),
        ("oom_once", 0),
    ]
    limits = "[worker]\njob_limit_s = 1.0\nping_limit_s = 2.0\nrestarts_per_minute = 10\n"
    station = make_station({"top": orders}, limits).start()
    station.trigger("top", *"ABCDEFGH")
    answers = by_trigger(station.until("verdict", 8, limit_s=90))
    lost, well = "worker_lost", "pass"
    assert answers == {
        **{"A": lost, "B": well, "C": lost, "D": well, "E": lost, "F": well, "G": "out_of_memory", "H": well}
    }
    assert station.status()["worker"]["restarts"] == 3
    station.stop()


def test_a_worker_that_will_not_live_leaves_no_trigger_unanswered(make_station: Make) -> None:
    station = make_station({"top": [("crash", 0)]}, "[worker]\nrestarts_per_minute = 1\n").start()
    for number in range(4):
        station.trigger("top", f"T{number}")
        station.until("verdict", number + 1)
    assert set(by_trigger(station.of("verdict")).values()) == {"worker_lost"}
    station.wait_for(lambda: not station.status()["worker"]["healthy"])
    assert station.status()["state"] == "degraded"
    station.stop()


def test_no_frame_is_a_camera_fault_and_no_late_frame_is_taken_for_the_next(make_station: Make) -> None:
    station = make_station({"top": [("good", 0), ("bad", 0)]}, loop=False, trigger_timeout_ms=500).start()
    station.trigger("top", "A", "B")
    station.until("verdict", 2)
    station.trigger("top", "C")
    (fault,) = station.until("verdict", 3)[2:]
    assert (fault["reason"], fault["frame_id"]) == ("camera_fault", None)
    assert "trigger_timeout_ms = 500" in fault["detail"]
    (station.folder / "top").rename(station.folder / "away")
    station.wait_for(lambda: station.status()["cameras"]["top"]["state"] == "lost")
    station.trigger("top", "D")
    assert station.until("verdict", 4)[3]["reason"] == "camera_fault"
    (station.folder / "away").rename(station.folder / "top")
    station.wait_for(lambda: station.status()["cameras"]["top"]["up"])
    station.stop()


def test_a_missing_frame_is_a_camera_fault_before_it_is_a_missed_deadline(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}, "[recipes.default]\ndeadline_ms = 1500\n", loop=False).start()
    station.trigger("top", "A")
    station.until("verdict", 1)
    station.trigger("top", "B", "C")
    first, second = station.until("verdict", 3)[1:]
    for verdict in (first, second):
        assert (verdict["result"], verdict["reason"]) == ("error", "camera_fault")
        assert verdict["detail"] == "no frame from 'top' within deadline_ms = 1500"
        assert verdict["mono_publish"] - verdict["mono_trigger"] <= 1900e6  # the camera's own limit is 2000 ms
    assert first["mono_publish"] - first["mono_trigger"] > 1200e6
    station.stop()
    assert station.of("late") == []


def test_pause_answers_triggers_and_takes_in_no_free_frames(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]}).start()
    assert station.ask("pause")["paused"]
    station.trigger("top", "A")
    assert station.until("verdict", 1)[0]["reason"] == "paused"
    assert station.status()["state"] == "paused"
    station.ask("resume")
    station.trigger("top", "B")
    assert station.until("verdict", 2)[1]["result"] == "pass"
    station.stop()


def test_after_kill_9_each_open_trigger_is_answered_once(make_station: Make) -> None:
    station = make_station({"top": [("good", 0), ("good", 2000)]}).start()
    station.trigger("top", "A")
    station.until("verdict", 1)
    station.trigger("top", "B", "C")
    station.kill()
    station.start()
    station.trigger("top", "D")
    station.wait_for(lambda: station.status()["counters"]["owed"] == 0)
    verdicts = station.ask("replay", from_seq=1)["verdicts"]
    assert [verdict["seq"] for verdict in verdicts] == [1, 2, 3, 4]
    assert by_trigger(verdicts) == {"A": "pass", "B": "agent_restart", "C": "agent_restart", "D": "pass"}
    assert verdicts[1]["boot_id"] != verdicts[0]["boot_id"]
    status = station.status()
    assert status["triggers"] == status["counters"]["verdicts"] == 3
    station.stop()


def test_hardware_triggered_frames_are_owed_a_verdict_even_after_kill_9(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)] * 3 + [("good", 2500)] * 3}, trigger="hardware", fps=20, loop=False)
    station.start()
    with pytest.raises(ValueError, match="hardware"):
        station.ask("trigger", camera="top")
    station.wait_for(lambda: station.status()["triggers"] == 6)
    station.ask("feedback", seq=1, label="bad", who="anna")  # the journal has taken all that came before this
    station.kill()
    station.start("--set", "cameras.top.trigger=software")
    verdicts = station.ask("replay", from_seq=1)["verdicts"]
    assert [verdict["reason"] or verdict["result"] for verdict in verdicts] == ["pass"] * 3 + ["agent_restart"] * 3
    assert verdicts[3]["t_trigger"] > verdicts[2]["t_trigger"]
    station.stop()


def test_an_announced_part_names_the_next_hardware_triggered_frame(make_station: Make) -> None:
    more = {"trigger": "hardware", "fps": 0.4, "loop": True, "trigger_timeout_ms": 1200}
    station = make_station({"top": [("good", 0)]}, **more).start()

    def next_verdict() -> dict[str, Any]:
        station.messages.clear()
        (verdict,) = station.until("verdict", 1)
        return verdict

    def after_a_frame() -> None:
        """Then the next frame is 2.5 s away."""
        while next_verdict()["result"] == "error":
            pass

    with pytest.raises(ValueError, match="'hardware'; commands need 'software'"):
        station.ask("trigger", camera="top")
    after_a_frame()
    time.sleep(1.7)
    assert station.ask("announce", camera="top", trigger_id="T1", part_id="P1")["journalled"]
    verdict = next_verdict()
    assert (verdict["result"], verdict["trigger_id"], verdict["part_id"]) == ("pass", "T1", "P1")
    assert verdict["t_trigger"] == verdict["t_grab"]

    # No frame in time: the part gets its verdict all the same, and the frame that comes later is not its.
    station.ask("announce", camera="top", part_id="P2")
    fault, later = next_verdict(), next_verdict()
    assert (fault["reason"], fault["part_id"], fault["frame_id"]) == ("camera_fault", "P2", None)
    assert "trigger_timeout_ms = 1200" in fault["detail"]
    assert (later["result"], later["part_id"]) == ("pass", None)

    # Two before one frame: the first one's frame did not come, and the second one keeps its own.
    time.sleep(1.7)
    station.ask("announce", camera="top", part_id="P3")
    station.ask("announce", camera="top", part_id="P4")
    fault, verdict = next_verdict(), next_verdict()
    assert (fault["reason"], fault["part_id"]) == ("camera_fault", "P3")
    assert (verdict["result"], verdict["part_id"]) == ("pass", "P4")

    # What was accepted is owed a verdict, over a crash as well.
    time.sleep(0.2)
    station.ask("announce", camera="top", part_id="P5")
    station.kill()
    station.start("--set", "cameras.top.trigger=software")
    last = station.ask("replay", from_seq=1)["verdicts"][-1]
    assert (last["reason"], last["part_id"]) == ("agent_restart", "P5")
    with pytest.raises(ValueError, match="parts are announced to 'hardware'"):
        station.ask("announce", camera="top")
    station.stop()


def test_recipes_switch_between_two_frames_and_bad_ones_are_refused(make_station: Make) -> None:
    station = make_station(
        {"top": [("good", 0)], "side": [("good", 0)]}, "[recipes.default]\n[recipes.other]\nthreshold = 0.7\n"
    )
    station.start()
    refused = (
        ({"recipe": "nothing"}, "there is no 'nothing'"),
        ({"recipe": "default", "table": {"treshold": 0.5}}, "did you mean 'threshold'"),
        ({"recipe": "default", "table": {"threshold": 7}}, "threshold"),
        ({"recipe": "default", "table": {"object": "refuse me"}}, "told to refuse"),
        ({"recipe": "../etc", "table": {}}, "must match"),
        ({"recipe": "default", "table": 3}, "table must be a map"),
    )
    for request, said in refused:
        with pytest.raises(ValueError, match=said):
            station.ask("recipe.activate", camera="top", **request)
    assert station.ask("recipe.list")["active"]["top"] == {"id": "default", "version": 1}
    assert station.ask("recipe.activate", camera="top", recipe="other")["threshold"] == 0.7
    new = station.ask("recipe.activate", camera="side", recipe="other", table={"threshold": 0.8, "deadline_ms": 5000})
    assert (new["recipe"], new["threshold"]) == ({"id": "other", "version": 2}, 0.8)
    station.trigger("top", "A")
    station.trigger("side", "B")
    used = {verdict["trigger_id"]: verdict for verdict in station.until("verdict", 2)}
    assert [used[name]["recipe"]["version"] for name in "AB"] == [1, 2]
    assert (used["B"]["deadline_ms"], used["A"]["deadline_ms"]) == (5000, None)
    assert used["A"]["provenance"]["recipe_sha256"] != used["B"]["provenance"]["recipe_sha256"]
    assert station.ask("threshold.get", camera="side")["threshold"] == 0.8
    station.kill()
    station.start()  # what was activated still holds
    assert station.status()["recipe"] == {"top": {"id": "other", "version": 1}, "side": {"id": "other", "version": 2}}
    os.kill(station.status()["worker"]["pid"], signal.SIGKILL)
    station.trigger("side", "C")
    assert station.until("verdict", 3)[2]["recipe"] == {"id": "other", "version": 2}
    station.stop()


def limit_files(station: Station, size: int) -> None:
    """No file of the agent may grow beyond so many bytes: less than a page, and its disk is as good as full."""
    assert station.process is not None
    _, hard = resource.prlimit(station.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(station.process.pid, resource.RLIMIT_FSIZE, (hard if size < 0 else size, hard))


def test_a_full_disk_stops_neither_verdicts_nor_numbers(make_station: Make) -> None:
    station = make_station({"top": [("good", 0), ("bad", 0)]}).start()
    station.trigger("top", "A")
    station.until("verdict", 1)

    def unjournalled(name: str, number: int) -> None:
        reply = station.ask("trigger", camera="top", trigger_id=name)
        verdict = station.until("verdict", number)[-1]
        assert (reply["journalled"], verdict["journalled"], verdict["seq"]) == (False, False, number)

    limit_files(station, 4000)
    unjournalled("B", 2)
    unjournalled("C", 3)
    status = station.status()
    assert (status["state"], status["journal"]["ok"], status["journal"]["unwritten"]) == ("degraded", False, 2)
    with urllib.request.urlopen(station.page + "/readyz", timeout=10) as ready:
        assert ready.status == 200  # verdicts go on
    replayed = station.ask("replay", from_seq=1)["verdicts"]
    assert [verdict["trigger_id"] for verdict in replayed] == list("ABC")
    limit_files(station, -1)
    station.wait_for(lambda: station.status()["journal"]["unwritten"] == 0)
    station.wait_for(lambda: station.status()["state"] == "running")
    limit_files(station, 4000)
    unjournalled("D", 4)
    station.kill()
    station.start()
    station.trigger("top", "E")
    assert station.until("verdict", 5)[-1]["journalled"]
    replayed = station.ask("replay", from_seq=1)["verdicts"]
    assert by_trigger(replayed) == {"A": "pass", "B": "fail", "C": "pass", "D": "fail", "E": "pass"}
    assert [verdict["seq"] for verdict in replayed] == [1, 2, 3, 4, 5]
    station.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_the_agent_starts_on_a_full_disk(make_station: Make) -> None:
    station = make_station({"top": [("good", 0)]})
    state = station.folder / "state"
    state.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(state)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        station.start()
        station.trigger("top", "A")
        station.until("verdict", 1)
        station.stop()  # in order: the log's file is gone, and opening must make a new one
        with contextlib.suppress(OSError), (state / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)) == 4096:
                pass
        station.start()
        for number in range(300):
            station.trigger("top", f"T{number}")
        verdicts = station.until("verdict", 301, limit_s=120)
        assert not verdicts[-1]["journalled"]
        assert [verdict["seq"] for verdict in verdicts] == list(range(1, 302))
        station.kill()
        (state / "filler").unlink()
        station.start()
        seqs, first, done = [], 1, False
        while not done:
            page = station.ask("replay", from_seq=first)
            seqs += [verdict["seq"] for verdict in page["verdicts"]]
            first, done = page["next_seq"], page["done"]
        assert seqs == list(range(1, 302))
        station.stop()
    finally:
        station.close()
        subprocess.run(["umount", str(state)], check=False)


def test_pictures_of_failed_parts_are_kept_under_a_budget(make_station: Make) -> None:
    station = make_station({"top": [("bad", 0), ("good", 0)]})
    keep = ["--set", "journal.archive_mb=0.002", "--set", "journal.archive_good_every=0"]
    station.start(*keep, "--set", "journal.min_free_mb=1", "--set", "journal.archive_format=png")
    for number in range(40):
        station.trigger("top", str(number))
        station.until("verdict", number + 1)
    pictures = station.folder / "state" / "line1" / "pictures" / "top"
    station.wait_for(lambda: any("000000000039" in path.name for path in pictures.iterdir()))
    names = sorted(path.name for path in pictures.iterdir())
    assert sum(path.stat().st_size for path in pictures.iterdir()) <= 2000
    assert 1 < len(names) < 20
    assert all(name.endswith("-fail.png") for name in names)
    kept = cv2.imread(str(pictures / names[-1]))
    assert (kept == cv2.imread(str(station.folder / "top" / "0000.png"))).all()
    station.stop()
    station.start(*keep, "--set", "journal.min_free_mb=1e9")
    station.trigger("top", "no room")
    station.until("verdict", 41)
    station.wait_for(lambda: "min_free_mb" in (station.status()["journal"]["archive"]["trouble"] or ""))
    assert sorted(path.name for path in pictures.iterdir()) == names
    station.stop()
