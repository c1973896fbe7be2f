"""A recipe: what one product is, in words, thresholds and regions, and how CLIP and SAM work together on it."""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST = 2**31 - 1
"""Of a whole number of pixels or milliseconds: what the wire and every reader of it can hold."""
Box = tuple[int, int, int, int]  # x, y, w, h in pixels of the captured frame
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["fp32", "fp16", "bf16"]
PRECISION_OF: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""The encoders' arithmetic by the name that verdicts and results have for it."""
MOST_SENTENCES = 64
"""States of one kind: the text tower reads each of them in each of the bundle's templates, while no frame is judged."""
_LONGEST_SENTENCE = 200  # characters; a tower reads 32 to 77 tokens
_MOST_BOXES = 256
_LONGEST_PATH = 4096  # bytes that Linux takes


class Strict(BaseModel):
    """Base of every settings table: unknown keys, inf and nan are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class PromptSettings(Strict):
    """Co-Feature Point Prompt Generation (PPG), the paper's section 3.1.

    Distances and kernel sizes are pixels of a 518 x 518 CLIP frame and scale with the bundle's input size.
    The text leaves several points open; each is a setting here, its default the recommended reading.
    `preset = "literal"` takes the text at its word: points 400 px apart in SAM's input frame.
    """

    preset: Literal["default", "literal"] = Field(
        "default", description="`literal`: spacing of 400 px in SAM's 1024 px input frame, as printed"
    )
    region: Literal["absolute", "otsu", "top_percent"] = Field(
        "absolute", description="how S_a is cut out of the CLIP map"
    )
    region_threshold: Unit | None = Field(
        None, description="S_a = map >= this (region `absolute`); left out: the bundle's own value"
    )
    region_percent: float = Field(
        2.0, gt=0.0, le=50.0, description="region `top_percent`: this share of the map's pixels, in percent"
    )
    positive_points: int = Field(3, ge=1, le=16, description="k of equation 2, most anomalous points")
    negative_points: int = Field(3, ge=0, le=16, description="k of equation 7, least similar points of the ring")
    spacing: float = Field(20.0, ge=0.0, description="least distance between points of one kind")
    spacing_metric: Literal["euclid", "sq_euclid", "rank_stride"] = Field(
        "euclid",
        description="`euclid`: pixels; `sq_euclid`: squared pixels; `rank_stride`: every n-th point of the ranking",
    )
    spacing_frame: Literal["clip", "sam"] = Field(
        "clip", description="the frame `spacing` is counted in: 518 px CLIP frame or 1024 px SAM frame"
    )
    kernel: Literal["ellipse", "rect", "cross"] = Field("ellipse", description="dilation shape (the paper's Table 2)")
    kernel_size: int = Field(25, ge=3, le=255, description="dilation size (the paper's Table 2)")
    similarity: Literal["mean", "max", "weighted"] = Field(
        "mean",
        description="what of F_a each position is compared with: its mean, its nearest, or the map-weighted mean",
    )
    features: str = Field(
        "sam", description="encoder of F: `sam`, or `timm:NAME` / `torchvision:NAME` for another backbone"
    )


class CascadeSettings(Strict):
    """Cascaded Prompts for SAM (CPS), the paper's section 3.2."""

    levels: int = Field(3, ge=1, le=3, description="stop after this level (the paper's Table 3)")
    multimask: tuple[bool, bool, bool] = Field(
        (True, True, True), description="ask three masks and take the best scored, per level"
    )
    per_region: bool = Field(
        False,
        description="one cascade per connected region of S_a, joined by the maximum, instead of one for all",
    )
    max_regions: int = Field(8, ge=1, le=64, description="`per_region`: at most this many, largest first")


class FusionSettings(Strict):
    """How the CLIP map C and the last mask's probability become the anomaly map A."""

    preset: Literal["noisy_or", "mean", "gate", "mask_only"] = Field(
        "noisy_or",
        description="`noisy_or`: 1-(1-C)(1-a*s); `mean`: a*C+(1-a)*s; `gate`: C inside the mask; `mask_only`: s",
    )
    a: Unit = Field(0.5, description="weight of the mask in `noisy_or`, of the map in `mean`")


