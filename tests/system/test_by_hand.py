"""What a person at a terminal asks of a running agent, and hears where there is none."""

import json
import subprocess

from station import CLI, Make, free_port


def test_commands_by_hand(make_station: Make) -> None:
    station = make_station({"top": [("good", 0), ("good", 0)]}).start()

    def by_hand(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*CLI, "ask", *words, "--endpoint", station.control]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    reply = json.loads(by_hand("trigger", "camera=top", "trigger_id=7", "part_id=0012").stdout)
    assert reply == {"camera": "top", "trigger_id": "7", "part_id": "0012", "journalled": True}
    (verdict,) = station.until("verdict", 1)
    assert (verdict["part_id"], verdict["result"]) == ("0012", "pass")
    page = json.loads(by_hand("replay", "from_seq=1", "limit=1").stdout)
    assert (page["verdicts"][0]["part_id"], page["next_seq"], page["done"]) == ("0012", 2, True)
    table = by_hand("recipe.activate", "recipe=default", 'table={"object": "screw", "threshold": 0.5}')
    assert json.loads(table.stdout)["recipe"] == {"id": "default", "version": 2}
    for words, code, said in (
        (("nothing",), 1, "cmd 'nothing' is not known"),
        (("trigger", "top"), 2, "write KEY=VALUE"),
        (("trigger", "camera=side"), 1, "there is no 'side'"),
        (("feedback", "seq=1", f"label={'x' * 65}", "who=anna"), 1, "label must be a text of at most 64 characters"),
    ):
        done = by_hand(*words)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    station.stop()


def test_a_subscriber_says_that_nobody_is_there() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with subprocess.Popen([*CLI, "subscribe", "--endpoint", endpoint], stderr=subprocess.PIPE, text=True) as listening:
        assert listening.stderr is not None
        assert listening.stderr.readline().startswith(f"flawline: {endpoint} is silent: no agent there, a firewall")
        listening.terminate()
