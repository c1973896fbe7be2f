"""What the agent and its worker say to each other: msgpack maps over a SEQPACKET socket pair, one a packet.

Agent to worker:   load, inspect, recipe, learn, ping, stop
Worker to agent:   ready, failed, began, result, refined, unrefined, failed_job, recipe, learn, collected, pong

A `result` with `refining` is CLIP's alone; `refined`, or `unrefined` where other frames were waiting, ends its job.

Frames, masks and maps do not travel here but in the ring; a message names the slot. Times named `_mono` are
CLOCK_MONOTONIC seconds, which both processes share. No torch here.
"""

from typing import Any

import msgpack

PACKET_BYTES = 200_000
"""Largest packet, below Linux' default socket buffer; see MAX_DEFECTS for what keeps a result below it."""

MAX_DEFECTS = 1000
"""Defects that travel with one result, largest first; the mask always holds all of them."""

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """One message as bytes."""
    data: bytes = msgpack.packb(message, use_bin_type=True)
    return data


def unpack(data: bytes) -> Message:
    """One message from bytes. Raises ValueError where it is not a map with an `op`."""
    message = msgpack.unpackb(data, raw=False, strict_map_key=True)
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ValueError("not a message")
    return message


def that_fit(recipes: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Those that `load` can carry in one packet, and those that are to follow in `recipe` messages of their own."""
    first: dict[str, dict[str, Any]] = {}
    rest: dict[str, dict[str, Any]] = {}
    room = PACKET_BYTES * 3 // 4
    for key, table in recipes.items():
        room -= len(pack({key: table}))
        (first if room >= 0 else rest)[key] = table
    return first, rest


def load(
    bundle: str,
    device: str,
    precision: str,
    threads: int | None,
    recipes: dict[str, dict[str, Any]],
    *,
    maps: bool = True,
) -> Message:
    """Load and warm the models. `recipes` maps names to `Recipe.model_dump(mode="json")`.

    `maps`: whether anybody looks at the anomaly maps in the ring.
    """
    return {
        "op": "load",
        "bundle": bundle,
        "device": device,
        "precision": precision,
        "threads": threads,
        "recipes": recipes,
        "maps": maps,
    }


def inspect(
    job: int,
    slot: int,
    height: int,
    width: int,
    recipe: str,
    deadline_mono: float | None,
    learn: str | None = None,
) -> Message:
    """Judge the picture in `slot` by the recipe of that key (a name and a version, see `recipe`).

    With `learn`, a name for the picture, it is learnt from afterwards; one `collected` answers that.
    """
    return {
        "op": "inspect",
        "job": job,
        "slot": slot,
        "height": height,
        "width": width,
        "recipe": recipe,
        "deadline_mono": deadline_mono,
        "learn": learn,
    }


def recipe(key: str, table: dict[str, Any]) -> Message:
    """Make a recipe known under a key before frames name it."""
    return {"op": "recipe", "key": key, "table": table}


def learn(number: int, action: str, fields: dict[str, Any]) -> Message:
    """`start` (key, recipe), `commit` (folder, keep_all) or `discard` a collection of good parts.

    The answer names `number`.
    """
    return {"op": "learn", "n": number, "action": action, "fields": fields}
