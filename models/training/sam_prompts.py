"""What the embedded SAM is asked in training: targets, prompts for them, and windows of SAM's frame to look at."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawline.models.sam_small import LITE0_STRIDE

Rng = np.random.Generator
POINTS = 6  # places for points in a training prompt
CELL = 32  # px of SAM's frame per cell of the trunk's coarsest level: windows are cut between these
MASK_STRIDE = LITE0_STRIDE // 4  # px of SAM's frame per pixel of the decoder's logits
CENTRE = (MASK_STRIDE - 1) / 2  # of such a pixel, px of SAM's frame from its first one
SMALLEST_PX = 12  # a smaller target is not asked for
FRAGMENTS = 0.02  # of the frame: marks of one kind that lie this close are one defect


@dataclass(frozen=True)
class Window:
    """A square part of SAM's frame, in cells."""

    y: int
    x: int
    cells: int

    def pixels(self) -> tuple[slice, slice]:
        """Where it lies in SAM's frame."""
        edge = self.cells * CELL
        top, left = self.y * CELL, self.x * CELL
        return slice(top, top + edge), slice(left, left + edge)


@dataclass
class Target:
    """What is asked for in one window: the wanted mask, and the first prompt, in pixels of SAM's whole frame."""

    window: Window
    mask: NDArray[np.bool_]  # (E, E), the window's pixels
    points: NDArray[np.float32]  # (POINTS, 2) x, y
    labels: NDArray[np.int64]  # (POINTS,)
    present: NDArray[np.bool_]  # (POINTS,)
    box: NDArray[np.float32] | None  # (4,)


def draw_target(rng: Rng, kinds: NDArray[np.uint8], parts: NDArray[np.uint8], cells: int) -> Target | None:
    """All defects together, one defect, or one normal structure, and a prompt for it; None where there is none.

    With many unlike targets in alike pictures, only the prompt says which one is meant.
    """
    choice = rng.random()
    defects = kinds > 0
    together = choice < 0.10 and bool(defects.any())
    if together:
        mask = defects
    elif choice < 0.85 and defects.any():
        count, labels = single_defects(kinds)
        mask = labels == int(rng.integers(1, count))
    else:
        names = np.unique(parts)
        names = names[names > 0]
        if not len(names):
            return None
        mask = parts == int(rng.choice(names))
    if mask.sum() < SMALLEST_PX or mask.mean() > 0.6:
        return None
    window = window_on(rng, mask, cells)
    shown = np.zeros_like(mask)
    shown[window.pixels()] = mask[window.pixels()]
    if shown.sum() < SMALLEST_PX:
        return None
    kind = rng.random()
    box = jittered_box(rng, shown) if kind < 0.5 else None
    positives = int(rng.integers(1, 4)) if kind >= 0.2 else 0
    if together and positives:  # one point alone asks for one defect
        positives = 3
    negatives = int(rng.integers(0, 4)) if positives and rng.random() < 0.5 else 0
    return Target(window, shown[window.pixels()], *draw_points(rng, shown, positives, negatives), box)


def single_defects(kinds: NDArray[np.uint8]) -> tuple[int, NDArray[np.int32]]:
    """Each defect by itself: labels from 1 on (0: none), and one more than the last.

    The marks of a scuff or of pitting are one defect, as they are to whoever points at one of them.
    """
    reach = 2 * round(0.5 * FRAGMENTS * len(kinds)) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    labels, count = np.zeros(kinds.shape, np.int32), 1
    for kind in np.unique(kinds[kinds > 0]):
        here = (kinds == kind).astype(np.uint8)
        found, parts = cv2.connectedComponents(cv2.morphologyEx(here, cv2.MORPH_CLOSE, kernel), connectivity=8)
        labels = np.where(here > 0, parts + (count - 1), labels).astype(np.int32)
        count += found - 1
    return count, labels


def draw_shape(rng: Rng, frame_cells: int, cells: int) -> Target:
    """An ellipse or a rectangle that is not in the picture at all, asked for by its box: only the prompt shows it."""
    corner = rng.integers(0, frame_cells - cells + 1, 2)
    window = Window(int(corner[0]), int(corner[1]), cells)
    edge = cells * CELL
    half = np.exp(rng.uniform(np.log(10), np.log(0.35 * edge), 2))
    y, x = (rng.uniform(reach, edge - reach) for reach in half)
    drawn = np.zeros((edge, edge), np.uint8)
    if rng.random() < 0.5:
        cv2.ellipse(drawn, (int(x), int(y)), (int(half[1]), int(half[0])), 0, 0, 360, 1, -1)
    else:
        drawn[int(y - half[0]) : int(y + half[0]) + 1, int(x - half[1]) : int(x + half[1]) + 1] = 1
    whole = np.zeros((frame_cells * CELL,) * 2, bool)
    whole[window.pixels()] = drawn > 0
    prompt = draw_points(rng, whole, int(rng.random() < 0.4), 0)
    return Target(window, drawn > 0, *prompt, jittered_box(rng, whole))


def window_on(rng: Rng, mask: NDArray[np.bool_], cells: int) -> Window:
    """A window in which some pixel of the mask lies, rather not at its edge."""
    last = mask.shape[0] // CELL - cells
    inside = np.argwhere(mask)
    pixel = inside[rng.integers(len(inside))]
    corner = (pixel - rng.integers(32, cells * CELL - 32, 2)) // CELL
    y, x = (int(place) for place in corner.clip(0, last))
    return Window(y, x, cells)


