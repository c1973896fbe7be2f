"""What a pixel format's name says: kind, depth, packing. Names are GenICam's (PFNC) and GigE Vision's older ones."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from flawline.config.errors import ImageError

Kind = Literal["mono", "bayer", "rgb", "bgr", "yuv422"]
Packing = Literal["none", "p", "legacy"]
Colours = Literal["full601", "limited601", "limited709"]

_OLDER_NAMES = {
    "RGB8Packed": "RGB8",
    "BGR8Packed": "BGR8",
    "RGBA8Packed": "RGBa8",
    "BGRA8Packed": "BGRa8",
    "RGB10Packed": "RGB10",
    "BGR10Packed": "BGR10",
    "RGB12Packed": "RGB12",
    "BGR12Packed": "BGR12",
    "RGB16Packed": "RGB16",
    "BGR16Packed": "BGR16",
    "YUV422Packed": "YUV422_8_UYVY",
    "YUV422_YUYV_Packed": "YUV422_8",
    "YUYVPacked": "YUV422_8",
    "UYVYPacked": "YUV422_8_UYVY",
}
_RARE_CODES = {
    "RGB10": 0x0230_0018,
    "BGR10": 0x0230_0019,
    "RGB12": 0x0230_001A,
    "BGR12": 0x0230_001B,
    "RGB14": 0x0230_005E,
    "BGR14": 0x0230_004A,
    "RGB16": 0x0230_0033,
    "BGR16": 0x0230_004B,
    "RGBa10": 0x0240_005F,
    "BGRa10": 0x0240_004C,
    "RGBa12": 0x0240_0061,
    "BGRa12": 0x0240_004E,
    "RGBa14": 0x0240_0063,
    "BGRa14": 0x0240_0050,
    "RGBa16": 0x0240_0064,
    "BGRa16": 0x0240_0051,
    "YCbCr601_422_8": 0x0210_003E,
    "YCbCr601_422_8_CbYCrY": 0x0210_0044,
    "YCbCr709_422_8": 0x0210_0041,
    "YCbCr709_422_8_CbYCrY": 0x0210_0045,
    "BayerGR14": 0x0110_0109,
    "BayerRG14": 0x0110_010A,
    "BayerGB14": 0x0110_010B,
    "BayerBG14": 0x0110_010C,
}
"""PFNC's codes of those formats whose names a library need not know."""
_RARE_NAMES = {code: name for name, code in _RARE_CODES.items()}
_GREY = re.compile(r"(Mono|Bayer(RG|GR|GB|BG))(8|10|12|14|16)(p|Packed)?")
_COLOUR = re.compile(r"(RGB|BGR)(a?)(8|10|12|14|16)")
_YUV = re.compile(r"(?:YUV422|YCbCr(?:(601|709)_)?422)_8(_UYVY|_CbYCrY)?")


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """One pixel format.

    In memory: mono and bayer (H, W); rgb and bgr (H, W, 3), with alpha (H, W, 4); yuv422 (H, W, 2) uint8;
    uint16 where `bits` is more than 8. A packed one is a row of bytes, (N,) uint8, without padding of lines.
    """

    name: str
    kind: Kind
    bits: int = 8
    packing: Packing = "none"
    pattern: str = ""  # bayer: the colours of the first two pixels of the first line
    alpha: bool = False
    chroma_first: bool = False  # yuv422: U Y V Y rather than Y U Y V
    colours: Colours = "full601"  # yuv422: range and matrix

    @property
    def packed(self) -> bool:
        """True where pixels do not begin at byte boundaries."""
        return self.packing != "none"

    def bytes_of(self, height: int, width: int) -> int:
        """How many bytes a picture of this size has in memory."""
        pixels = height * width
        if self.packing == "legacy":
            return -(-pixels // 2) * 3
        if self.packing == "p":
            return -(-pixels * self.bits // 8)
        return pixels * self.channels * (2 if self.bits > 8 else 1)

    @property
    def channels(self) -> int:
        """Values per pixel in memory."""
        return {"mono": 1, "bayer": 1, "yuv422": 2}.get(self.kind, 4 if self.alpha else 3)

    @property
    def note(self) -> str | None:
        """What is lost on the way to 8 bit per colour, in words; None where nothing is."""
        if self.bits > 8:
            return f"{self.name} is judged at 8 bit: the lowest {self.bits - 8} of {self.bits} bits are rounded away"
        if self.kind == "yuv422":
            return f"{self.name} carries colour at half the width"
        return None


@lru_cache(maxsize=256)
def parse(name: str) -> PixelFormat:
    """The pixel format of that name. Raises ImageError for one that is not known."""
    known = _OLDER_NAMES.get(name, name)
    if match := _GREY.fullmatch(known):
        bits, suffix = int(match[3]), match[4]
        if suffix == "p" and bits in (10, 12):
            packing: Packing = "p"
        elif suffix == "Packed" and bits in (10, 12):
            packing = "legacy"
        elif suffix is None:
            packing = "none"
        else:
            raise ImageError(f"pixel format {name!r} is not known")
        return PixelFormat(name, "bayer" if match[2] else "mono", bits, packing, match[2] or "")
    if match := _COLOUR.fullmatch(known):
        kind: Kind = "rgb" if match[1] == "RGB" else "bgr"
        return PixelFormat(name, kind, int(match[3]), alpha=bool(match[2]))
    if match := _YUV.fullmatch(known):
        matrices: dict[str | None, Colours] = {None: "full601", "601": "limited601", "709": "limited709"}
        return PixelFormat(name, "yuv422", chroma_first=bool(match[2]), colours=matrices[match[1]])
    raise ImageError(f"pixel format {name!r} is not known")


def name_of_code(code: int) -> str | None:
    """The name of the format that a frame's head calls by that code; None where it is none of the rarer ones."""
    return _RARE_NAMES.get(code)


def depth_note(name: str) -> str | None:
    """What is lost of that format on the way to 8 bit, in words; None where nothing is, or the name is not known."""
    try:
        return parse(name).note
    except ImageError:
        return None
