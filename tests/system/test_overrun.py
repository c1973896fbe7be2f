"""Queue policy `latest`, where no camera waits: the newest frames are judged, and each skipped one is counted."""

from station import Make

PICTURES = 14


def test_latest_answers_and_counts_every_frame_that_it_skips(make_station: Make) -> None:
    recipe = '[recipes.default]\nqueue = "latest"\n[worker]\nqueue_depth = 2\n'
    station = make_station({"top": [("good", 300)] * PICTURES}, recipe, trigger="hardware", fps=50.0, loop=False)
    station.start()
    station.wait_for(lambda: station.status()["counters"]["verdicts"] == PICTURES)
    verdicts = station.ask("replay", from_seq=1)["verdicts"]
    assert sorted(verdict["frame_id"] for verdict in verdicts) == list(range(PICTURES))
    judged = [verdict["frame_id"] for verdict in verdicts if verdict["result"] == "pass"]
    skipped = [verdict["frame_id"] for verdict in verdicts if verdict["reason"] == "overrun"]
    assert len(judged) + len(skipped) == PICTURES
    assert judged == sorted(judged)
    assert skipped == sorted(skipped)
    assert len(skipped) >= 3
    assert judged[-2:] == [PICTURES - 2, PICTURES - 1], "the newest ones"
    assert all("newer frame" in verdict["detail"] for verdict in verdicts if verdict["reason"] == "overrun")
    status = station.status()
    assert status["dropped"]["queue:latest"] == len(skipped)
    assert (status["triggers"], status["pass"], status["error"]) == (PICTURES, len(judged), len(skipped))
    station.stop()