def jittered_box(rng: Rng, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The mask's tight box x0, y0, x1, y1, each edge moved by about a twentieth of its length."""
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), xs.max(), ys.max()], np.float32)
    reach = np.array([box[2] - box[0], box[3] - box[1]], np.float32) * 0.1
    moved: NDArray[np.float32] = box + rng.normal(0, 0.5, 4).astype(np.float32) * np.tile(reach, 2)
    return moved.clip(0, mask.shape[0] - 1)


def draw_points(
    rng: Rng, mask: NDArray[np.bool_], positives: int, negatives: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Points inside the mask, rather deep than at the edge, and points in the ring around it."""
    points = np.zeros((POINTS, 2), np.float32)
    labels = np.zeros(POINTS, np.int64)
    present = np.zeros(POINTS, bool)
    inside = np.argwhere(mask)
    if positives and rng.random() < 0.6:
        depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 3)
        inside = np.argwhere(depth >= 0.5 * depth.max())
    for place in range(positives):
        points[place] = inside[rng.integers(len(inside))][::-1]
        labels[place], present[place] = 1, True
    if negatives:
        reach = int(rng.integers(5, 31)) | 1
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
        gap = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
        around = np.argwhere((cv2.dilate(gap, kernel) > 0) & (gap == 0))
        for place in range(3, 3 + negatives):
            if len(around):
                points[place], present[place] = around[rng.integers(len(around))][::-1], True
    return points, labels, present


@dataclass
class Prompts:
    """A batch of prompts as the decoder takes them, in pixels of SAM's frame; further rounds change them in place."""

    points: Tensor  # (B, POINTS, 2)
    labels: Tensor  # (B, POINTS)
    present: Tensor  # (B, POINTS)
    boxes: Tensor  # (B, 4)
    boxed: Tensor  # (B,)
    corners: Tensor  # (B, 2) x, y of each window's first pixel

    @classmethod
    def of(cls, targets: list[Target]) -> "Prompts":
        """Those of the first round."""
        boxes = [np.zeros(4, np.float32) if target.box is None else target.box for target in targets]
        return cls(
            torch.from_numpy(np.stack([target.points for target in targets])),
            torch.from_numpy(np.stack([target.labels for target in targets])),
            torch.from_numpy(np.stack([target.present for target in targets])),
            torch.from_numpy(np.stack(boxes)),
            torch.tensor([target.box is not None for target in targets]),
            torch.tensor([[t.window.x, t.window.y] for t in targets], dtype=torch.float32) * CELL,
        )

    def correct(self, rng: Rng, logits: Tensor, truth: Tensor, share: float) -> None:
        """In a `share` of the rows, where places are free: a point where the mask is too large, one where too small.

        `logits`, `truth`: (B, 4h, 4w).
        """
        found, wanted = (logits > 0).numpy(), (truth > 0.5).numpy()
        for row in range(len(self.points)):
            if rng.random() >= share:
                continue
            for label, wrong in ((0, found[row] & ~wanted[row]), (1, wanted[row] & ~found[row])):
                free = torch.nonzero(~self.present[row]).flatten()
                places = np.argwhere(wrong)
                if not len(free) or not len(places):
                    continue
                y, x = places[rng.integers(len(places))]
                place = int(free[0])
                self.points[row, place] = self.corners[row] + torch.tensor([x, y]) * MASK_STRIDE + CENTRE
                self.labels[row, place] = label
                self.present[row, place] = True

    def point_logits(self, logits: Tensor) -> Tensor:
        """(B, m, 4h, 4w) -> (B, m, POINTS): at every point, above zero where the answer agrees with its label."""
        edge = logits.shape[-1]
        places = ((self.points - self.corners.unsqueeze(1)) / MASK_STRIDE).long().clamp(0, edge - 1)
        flat = (places[..., 1] * edge + places[..., 0]).unsqueeze(1).expand(-1, logits.shape[1], -1)
        sign = 2.0 * self.labels.unsqueeze(1) - 1.0
        return logits.flatten(2).gather(2, flat) * sign

    def box_in(self, logits: Tensor) -> None:
        """The tight box of each mask, as the cascade's last level takes it; as it was where the mask is empty."""
        for row, found in enumerate(logits > 0):
            if bool(found.any()):
                ys, xs = torch.nonzero(found, as_tuple=True)
                ends = torch.stack([xs.min(), ys.min(), xs.max(), ys.max()]) * MASK_STRIDE + CENTRE
                self.boxes[row] = ends + self.corners[row].repeat(2)
                self.boxed[row] = True


def worn(rng: Rng, truth: Tensor) -> Tensor:
    """The wanted mask as a poor earlier answer would have it: grown or shrunk, soft, as logits. (h, w) -> (h, w)."""
    size = int(rng.choice([5, 9, 17]))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    plane = (truth > 0.5).numpy().astype(np.uint8)
    changed = cv2.dilate(plane, kernel) if rng.random() < 0.6 else cv2.erode(plane, kernel)
    soft = cv2.GaussianBlur(changed.astype(np.float32), (0, 0), float(rng.uniform(1.0, 4.0)))
    return torch.from_numpy((soft - 0.5) * np.float32(rng.uniform(6, 16)))
