"""What changes how the line judges leaves a trace: what, and whose key asked for it."""

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import zmq.asyncio
from structlog.testing import capture_logs

from flawline.agent.control import Control, ask
from flawline.agent.security import Doorkeeper, make_keys
from flawline.config.settings import ControlSettings, PublishSettings


class Commands:
    """Answers every request."""

    async def do(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["cmd"] == "recipe.activate":
            if request["recipe"] == "nothing":
                raise ValueError("there is none")
            return {"cameras": ["top"], "recipe": {"id": request["recipe"], "version": 7}}
        return {}


async def test_a_command_that_changes_the_judging_is_logged_with_the_key_that_sent_it(tmp_path: Path) -> None:
    (tmp_path / "clients").mkdir()
    make_keys(tmp_path, "curve")
    make_keys(tmp_path, "gateway")
    shutil.copy(tmp_path / "gateway.public", tmp_path / "clients")
    context = zmq.asyncio.Context()
    door = Doorkeeper(context, {"control": tmp_path / "clients"})
    settings = ControlSettings(
        endpoint=f"ipc://{tmp_path}/control", curve_secret=tmp_path / "curve.secret", curve_clients=tmp_path / "clients"
    )
    served = Control(context, settings, PublishSettings())
    tasks = [asyncio.create_task(door.serve()), asyncio.create_task(served.serve(cast(Any, Commands())))]
    keys = (tmp_path / "curve.public", tmp_path / "gateway.secret")
    with capture_logs() as said:
        for request in (
            {"cmd": "status"},
            {"cmd": "pause", "camera": "x" * 5000},  # nobody looks at that
            {"cmd": "recipe.activate", "camera": "top", "recipe": "bolt"},
            {"cmd": "feedback", "seq": 4, "label": "good", "who": "somebody else"},
        ):
            await asyncio.to_thread(ask, settings.endpoint, request | {"id": 1}, 20.0, keys)
        with pytest.raises(ValueError, match="there is none"):
            await asyncio.to_thread(ask, settings.endpoint, {"cmd": "recipe.activate", "recipe": "nothing"}, 20.0, keys)
    noted = [
        {key: value for key, value in entry.items() if key not in ("log_level", "address")}
        for entry in said
        if entry["event"].startswith("command_")
    ]
    assert noted == [
        {"event": "command_pause", "who": "gateway"},
        {
            "event": "command_recipe_activate",
            "camera": "top",
            "cameras": ["top"],
            "recipe": "bolt@7",
            "who": "gateway",
        },
        {"event": "command_feedback", "seq": 4, "label": "good", "who": "gateway"},
    ]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    served.close()
    door.close()
    context.destroy(linger=0)