class TilingSettings(Strict):
    """Tiled inspection of large frames."""

    enabled: bool = Field(False, description="inspect in overlapping tiles instead of the whole frame at once")
    size: int = Field(1024, ge=128, le=8192, description="edge of a tile, px")
    overlap: int = Field(128, ge=0, le=4096, description="overlap of neighbouring tiles, px")

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.overlap * 2 > self.size:
            raise ValueError("overlap must be at most half of size")
        return self


class Calibration(Strict):
    """Where a recipe's threshold came from; written by `flawline calibrate`."""

    date: str = Field(description="when, UTC, ISO 8601")
    count: int = Field(ge=1, description="good parts it was taken from")
    rejected: int = Field(ge=0, description="how many of them it rejects")
    target_fpr: Unit = Field(description="the false reject rate that was asked for")
    confidence: Unit = Field(description="probability that `false_reject_bound` holds")
    false_reject_bound: Unit = Field(description="upper limit of the false reject rate")
    method: str = Field(description="how the bound was found")
    threshold: Unit = Field(description="the threshold that was found")
    bundle: str = Field(description="the model bundle's name")
    bundle_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="and its hash: with another one it says nothing")
    memory_sha256: str | None = Field(None, description="the memory of good parts, where there was one: the same holds")
    recipe_sha256: str | None = Field(
        None,
        description="hash of what else the scores depend on: words, regions, prompts, cascade, fusion, tiles, share",
    )
    min_defect_area_px: int | None = Field(
        None, ge=1, description="the recipe's then: with a smaller one, scores of good parts are higher"
    )
    precision: Precision | None = Field(None, description="arithmetic of the encoders, where it was known")


_SCALE = {
    *("object", "states_normal", "states_abnormal", "localiser", "prompt", "cascade", "fusion", "tiling"),
    *("roi", "ignore", "memory_registration", "memory_share"),
}


