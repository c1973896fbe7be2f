"""What a client may not do to a station, whoever let it in."""

import os
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from station import Make


def memory(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"cells": np.zeros(1, np.float32)}, path, {"sha256": "a" * 64})
    return path


def test_a_recipe_by_command_names_no_file_but_a_memory_of_the_station(make_station: Make) -> None:
    station = make_station(
        {"top": [("good", 0)]}, '[recipes.default]\n[recipes.own]\nmemory = "elsewhere/own.safetensors"\n'
    )
    own = memory(station.folder / "elsewhere/own.safetensors")
    station.start()

    def activate(name: str | Path) -> str:
        """The refusal, or nothing."""
        try:
            station.ask("recipe.activate", recipe="x", table={"memory": str(name)})
        except ValueError as error:
            return str(error).replace(str(name), "NAME")
        return ""

    secret = station.folder / "secret"
    secret.write_text("secret")
    pipe = station.folder / "memory" / "pipe"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    link = pipe.with_name("link")
    link.symlink_to(secret)
    folder = pipe.with_name("folder")
    folder.mkdir()
    there = memory(folder / "deeper.safetensors")
    refusals = {
        activate(name)
        for name in (
            secret,
            station.folder / "nothing",
            link,
            there,
            pipe.parent / "../secret",
            "/etc/shadow",
            "memory/pipe",
        )
    }
    assert len(refusals) == 1, "nothing tells whether it is there"
    assert "no memory of this station" in refusals.pop()
    began = time.monotonic()
    assert "no regular file" in activate(pipe)
    assert "no regular file" in activate(folder)
    assert time.monotonic() - began < 10, "a pipe is not waited for"
    assert "cannot be read" in activate(pipe.with_name("none.safetensors"))
    for name in (
        memory(station.folder / "memory/x.0001.aaaaaaaaaaaa.safetensors"),
        memory(station.folder / "state/memory/x.0001.aaaaaaaaaaaa.safetensors"),
        own,
    ):
        assert activate(name) == ""
    station.stop()
