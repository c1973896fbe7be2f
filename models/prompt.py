"""Co-Feature Point Prompt Generation (PPG): where to tell SAM "this" and "not this" (section 3.1, equations 1 to 8).

Everything is tensor code with fixed shapes, so that nothing here waits for the device: a place that
could not be filled is marked absent. Only the split into connected regions reads on the host.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from flawline.config.recipe import PromptSettings
from flawline.models.frames import REFERENCE_SAM_SIZE, REFERENCE_SIZE, FrameGeometry
from flawline.models.morphology import above_otsu, connected_parts, dilate, highest_share

LITERAL = {"spacing": 400.0, "spacing_metric": "euclid", "spacing_frame": "sam"}
NOTHING = float("-inf")  # score of a place that may not be chosen


@dataclass(frozen=True)
class PointPrompts:
    """n = k_positive + k_negative places per row; a row is a frame, or one region of a frame."""

    points: Tensor  # (R, n, 2) float32 x, y in pixels of the captured frame, positives first
    labels: Tensor  # (R, n) int64, 1 positive, 0 negative
    present: Tensor  # (R, n) bool; an absent place has no influence
    frame: Tensor | None = None  # (R,) int64, the frame of each row; None: row i is frame i

    def of_frame(self, frame: int) -> tuple[Tensor, Tensor]:
        """The m present points of one frame: (m, 2) x, y and (m,) labels. Waits for the device."""
        rows = slice(frame, frame + 1) if self.frame is None else self.frame == frame
        present = self.present[rows]
        return self.points[rows][present], self.labels[rows][present]


class Places(NamedTuple):
    """Chosen pixels of the CLIP frame, best first."""

    points: Tensor  # (B, k, 2) int64 x, y
    present: Tensor  # (B, k) bool


def region(anomaly_map: Tensor, settings: PromptSettings, threshold: float) -> Tensor:
    """S_a: (B, S, S) in [0, 1] -> (B, S, S) bool. `threshold` serves where the settings give none."""
    if settings.region == "otsu":
        return above_otsu(anomaly_map)
    if settings.region == "top_percent":
        return highest_share(anomaly_map, settings.region_percent)
    return anomaly_map >= (threshold if settings.region_threshold is None else settings.region_threshold)


def kernel_size(settings: PromptSettings, size: int) -> int:
    """The dilation's size in a CLIP frame of `size`: in proportion, rounded, and never below 3."""
    return max(3, int(settings.kernel_size * size / REFERENCE_SIZE + 0.5))


def ring(region: Tensor, settings: PromptSettings, part: Tensor | None = None) -> Tensor:
    """N_a = dilate(S_a) - S_a (equation 3): (B, S, S) bool -> (B, S, S) bool.

    With `part`, the ring around that part of S_a only; it still leaves out all of S_a.
    """
    around = region if part is None else part
    return dilate(around, settings.kernel, kernel_size(settings, region.shape[-1])) & ~region


def positive_points(anomaly_map: Tensor, region: Tensor, geometry: FrameGeometry, settings: PromptSettings) -> Places:
    """P_h: the k highest of R_a = S_a * Map_a (equations 1 and 2), spaced."""
    score = anomaly_map.float().masked_fill(~region, NOTHING)
    return _spaced(score, settings.positive_points, geometry, settings)


def negative_points(
    features: Tensor,
    anomaly_map: Tensor,
    region: Tensor,
    ring: Tensor,
    geometry: FrameGeometry,
    settings: PromptSettings,
) -> Places:
    """P_l: the k pixels of N_a whose features are least like those of S_a (equations 4 to 7), spaced."""
    alike = similarity(features, anomaly_map, region, geometry, settings)
    score = (-alike).masked_fill(~ring, NOTHING)
    return _spaced(score, settings.negative_points, geometry, settings)


def similarity(
    features: Tensor, anomaly_map: Tensor, region: Tensor, geometry: FrameGeometry, settings: PromptSettings
) -> Tensor:
    """Map_s (equation 6): cosine of each place's feature with F_a, (B, S, S) float32 in [-1, 1].

    `features` (B, C, h, w) cover SAM's padded frame. Cells whose centre lies in the padding are left out;
    F_a are the cells that S_a touches, however little, so that the smallest defect has one. The
    similarity is taken cell by cell and enlarged to the CLIP frame, because the ring is often narrower
    than a cell.
    """
    size = region.shape[-1]
    height, width = features.shape[-2:]
    rows = _extent(geometry.sam_height, height, geometry.sam_size)
    columns = _extent(geometry.sam_width, width, geometry.sam_size)
    cells = features[:, :, :rows, :columns].float().flatten(2)  # (B, C, cells)
    over_rows = _overlap(geometry.sam_height * height, rows, size, geometry.sam_size, features.device)
    over_columns = _overlap(geometry.sam_width * width, columns, size, geometry.sam_size, features.device)
    weight = region.float()
    if settings.similarity == "weighted":
        weight = weight * anomaly_map.float()
    covered = (over_rows @ weight @ over_columns.T).flatten(1)  # (B, cells)
    if settings.similarity != "weighted":
        covered = (covered > 0.0).float()
    if settings.similarity == "max":
        unit = functional.normalize(cells, dim=1)
        pairs = unit.transpose(1, 2) @ unit  # (B, cells, cells)
        alike = pairs.masked_fill(covered[:, None] == 0.0, -1.0).amax(2)
    else:
        mean = functional.normalize(torch.bmm(cells, covered.unsqueeze(2)), dim=1)  # length does not matter
        alike = (torch.bmm(mean.transpose(1, 2), cells)[:, 0]) / cells.norm(dim=1).clamp_min(1e-12)
    return _to_clip_frame(alike.view(-1, rows, columns), geometry, (height, width), size)


