"""Two lines and no argument, on one small model of every kind; `python -m benchmarks.models` tries all there are."""

import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convnext import ConvNeXt
from timm.models.maxxvit import MaxxVit, MaxxVitCfg
from timm.models.mlp_mixer import MlpMixer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.twins import Twins
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import nn
from torchvision import models

import sfr
from sfr.model.formats import View

IMAGE = (3, 32, 32)


def sequence(*shape):
    return lambda: torch.randn(2, *shape)


def words(length):
    return lambda: torch.randint(0, 50, (2, length))


def logits_of(output):
    """What the user passes to the criterion: of a segmentation model, the mean over the pixels."""
    if isinstance(output, dict) and "out" in output:
        output = output["out"]
    logits = getattr(output, "logits", output)
    return logits.flatten(2).mean(dim=2) if logits.ndim > 2 else logits


class UNet(nn.Module):
    """Three levels down and up again, with skip connections."""

    def __init__(self):
        super().__init__()
        widths = (8, 16, 32)
        self.down = nn.ModuleList(map(self.block, (3, *widths), widths))
        self.up = nn.ModuleList([self.block(32 + 16, 16), self.block(16 + 8, 8)])
        self.out = nn.Conv2d(8, 10, 1)

    @staticmethod
    def block(inputs, outputs):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], dim=1))
        return self.out(x)


class Tagger(nn.Module):
    """Words, a recurrent net, and the class of the last step."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, batch_first=True)
        self.classifier = nn.Linear(24, 10)

    def forward(self, x):
        return self.classifier(self.lstm(self.embedding(x))[0][:, -1])


class Residual(nn.Module):
    """A block of a residual net on vectors."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.body(x)


def conv1d_net():
    """As for accelerometers: the stages are activations, which do not tell their own layout."""
    widths = (6, 16, 24, 32)
    layers = [
        layer
        for inputs, outputs in pairwise(widths)
        for layer in (nn.Conv1d(inputs, outputs, 5, 2, 2), nn.BatchNorm1d(outputs), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))


def conv3d_net():
    return nn.Sequential(
        nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv3d(8, 16, 3, 2, 1), nn.ReLU()),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)
    )


vit = partial(VisionTransformer, img_size=32, patch_size=8, embed_dim=24, depth=8, num_heads=2, num_classes=10)
small = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 10}


def hugging_face(name, **settings):
    config = getattr(transformers, f"{name}Config")(**settings)
    head = "SequenceClassification" if name == "Bert" else "ImageClassification"
    return getattr(transformers, f"{name}For{head}")(config)


def depths(pattern, *indices):
    return tuple(pattern.format(index) for index in indices)


