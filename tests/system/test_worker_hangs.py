"""A worker that hangs where no frame is judged: pings are answered meanwhile, and no trigger may wait for it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from station import Make


def test_a_hang_outside_an_inspection_is_noticed_and_frames_keep_their_order(make_station: Make) -> None:
    station = make_station({"top": [("good", 0), ("bad", 0)]}, "[worker]\njob_limit_s = 2.0\n").start()
    with ThreadPoolExecutor(1) as other:
        hanging = other.submit(station.ask, "recipe.activate", camera="top", recipe="x", table={"object": "hang"})
        station.wait_for(lambda: hanging.running())
        station.trigger("top", *"ABCD")
        with pytest.raises(ValueError, match=r"did not take the recipe in time|worker died"):
            hanging.result()
    verdicts = station.until("verdict", 4, limit_s=90)
    assert [(verdict["trigger_id"], verdict["result"]) for verdict in verdicts] == [
        *(("A", "pass"), ("B", "fail"), ("C", "pass"), ("D", "fail"))
    ]
    assert station.status()["worker"]["restarts"] == 1
    station.stop()