class Recipe(Strict):
    """One product: its words, thresholds and regions. Boxes are x, y, w, h in pixels of the captured frame."""

    object: str = Field(
        "object",
        min_length=1,
        max_length=200,
        description="the words that go into the prompts, a few: a text tower reads 32 (`demo`) to 77 tokens a sentence",
    )
    threshold: Unit | None = Field(
        None, description="a pixel at or above this belongs to a defect; left out: the bundle's own value"
    )
    min_defect_area_px: int = Field(20, ge=1, le=MOST, description="smaller components are no defect")
    deadline_ms: int | None = Field(None, ge=1, le=MOST, description="from trigger to publish; left out: none")
    queue: Literal["reject_new", "latest"] = Field(
        "reject_new",
        description="when the queue is full: answer the new frame `overrun`, or drop the oldest one",
    )
    mm_per_px: float | None = Field(None, gt=0.0, description="scale; with it defects carry area_mm2")
    roi: Box | None = Field(None, description="region of interest; outside it nothing counts")
    ignore: tuple[Box, ...] = Field((), max_length=_MOST_BOXES, description="boxes inside which nothing counts")
    states_normal: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        max_length=MOST_SENTENCES,
        description="sentences for a good part, {} stands for the object; left out: the standard ones",
    )
    states_abnormal: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        max_length=MOST_SENTENCES,
        description="sentences for a defective part; left out: the standard ones",
    )
    localiser: Literal["auto", "adapter", "windows"] = Field(
        "auto",
        description="`adapter`: trained layers; `windows`: training-free; `auto`: the adapter where there is one",
    )
    prompt: PromptSettings = Field(default_factory=PromptSettings, description="point prompts (PPG)")
    cascade: CascadeSettings = Field(default_factory=CascadeSettings, description="cascaded prompts (CPS)")
    fusion: FusionSettings = Field(default_factory=FusionSettings, description="the final map")
    tiling: TilingSettings = Field(default_factory=TilingSettings, description="tiles for large frames")
    memory: str | None = Field(
        None,
        min_length=1,
        max_length=_LONGEST_PATH,
        description="file of the memory of good parts; written by `flawline learn`",
    )
    memory_rotations: tuple[float, ...] = Field(
        (),
        max_length=35,
        description="degrees by which parts may lie turned, as [90, 180, 270]: `flawline learn` learns them turned too",
    )
    memory_registration: bool = Field(
        False,
        description="parts shift in the frame: `flawline learn` and every frame lay them over one good part first",
    )
    memory_share: float = Field(
        0.7, ge=0.0, le=1.0, description="weight of the memory, the words have the rest; 1: the memory alone"
    )
    calibration: Calibration | None = Field(None, description="where the threshold came from")

    def sha256(self) -> str:
        """Hash of all keys, as verdicts name it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def scale_sha256(self) -> str:
        """Hash of the keys that scores depend on; bundle and memory have their own."""
        table = self.model_dump(mode="json", include=_SCALE)
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    def scale_differs(self, other: "Recipe") -> list[str]:
        """The keys that scores depend on and that the other recipe has otherwise, as `prompt.kernel_size`."""
        differing = []
        for key in _SCALE:
            one, two = getattr(self, key), getattr(other, key)
            if isinstance(one, Strict):
                names = type(one).model_fields
                differing += [f"{key}.{name}" for name in names if getattr(one, name) != getattr(two, name)]
            elif one != two:
                differing.append(key)
        return sorted(differing)

    def calibration_warning(
        self, bundle: str, bundle_sha256: str | None, memory_sha256: str | None, precision: Precision | None
    ) -> str | None:
        """What to warn of where this bundle and memory judge; None where there is no calibration, or it still holds.

        A `precision` that is not known, now or then, warns of nothing.
        """
        made = self.calibration
        if made is None:
            return None
        if made.bundle_sha256 != bundle_sha256:
            now = f"{bundle} ({(bundle_sha256 or 'no hash')[:12]})"
            why = f"with bundle {made.bundle} ({made.bundle_sha256[:12]}), now {now} judges"
        elif None not in (made.precision, precision) and made.precision != precision:
            why = f"at {made.precision}, now the models judge at {precision}"
        elif made.recipe_sha256 is None:  # by a flawline that did not note more
            return None
        elif made.memory_sha256 != memory_sha256:
            before, now = (f"memory {sha[:12]}" if sha else "no memory" for sha in (made.memory_sha256, memory_sha256))
            why = f"with {before}, now the recipe has {now}"
        elif made.recipe_sha256 != self.scale_sha256():
            why = "before the recipe's words, regions or way of judging were changed"
        elif self.min_defect_area_px < (made.min_defect_area_px or 1):
            why = f"with min_defect_area_px = {made.min_defect_area_px}, the recipe has {self.min_defect_area_px}"
        elif self.threshold is None or self.threshold < made.threshold:
            why = f"as {made.threshold:.6f}, the recipe has {'none' if self.threshold is None else self.threshold}"
        else:
            return None
        return f"the threshold was calibrated {why}: its false reject rate is not known; run `flawline calibrate` again"

    @field_validator("roi", "ignore")
    @classmethod
    def _boxes_have_area(cls, value: Box | tuple[Box, ...] | None) -> Box | tuple[Box, ...] | None:
        boxes: list[Box] = []
        if value:
            boxes = [value] if isinstance(value[0], int) else list(value)
        for x, y, w, h in boxes:
            if x < 0 or y < 0 or w < 1 or h < 1 or max(x + w, y + h) > MOST:
                raise ValueError(f"box [{x}, {y}, {w}, {h}] needs x, y >= 0, w, h >= 1, and an end of at most {MOST}")
        return value

    @field_validator("memory_rotations")
    @classmethod
    def _rotations_turn(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.0 < degrees < 360.0 for degrees in value) or len(set(value)) < len(value):
            raise ValueError(f"{list(value)} must be different degrees between 0 and 360")
        return value

    @model_validator(mode="after")
    def _registered_as_a_whole(self) -> Self:
        if self.memory_registration and self.tiling.enabled:
            raise ValueError("memory_registration lays whole parts over one another: tiling.enabled must be false")
        return self

    @field_validator("states_normal", "states_abnormal")
    @classmethod
    def _states_name_the_object(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return with_one_place(value)


def with_one_place(sentences: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The sentences. Raises ValueError where one is too long, or has not exactly one place, {}, for what it is of."""
    for sentence in sentences or ():
        if len(sentence) > _LONGEST_SENTENCE:
            raise ValueError(f"a sentence has {len(sentence)} characters, at most {_LONGEST_SENTENCE} are taken")
        if sentence.count("{}") != 1 or "{" in sentence.replace("{}", "") or "}" in sentence.replace("{}", ""):
            raise ValueError(
                f"{sentence!r} must hold {{}} exactly once, where the object (in a template: its state) goes"
            )
    return sentences