FIRST, LAST, VECTOR = View("channels_first"), View("channels_last"), View("vector")
# name: (builder, input, regular expressions of the stages, their views)
MODELS = {
    "ViT with class and register tokens": (
        partial(vit, reg_tokens=4),
        sequence(*IMAGE),
        depths("blocks.{}", 1, 3, 5, 7),
        [View("tokens", 5, (4, 4))] * 4,
    ),
    "ViT without class token": (
        partial(vit, class_token=False, global_pool="avg"),
        sequence(*IMAGE),
        depths("blocks.{}", 1, 3, 5, 7),
        [View("tokens", 0, (4, 4))] * 4,
    ),
    "ViT on a wide image": (
        partial(vit, img_size=(32, 64), depth=2),
        sequence(3, 32, 64),
        depths("blocks.{}", 0, 1),
        [View("tokens", 1, (4, 8))] * 2,
    ),
    "ViT of torchvision": (
        partial(models.VisionTransformer, 32, 8, 3, 2, 24, 48, num_classes=10),
        sequence(*IMAGE),
        depths("encoder.layers.encoder_layer_{}", 0, 1, 2),
        [View("tokens", 1, (4, 4))] * 3,
    ),
    "BEiT": (
        partial(Beit, img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=10),
        sequence(*IMAGE),
        depths("blocks.{}", 0, 1, 2, 3),
        [View("tokens", 1, (4, 4))] * 4,
    ),
    "CaiT": (
        partial(Cait, img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=10),
        sequence(*IMAGE),
        depths("blocks.{}", 0, 1, 2, 3),
        [View("tokens", 0, (4, 4))] * 4,
    ),
    "XCiT": (
        partial(Xcit, img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=10),
        sequence(*IMAGE),
        depths("blocks.{}", 0, 1, 2, 3),
        [View("tokens", 0, (4, 4))] * 4,
    ),
    "MLP-Mixer": (
        partial(MlpMixer, img_size=32, patch_size=8, embed_dim=24, num_blocks=4, num_classes=10),
        sequence(*IMAGE),
        depths("blocks.{}", 0, 1, 2, 3),
        [View("tokens", 0, (4, 4))] * 4,
    ),
    "Swin": (
        partial(SwinTransformer, 32, 2, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 4), window_size=4),
        sequence(*IMAGE),
        ("layers.0", "layers.1", "layers"),
        [LAST] * 3,
    ),
    "Swin of torchvision": (
        partial(models.SwinTransformer, [2, 2], 8, [1, 1], [1, 2], [4, 4], num_classes=10),
        sequence(*IMAGE),
        ("features.1", "features"),
        [LAST] * 2,
    ),
    "PVT": (
        partial(PyramidVisionTransformerV2, depths=(1,) * 4, embed_dims=(8, 16, 24, 32), num_heads=(1,) * 4),
        sequence(3, 64, 64),
        ("stages.0", "stages.1", "stages.2", "stages"),
        [FIRST] * 4,
    ),
    "Twins": (
        partial(Twins, img_size=64, depths=(1,) * 4, embed_dims=(8, 16, 24, 32), num_heads=(1,) * 4, wss=[4, 4, 2, 2]),
        sequence(3, 64, 64),
        depths("pos_block.{}", 0, 1, 2, 3),
        [View("tokens", 0, (size, size)) for size in (16, 8, 4, 2)],
    ),
    "CoAtNet": (
        lambda: MaxxVit(
            MaxxVitCfg(embed_dim=(8, 16, 32, 64), depths=(1,) * 4, block_type=("C", "C", "T", "T"), stem_width=8),
            img_size=64,
            num_classes=10,
        ),
        sequence(3, 64, 64),
        ("stem", "stages.0", "stages.1", "stages.2", "stages"),
        [FIRST] * 5,
    ),
    "MaxViT": (
        partial(models.MaxVit, (64, 64), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=10),
        sequence(3, 64, 64),
        ("stem", "blocks.0", "blocks.1"),
        [FIRST] * 3,
    ),
    "ConvNeXt": (
        partial(ConvNeXt, depths=(1,) * 4, dims=(8, 16, 24, 32), num_classes=10),
        sequence(3, 64, 64),
        ("stages.0", "stages.1", "stages.2", "stages"),
        [FIRST] * 4,
    ),
    "GoogLeNet with auxiliary classifiers": (
        partial(models.googlenet, num_classes=10, init_weights=False),
        sequence(3, 64, 64),
        ("conv1", "conv3", "inception3b", "inception4e", "inception5b"),
        [FIRST] * 5,
    ),
    "SqueezeNet, whose classifier is a convolution": (
        partial(models.squeezenet1_1, num_classes=10),
        sequence(3, 64, 64),
        ("features.1", "features.4", "features.7", "features"),
        [FIRST] * 4,
    ),
    "LR-ASPP segmentation": (
        partial(models.segmentation.lraspp_mobilenet_v3_large, weights_backbone=None, num_classes=10),
        sequence(3, 64, 64),
        ("backbone.1", "backbone.3", "backbone.6", "classifier.cbr"),
        [FIRST] * 4,
    ),
    "U-Net": (UNet, sequence(*IMAGE), depths("down.{}", 0, 1, 2), [FIRST] * 3),
    "1-D convolutions": (conv1d_net, sequence(6, 64), ("2", "5", "8"), [FIRST] * 3),
    "3-D convolutions": (conv3d_net, sequence(3, 4, 8, 8), ("0", "1"), [FIRST] * 2),
    "MLP": (mlp, sequence(48), ("2", "5"), [VECTOR] * 2),
    "residual MLP": (
        lambda: nn.Sequential(nn.Linear(48, 16), *(Residual(16) for _ in range(4)), nn.Linear(16, 10)),
        sequence(48),
        ("1", "2", "3", "4"),
        [VECTOR] * 4,
    ),
    "LSTM": (Tagger, words(12), ("embedding", "lstm"), [View("tokens")] * 2),
    "ViT of Hugging Face": (
        partial(hugging_face, "ViT", image_size=32, patch_size=8, num_hidden_layers=2, **small),
        sequence(*IMAGE),
        depths(r"vit\.(encoder\.layer|layers)\.{}", 0, 1),
        [View("tokens", 1, (4, 4))] * 2,
    ),
    "ConvNeXt of Hugging Face": (
        partial(hugging_face, "ConvNext", hidden_sizes=[8, 16, 24], depths=[1, 1, 1], num_stages=3, num_labels=10),
        sequence(*IMAGE),
        ("convnext.encoder.stages.0", "convnext.encoder.stages.1", "convnext.encoder"),
        [FIRST] * 3,
    ),
    "BERT of Hugging Face": (
        partial(hugging_face, "Bert", vocab_size=50, num_hidden_layers=4, **small),
        words(12),
        depths("bert.encoder.layer.{}", 0, 1, 2, 3),
        [View("tokens")] * 4,
    ),
}


def check(model, stages, views):
    names = model.sfr.stage_names
    assert len(names) == len(stages), names
    assert all(map(re.fullmatch, stages, names)), names
    assert [model.sfr.stage_views[name] for name in names] == views


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_trains_without_an_argument(kind):
    build, make_input, stages, views = MODELS[kind]
    plain, x, target = build(), make_input(), torch.tensor([1, 2])
    model = sfr.SFRWrapper(plain)
    criterion = sfr.SFRLoss(model, feature_weight=1.0, smoothing="none")
    logits = logits_of(model(x))
    loss = criterion(logits, target)
    check(model, stages, views)
    assert all(0 < term < float("inf") for term in criterion.last.pairs.values())
    # What is left without the label term trains the first stage, or what comes before it.
    feature_term = loss - F.cross_entropy(logits, target)
    gradients = torch.autograd.grad(feature_term, list(model.parameters()), allow_unused=True)
    assert any(gradient.abs().sum() > 0 for gradient in gradients if gradient is not None)
    names = model.sfr.stage_names
    criterion(logits_of(model(x)), target).backward()  # now from the taps
    assert list(criterion.last.pairs) == [f"{a} <- {b}" for i, a in enumerate(names) for b in names[i + 1 :]]


@pytest.mark.parametrize("kind", MODELS)
def test_an_example_of_one_input_gives_the_same_stages_and_views(kind):
    build, make_input, stages, views = MODELS[kind]
    model = sfr.SFRWrapper(build(), example_input=make_input()[:1])
    check(model, stages, views)
