"""The sentences that describe good and defective parts: states, templates, and how a recipe's words replace them.

States and templates are those of APRIL-GAN, whose training set-up the paper follows (section 4.1.2).
No torch here.
"""

from dataclasses import dataclass
from typing import Self

from flawline.config.recipe import Recipe
from flawline.models.bundle import PromptWords

STATES_NORMAL = (
    "{}",
    "flawless {}",
    "perfect {}",
    "unblemished {}",
    "{} without flaw",
    "{} without defect",
    "{} without damage",
)
STATES_ABNORMAL = ("damaged {}", "broken {}", "{} with flaw", "{} with defect", "{} with damage")
_VIEWS = (
    "a bad photo of a {}.",
    "a low resolution photo of the {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a bright photo of a {}.",
    "a dark photo of the {}.",
    "a photo of my {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "a low resolution photo of a {}.",
    "a photo of a large {}.",
    "a blurry photo of a {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a photo of the small {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "a dark photo of a {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
)
TEMPLATES = (
    *_VIEWS,
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)


@dataclass(frozen=True)
class Words:
    """What a recipe says in words: two ensembles of sentences, good and defective."""

    normal: tuple[str, ...]
    abnormal: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, bundle: PromptWords) -> Self:
        """The recipe's own states where it has some, else the bundle's, else the standard ones."""
        templates = bundle.templates or TEMPLATES
        normal = recipe.states_normal or bundle.states_normal or STATES_NORMAL
        abnormal = recipe.states_abnormal or bundle.states_abnormal or STATES_ABNORMAL
        return cls(ensemble(recipe.object, normal, templates), ensemble(recipe.object, abnormal, templates))


def ensemble(name: str, states: tuple[str, ...], templates: tuple[str, ...] = TEMPLATES) -> tuple[str, ...]:
    """Every state of the object in every template: len(states) x len(templates) sentences."""
    return tuple(template.format(state.format(name)) for state in states for template in templates)
