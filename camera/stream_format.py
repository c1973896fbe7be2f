"""What OpenCV's 8-bit BGR picture has lost against the pixels that a stream or a V4L2 device really carries."""

_COLOUR = {
    "half the width and height": {"I420", "YV12", "IYUV", "NV12", "NV21", "YU12"},
    "half the width": {"YUYV", "YUY2", "UYVY", "Y42B", "422P", "NV16", "YVYU"},
}
_DEEP_GREY = {"Y10 ": 10, "Y12 ": 12, "Y14 ": 14, "Y16 ": 16}
_KNOWN_WHOLE = {"BGR3", "RGB3", "BGR\x18", "RGB\x18", "BGRA", "RGBA", "ABGR", "ARGB", "Y800", "GREY", "Y8  ", "444P"}
_LEAST_DEEP, _MOST_DEEP = 9, 16


def note_of_tag(tag: int) -> str | None:
    """In words, what is lost; None where nothing is.

    `tag` is a FOURCC, lowest byte first, or FFmpeg's tag of a deep raw format (libavcodec/raw.c): `Y1`, `Y3` or `G3`,
    how colour is halved (11: both ways, 10: the width), and the bits per value; the other way round for big-endian.
    """
    text = tag.to_bytes(8, "little", signed=True)[:4].decode("latin-1")
    if text[3] in "YG" and _LEAST_DEEP <= ord(text[0]) <= _MOST_DEEP:
        text = text[::-1]
    bits = _DEEP_GREY.get(text, ord(text[3]))
    where = next((size for size, names in _COLOUR.items() if text in names), None)
    if text[0] in "YG" and _LEAST_DEEP <= bits <= _MOST_DEEP:
        where = {11: "half the width and height", 10: "half the width"}.get(ord(text[2]))
        depth = f"its {bits} bits arrive as 8: the lowest {bits - 8} are lost"
        return f"{depth}, and colour comes at {where}" if where else depth
    if where:
        return f"the source carries colour at {where}"
    if text in _KNOWN_WHOLE:
        return None
    shown = text.strip() if text.isascii() and text.isprintable() else ""
    return f"OpenCV makes 8-bit BGR of it and does not tell how deep {shown or 'the source'} is"
