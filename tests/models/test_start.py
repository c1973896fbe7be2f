"""What a worker leaves out while it starts, and that everything left out is there for whoever needs it after all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_bundle import write_tiny_bundle

from flawline.config.errors import BundleError
from flawline.models.bundle import SamSettings
from flawline.models.checkpoints import Undrawn
from flawline.models.sam import build_sam
from flawline.models.towers import load_towers


def python(code: str, *arguments: str) -> str:
    """In an interpreter of its own, which begins as a worker does."""
    begin = (
        "import gc, sys, torch\n"
        "disable = torch.compiler.disable\n"
        "from flawline.models.worker import make_engine\n"
        "engine = make_engine('flawline.models.collaboration:CollaborationEngine')\n"
    )
    done = subprocess.run([sys.executable, "-c", begin + code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_worker_loads_and_judges_without_the_compiler_and_without_transformers(tmp_path: Path) -> None:
    code = """
import numpy as np
from flawline.config.recipe import Recipe
engine.load(sys.argv[1], "cpu", "fp32", 1, {"a": Recipe.model_validate({"prompt": {"region_threshold": 0.0}})})
judgement = engine.inspect(np.full((64, 64, 3), 90, np.uint8), "a", None, lambda _: None)
print(judgement.result.refined, [name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules])
"""
    assert python(code, str(write_tiny_bundle(tmp_path / "tiny"))) == "True []\n"


def test_afterwards_everything_is_as_it_was() -> None:
    code = """
import torchvision
assert torch.compiler.disable is disable
assert gc.isenabled()
boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])]
assert torchvision.ops.roi_align(torch.rand(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)
twice = torch.compile(lambda x: 2 * x, backend="eager")
assert twice(torch.ones(3)).tolist() == [2.0] * 3
import torch._dynamo.utils
assert torch._dynamo.utils.is_compile_supported("cpu")
assert not any("lean_imports" in str(finder) for finder in sys.meta_path)
"""
    python(code)


def test_a_text_tower_of_transformers_can_still_be_built(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bert = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 50, "hidden_size": 16}
    bert |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(bert))
    code = """
from flawline.models.clip import build_open_clip
vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
text = {"hf_model_name": sys.argv[1], "hf_model_pretrained": False}
text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
assert "transformers" not in sys.modules
model = build_open_clip({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
print(model.encode_text(torch.ones(2, 5, dtype=torch.long)).shape)
"""
    assert python(code, str(tmp_path)) == "torch.Size([2, 16])\n"


def test_models_built_to_be_loaded_are_filled_by_their_files_alone(tmp_path: Path) -> None:
    """No value is left as it lay in memory: two loads agree with each other and with the files."""
    folder = write_tiny_bundle(tmp_path / "tiny")
    first, second = (load_towers(folder, "cpu") for _ in range(2))
    for one, other in ((first.clip, second.clip), (first.sam, second.sam)):
        pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
        for (name, tensor), again in pairs:
            assert torch.equal(tensor, again), name
        for (name, buffer), again in zip(one.named_buffers(), other.buffers(), strict=True):
            assert torch.isfinite(buffer).all() or "mask" in name, name
            assert torch.equal(buffer, again), name


def test_drawing_is_left_out_inside_only() -> None:
    """And what is not drawn (ones, zeros, tables) is there."""
    settings = SamSettings(architecture="vit_b", checkpoint="none", input_size=64)
    with Undrawn():
        begun = torch.nn.Linear(500, 500)
        before = begun.weight.clone()
        torch.nn.init.normal_(begun.weight)
        torch.nn.init.kaiming_uniform_(begun.weight)
        assert torch.equal(begun.weight.nan_to_num(), before.nan_to_num())
        sam = build_sam(settings)
    assert torch.equal(sam.image_encoder.blocks[0].norm1.weight, torch.ones(768))
    torch.nn.init.normal_(begun.weight)
    assert begun.weight.detach().std().item() == pytest.approx(1.0, rel=0.05)


def test_a_damaged_file_is_named_even_where_the_models_cannot_be_built(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    (folder / "clip.json").write_text("{")
    with pytest.raises(BundleError, match=r"clip\.json: checksum"):
        load_towers(folder, "cpu")
