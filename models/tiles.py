"""Tiles of large frames: equal in size, overlapping, covering the region of interest."""

from dataclasses import dataclass

from flawline.config.recipe import TilingSettings


@dataclass(frozen=True)
class Tile:
    """A part of the captured frame, in its pixels."""

    rows: slice
    columns: slice

    @property
    def height(self) -> int:
        """Rows of the tile."""
        return int(self.rows.stop - self.rows.start)

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return int(self.columns.stop - self.columns.start)


def cut_tiles(rows: slice, columns: slice, settings: TilingSettings) -> list[Tile]:
    """The tiles of a region, row by row; the region itself where tiling is off or one tile holds it.

    All tiles have one size, so that they go through the models as one batch. Neighbours overlap by at least
    `overlap` pixels.
    """
    if not settings.enabled:
        return [Tile(rows, columns)]
    return [
        Tile(tile_rows, tile_columns) for tile_rows in _cut(rows, settings) for tile_columns in _cut(columns, settings)
    ]


def _cut(extent: slice, settings: TilingSettings) -> list[slice]:
    length = extent.stop - extent.start
    size = min(settings.size, length)
    step = max(settings.size - settings.overlap, 1)
    count = 1 if length <= size else -(-(length - size) // step) + 1
    starts = [extent.start + round(i * (length - size) / max(count - 1, 1)) for i in range(count)]
    return [slice(start, start + size) for start in starts]