def point_prompts(
    anomaly_map: Tensor,
    region: Tensor,
    features: Tensor,
    geometry: FrameGeometry,
    settings: PromptSettings,
    max_regions: int | None = None,
) -> PointPrompts:
    """P = P_h and P_l together (equation 8), in pixels of the captured frame.

    anomaly_map (B, S, S) float, region (B, S, S) bool, features (B, C, h, w) over SAM's padded frame; all
    frames share one geometry. With `max_regions`, one row per connected region of S_a, largest first, at
    most so many per frame; this reads the region on the host.
    """
    part, frame = region, None
    if max_regions is not None:
        part, frame = connected_parts(region, max_regions)
        anomaly_map, region, features = anomaly_map[frame], region[frame], features[frame]
    chosen = [positive_points(anomaly_map, part, geometry, settings)]
    if settings.negative_points:
        around = ring(region, settings, part)
        chosen.append(negative_points(features, anomaly_map, part, around, geometry, settings))
    present = torch.cat([places.present for places in chosen], dim=1)
    clip = torch.cat([places.points for places in chosen], dim=1)
    points = geometry.clip_to_image(clip.float()).masked_fill(~present.unsqueeze(2), 0.0)
    labels = torch.zeros_like(present, dtype=torch.long)
    labels[:, : settings.positive_points].fill_(1)  # assigning would send the number from the host
    return PointPrompts(points, labels, present, frame)


def _spaced(score: Tensor, count: int, geometry: FrameGeometry, settings: PromptSettings) -> Places:
    """The `count` best pixels of (B, S, S) at the settings' spacing; ties go to the upper, then the left one.

    Each choice forbids the pixels nearer than the spacing: greedy suppression, best first.
    """
    if settings.preset == "literal":
        settings = settings.model_copy(update=LITERAL)
    size = score.shape[-1]
    step_x = step_y = REFERENCE_SIZE / size  # one pixel in units of the frame that spacing is counted in
    if settings.spacing_frame == "sam":
        step_x = geometry.sam_width / size * REFERENCE_SAM_SIZE / geometry.sam_size
        step_y = geometry.sam_height / size * REFERENCE_SAM_SIZE / geometry.sam_size
    if settings.spacing_metric == "rank_stride":
        return _every_nth(score, count, max(1, int(settings.spacing / (step_x * step_y) + 0.5)))
    limit = settings.spacing if settings.spacing_metric == "sq_euclid" else settings.spacing**2
    limit = max(limit, 1e-9)  # with no spacing at all, a place is still chosen only once
    axis = torch.arange(size, device=score.device)
    points, present = [], []
    for _ in range(count):
        best, y = score.amax(2).max(1)  # in two steps, which is faster than a search over the whole plane
        x = score.gather(1, y[:, None, None].expand(-1, 1, size))[:, 0].argmax(1)
        points.append(torch.stack([x, y], dim=1))
        present.append(best > NOTHING)
        far_x = ((axis - x[:, None]) * step_x).square()
        far_y = ((axis - y[:, None]) * step_y).square()
        near = far_x[:, None, :] < limit - far_y[:, :, None]
        score = torch.where(near, NOTHING, score)
    return Places(torch.stack(points, dim=1), torch.stack(present, dim=1))


def _every_nth(score: Tensor, count: int, stride: int) -> Places:
    """Ranks 0, n, 2n ... of all pixels in order of score."""
    size = score.shape[-1]
    ranked = score.flatten(1).sort(dim=1, descending=True, stable=True)
    places = functional.pad(ranked.indices[:, ::stride][:, :count], (0, count))[:, :count]
    best = functional.pad(ranked.values[:, ::stride][:, :count], (0, count), value=NOTHING)[:, :count]
    return Places(torch.stack([places % size, places // size], dim=2), best > NOTHING)


def _extent(shown: int, cells: int, padded: int) -> int:
    """How many of `cells` over `padded` pixels have their centre in the first `shown` pixels; at least one."""
    return max(1, ceil(shown * cells / padded - 0.5))


def _overlap(extent: int, cells: int, size: int, padded: int, device: torch.device) -> Tensor:
    """(cells, size): how much of CLIP pixel j, of `size` over the picture, lies in cell i along one axis.

    `extent / padded` is the picture's length in cells. In whole numbers, so that touching is not overlap.
    What the picture shows beyond the last cell counts to that cell.
    """
    pixel = torch.arange(size, device=device) * extent
    edge = torch.arange(cells + 1, device=device) * (size * padded)
    edge[-1:].fill_(extent * size)
    overlap = torch.minimum(pixel + extent, edge[1:, None]) - torch.maximum(pixel, edge[:-1, None])
    return overlap.clamp_min(0).float() / extent


def _to_clip_frame(plane: Tensor, geometry: FrameGeometry, grid: tuple[int, int], size: int) -> Tensor:
    """(B, rows, columns) cells that show the picture -> (B, size, size), bilinear between cell centres."""
    rows, columns = plane.shape[-2:]
    axis = (torch.arange(size, device=plane.device) + 0.5) / size  # in pictures
    y = axis * (2.0 * geometry.sam_height * grid[0] / geometry.sam_size / rows) - 1.0
    x = axis * (2.0 * geometry.sam_width * grid[1] / geometry.sam_size / columns) - 1.0
    where = torch.stack([x.expand(size, size), y.unsqueeze(1).expand(size, size)], dim=-1)
    where = where.expand(len(plane), -1, -1, -1)
    enlarged = functional.grid_sample(
        plane.unsqueeze(1), where, mode="bilinear", padding_mode="border", align_corners=False
    )
    return enlarged[:, 0]
