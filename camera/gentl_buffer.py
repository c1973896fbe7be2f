"""The picture in a buffer of a GenTL producer, byte for byte as the camera sent it."""

from typing import Any

import numpy as np
from genicam import gentl
from harvesters.util.pfnc import dict_by_ints

from flawline.camera.buffers import as_picture
from flawline.camera.features import FeatureMap
from flawline.camera.frame import Pixels
from flawline.config.errors import ImageError

_PAYLOADS, _PARTS = gentl.PAYLOADTYPE_INFO_IDS, gentl.PARTDATATYPE_IDS
_NO_PICTURE = (
    _PAYLOADS.PAYLOAD_TYPE_UNKNOWN,
    _PAYLOADS.PAYLOAD_TYPE_RAW_DATA,
    _PAYLOADS.PAYLOAD_TYPE_FILE,
    _PAYLOADS.PAYLOAD_TYPE_JPEG,
    _PAYLOADS.PAYLOAD_TYPE_JPEG2000,
    _PAYLOADS.PAYLOAD_TYPE_H264,
    _PAYLOADS.PAYLOAD_TYPE_CHUNK_ONLY,
)


def picture_of(buffer: Any, features: FeatureMap) -> tuple[Pixels, str, tuple[int, int]]:
    """A view of the buffer as `PixelFormat` says, the format's name, and height and width.

    `buffer` is a genicam.gentl.Buffer, as harvesters fetches it raw: harvesters' own components unpack packed formats,
    for every frame, and fail with some. What the producer does not tell is asked of the camera.
    Raises ImageError where there is no picture, or one that cannot be judged.
    """
    payload = told(buffer, "payload_type")
    if payload in _NO_PICTURE:
        raise ImageError(f"the producer delivered no picture, but payload type {payload}")
    if payload == _PAYLOADS.PAYLOAD_TYPE_MULTI_PART:
        source = next((part for part in buffer.parts if part.data_type == _PARTS.PART_DATATYPE_2D_IMAGE), None)
        if source is None:
            raise ImageError("the producer delivered several parts, but no picture among them")
        start, end = source.data_offset, source.data_offset + source.data_size
        code, padding = told(source, "data_format"), told(source, "x_padding")
    else:
        source, start, end = buffer, told(buffer, "image_offset") or 0, told(buffer, "size_filled") or buffer.size
        code, padding = told(source, "pixel_format"), told(source, "padding_x")
    name = dict_by_ints.get(code) or features.read("PixelFormat")
    # A line-scan camera, whose pictures end when they end, may tell no height beforehand.
    height = told(source, "height") or told(source, "delivered_image_height") or features.read("Height")
    width = told(source, "width") or features.read("Width")
    if not isinstance(name, str) or height is None or width is None:
        raise ImageError("neither the producer nor the camera tells the picture's format and size")
    extent = int(height), int(width)
    data = np.frombuffer(buffer.raw_buffer, np.uint8)[start:end]
    return as_picture(data, name, *extent, padding or 0), name, extent


def told(source: Any, name: str) -> int | None:
    """What the producer says of the buffer or of its part; it need not know everything."""
    try:
        return int(getattr(source, name))
    except gentl.GenericException:
        return None
