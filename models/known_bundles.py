"""The bundles that are known by name: which published files they are made of, and their bundle.toml. No torch here."""

from dataclasses import dataclass
from typing import Any, Literal

import tomli_w

from flawline.config.errors import ConfigError
from flawline.models.bundle import SCHEMA, Manifest

Activation = Literal["gelu", "quickgelu"]


@dataclass(frozen=True)
class PublishedFile:
    """One weight file as its authors publish it."""

    name: str
    url: str
    sha256: str
    size: int  # bytes
    licence: str


@dataclass(frozen=True)
class KnownBundle:
    """A CLIP and a SAM that are published, joined to one bundle. Trained linear layers are the user's to give."""

    name: str
    description: str
    clip_architecture: str
    clip: PublishedFile
    input_size: int
    sam_architecture: Literal["vit_h", "vit_l", "vit_b", "vit_t"]
    sam: PublishedFile

    @property
    def files(self) -> tuple[PublishedFile, PublishedFile]:
        """What is downloaded."""
        return self.clip, self.sam

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


_SAM_FOLDER = "https://dl.fbaipublicfiles.com/segment_anything/"
_CLIP_SHA256 = "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
_CLIP = PublishedFile(
    "ViT-L-14-336px.pt",
    f"https://openaipublic.azureedge.net/clip/models/{_CLIP_SHA256}/ViT-L-14-336px.pt",
    _CLIP_SHA256,
    934_088_680,
    "MIT, https://github.com/openai/CLIP/blob/main/LICENSE",
)
_SAM_LICENCE = "Apache-2.0, https://github.com/facebookresearch/segment-anything/blob/main/LICENSE"
_VIT_H = PublishedFile(
    "sam_vit_h_4b8939.pth",
    _SAM_FOLDER + "sam_vit_h_4b8939.pth",
    "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    2_564_550_879,
    _SAM_LICENCE,
)
_VIT_L = PublishedFile(
    "sam_vit_l_0b3195.pth",
    _SAM_FOLDER + "sam_vit_l_0b3195.pth",
    "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    1_249_524_607,
    _SAM_LICENCE,
)
_VIT_B = PublishedFile(
    "sam_vit_b_01ec64.pth",
    _SAM_FOLDER + "sam_vit_b_01ec64.pth",
    "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    375_042_383,
    _SAM_LICENCE,
)
_VIT_T = PublishedFile(
    "mobile_sam.pt",
    "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/"
    "f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
    "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    40_728_226,
    "Apache-2.0, https://github.com/ChaoningZhang/MobileSAM/blob/master/LICENSE",
)

KNOWN = {
    known.name: known
    for known in (
        KnownBundle("vit-h", "OpenAI's ViT-L-14-336 with SAM ViT-H", "ViT-L-14-336", _CLIP, 518, "vit_h", _VIT_H),
        KnownBundle("vit-l", "OpenAI's ViT-L-14-336 with SAM ViT-L", "ViT-L-14-336", _CLIP, 518, "vit_l", _VIT_L),
        KnownBundle("vit-b", "OpenAI's ViT-L-14-336 with SAM ViT-B", "ViT-L-14-336", _CLIP, 518, "vit_b", _VIT_B),
        KnownBundle("vit-t", "OpenAI's ViT-L-14-336 with MobileSAM", "ViT-L-14-336", _CLIP, 518, "vit_t", _VIT_T),
    )
}


def known_bundle(name: str) -> KnownBundle:
    """Raises ConfigError naming what there is."""
    if name not in KNOWN:
        raise ConfigError(f"no bundle {name!r} is known by name (known: {', '.join(KNOWN)})")
    return KNOWN[name]


@dataclass(frozen=True)
class AdapterFile:
    """The linear layers that a user adds: the file's name in the bundle, and its hash."""

    name: str
    sha256: str
    source: str


def manifest_of(known: KnownBundle, adapter: AdapterFile | None, activation: Activation | None) -> str:
    """The text of bundle.toml.

    `activation` left out: gelu with an adapter, because APRIL-GAN's published layers were trained under it
    (open_clip rebuilt the towers without QuickGELU at 518 px), else quickgelu, as OpenAI trained the weights.
    """
    clip: dict[str, Any] = {
        "architecture": known.clip_architecture,
        "checkpoint": known.clip.name,
        "input_size": known.input_size,
        "activation": activation or ("gelu" if adapter is not None else "quickgelu"),
    }
    tree: dict[str, Any] = {
        "schema": SCHEMA,
        "name": known.name,
        "description": known.description,
        "clip": clip,
        "sam": {"architecture": known.sam_architecture, "checkpoint": known.sam.name},
        "files": [
            {"name": file.name, "sha256": file.sha256, "licence": file.licence, "source": file.url}
            for file in known.files
        ],
    }
    if adapter is not None:
        tree["adapter"] = {"checkpoint": adapter.name}
        tree["files"].append(
            {
                "name": adapter.name,
                "sha256": adapter.sha256,
                "licence": "as given by the source of the file",
                "source": adapter.source,
            }
        )
    Manifest.model_validate(tree)
    return tomli_w.dumps(tree)
