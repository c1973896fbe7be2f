"""Words for parts and their states: captions to train with, and sentences to prompt by."""

import numpy as np

Rng = np.random.Generator

STATE_WORDS: dict[str, tuple[str, ...]] = {
    "scratch": ("scratched {}", "{} with a scratch", "{} with scratches", "scored {}", "{} with a score mark"),
    "abrasion": ("scuffed {}", "{} with an abrasion", "worn {}", "{} with wear marks", "abraded {}"),
    "crack": ("cracked {}", "{} with a crack", "broken {}", "fractured {}", "{} with a fissure"),
    "dent": ("dented {}", "{} with a dent", "{} with an impression", "{} with a bump"),
    "bubble": ("blistered {}", "{} with a bubble", "{} with a blister"),
    "chip": ("chipped {}", "broken {}", "{} with a chipped edge", "{} with a piece broken off", "damaged {}"),
    "hole": ("{} with a hole", "pierced {}", "punctured {}", "{} with a cut", "cut {}"),
    "pitting": ("pitted {}", "{} with pitting", "{} with pits", "porous {}", "{} with surface fatigue"),
    "wrinkle": ("wrinkled {}", "{} with a wrinkle", "{} with a fold", "creased {}", "folded {}"),
    "distortion": ("distorted {}", "deformed {}", "{} with a distorted pattern", "squeezed {}"),
    "fray": ("frayed {}", "{} with loose fibres", "torn {}", "{} with a snag"),
    "thread": (
        "{} with a pulled thread",
        "{} with a thick thread",
        "{} with a missing thread",
        "{} with a broken line",
    ),
    "stain": ("stained {}", "{} with a stain", "dirty {}", "{} with a spot", "{} with an oil stain", "spotted {}"),
    "discoloration": ("discoloured {}", "{} with a discoloration", "{} with a colour defect", "tarnished {}"),
    "rust": ("rusty {}", "corroded {}", "{} with rust", "{} with corrosion", "rusted {}"),
    "burn": ("burnt {}", "{} with a burn mark", "scorched {}", "charred {}"),
    "print": ("{} with faded print", "{} with a print defect", "{} with worn coating", "faded {}"),
    "smear": ("smeared {}", "{} with a smear", "smudged {}", "{} with a streak"),
    "contamination": ("contaminated {}", "{} with a foreign body", "{} with dirt on it", "{} with debris"),
    "hair": ("{} with a hair on it", "{} with a fibre on it", "{} with a loose thread on it"),
    "glue": ("{} with a drop of glue", "{} with glue on it", "{} with residue", "{} with a solder splash"),
    "patch": ("{} with a flaw", "{} with a damaged area", "{} with a defect in its surface", "blemished {}"),
    "irregularity": ("{} with an irregular pattern", "{} with a wrong pattern", "irregular {}", "{} with a patch"),
    "missing": ("{} with a missing part", "incomplete {}", "{} with something missing", "{} with a missing element"),
    "bent": ("bent {}", "{} with a bent part", "{} with a bent lead", "deformed {}"),
    "misplaced": ("misaligned {}", "{} with a misplaced part", "{} with a shifted part", "{} out of place"),
}
DEFECT_KINDS: tuple[str, ...] = tuple(STATE_WORDS)
UNSEEN_DEFECT_KINDS: tuple[str, ...] = ("bubble", "burn")
"""Kinds that no training picture ever holds: what is said about them is said about unseen defects."""

GOOD_WORDS: tuple[str, ...] = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "good {}",
    "intact {}",
    "{} without defect",
)
GOOD_WORDS += ("{} without flaw", "{} without damage", "normal {}", "clean {}", "undamaged {}", "{} in good condition")
BAD_WORDS = (
    "damaged {}",
    "broken {}",
    "{} with a flaw",
    "{} with a defect",
    "{} with damage",
    "defective {}",
    "faulty {}",
)
TEMPLATES: tuple[str, ...] = (
    "a photo of {}",
    "a close-up photo of {}",
    "a picture of {}",
    "an image of {}",
    "a cropped photo of {}",
)
TEMPLATES += ("a blurry photo of {}", "an industrial photo of {}", "{}", "a photo of {} for inspection", "there is {}")

MATERIAL_WORDS: dict[str, tuple[str, ...]] = {
    "brushed": ("brushed metal", "steel", "metal"),
    "cast": ("cast metal", "cast iron", "metal"),
    "ground": ("machined metal", "steel", "metal"),
    "wood": ("wooden", "wood"),
    "leather": ("leather",),
    "weave": ("woven", "fabric"),
    "knit": ("knitted", "textile"),
    "plastic": ("plastic",),
    "paint": ("painted", "coated"),
    "stone": ("stone",),
    "carpet": ("felt", "textile"),
    "paper": ("paper", "cardboard"),
    "foam": ("foam",),
    "mesh": ("wire",),
    "perforated": ("perforated",),
}


def pick(rng: Rng, words: tuple[str, ...]) -> str:
    """One of the words."""
    return words[int(rng.integers(len(words)))]


def describe(rng: Rng, thing: str, material: str, kinds: list[str]) -> str:
    """A caption: template, material (sometimes), object, state (of one of its defects, if it has any)."""
    name = thing if rng.random() < 0.55 or material.split()[0] in thing else f"{material} {thing}"
    if not kinds:
        state = pick(rng, GOOD_WORDS)
    elif rng.random() < 0.8:
        state = pick(rng, STATE_WORDS[kinds[int(rng.integers(len(kinds)))]])
    else:
        state = pick(rng, BAD_WORDS)
    phrase = state.format(name)
    article = "the" if rng.random() < 0.2 else "an" if phrase[0] in "aeiou" else "a"
    return pick(rng, TEMPLATES).format(f"{article} {phrase}")
