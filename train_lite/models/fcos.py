"""FCOS (Tian et al. 2019, arXiv 1904.01355) on a feature pyramid (Lin et al. 2017, arXiv 1612.03144), by patches with a global patch
('Resource Efficient Perception for Vision Systems', section 3). Names and constants are torchvision's; the head has no norms,
whose statistics would be those of a whole map."""
import math

import torch
from torch import nn

from train_lite.models.mobilenet import LEVELS, MobileNetV2
from train_lite.models.norm import begin
from train_lite.models.resnet import ResNet50

PRIOR = 0.01  # what every class of every cell scores before training
TOWER = 4     # convolutions of a tower; with the one that ends it they see edge.boxes.HALO cells around


class Pyramid(nn.Module):
    """Levels of strides 8, 16 and 32 -> (B, channels, cells): those of strides 8 to 128 one after another (edge.boxes.split)."""

    def __init__(self, levels_in, channels):
        super().__init__()
        self.inner_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(count, channels, 1)) for count in levels_in])
        self.layer_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in levels_in])
        self.extra_blocks = nn.ModuleDict({name: nn.Conv2d(channels, channels, 3, 2, 1) for name in ("p6", "p7")})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, levels):
        found, above = [], None
        for level, inner, layer in reversed(list(zip(levels, self.inner_blocks, self.layer_blocks))):
            here = inner(level)
            above = here if above is None else here + nn.functional.interpolate(above, scale_factor=2.0, mode="nearest")
            found.insert(0, layer(above))
        found.append(self.extra_blocks["p6"](found[-1]))
        found.append(self.extra_blocks["p7"](torch.relu(found[-1])))
        batch, channels = (int(size) for size in found[0].shape[:2])  # as numbers: sizes are fixed when it is traced
        return torch.cat([level.reshape(batch, channels, -1) for level in found], dim=2)


class ResNetPyramid(ResNet50):
    """(B, 3, h, w), h and w multiples of 128 -> (B, 4 * width, cells)."""

    def __init__(self, width, norm):
        super().__init__(width, norm)
        begin(self)
        self.fpn = Pyramid([8 * width, 16 * width, 32 * width], 4 * width)

    def forward(self, x):
        return self.fpn(self.levels(x)[1:])


class MobileNetPyramid(MobileNetV2):
    """As a ResNetPyramid."""

    def __init__(self, width, norm):
        super().__init__(width, norm, last=False)
        begin(self)
        self.fpn = Pyramid([self.features[index].channels for index in LEVELS[1:]], 4 * width)

    def forward(self, x):
        return self.fpn(self.levels(x)[1:])


ENCODERS = {"fcos-resnet50": ResNetPyramid, "fcos-mobilenetv2": MobileNetPyramid}


class Head(nn.Module):
    """(B, channels, h, w) -> (B, outputs + 5, h, w): what edge.boxes.windows() takes. inside: (1, 1, h, w), 0 beyond the image, where
    every convolution is then to read zeros, as it does beyond its own input."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.classes, self.places = [nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(TOWER)])
                                     for _ in range(2)]
        self.cls_logits = nn.Conv2d(channels, outputs, 3, padding=1)
        self.bbox = nn.Conv2d(channels, 5, 3, padding=1)  # distances, centre-ness
        for tower in (self.classes, self.places):
            for conv in tower:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)
        for conv in (self.cls_logits, self.bbox):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, x, inside=None):
        found = []
        for tower, last in ((self.classes, self.cls_logits), (self.places, self.bbox)):
            y = x
            for conv in tower:
                y = torch.relu(conv(y))
                y = y if inside is None else y * inside
            found.append(last(y))
        return torch.cat(found, dim=1)


class BoxNet(nn.Module):
    """encoder: patches -> the cells of their levels. head(): cells of an image, (B, C, h, w), with those of the global patch
    brought to the same places -> scores. fusion: how they join, by one 1x1 convolution: 'concat', 'add', 'none'."""

    def __init__(self, encoder, channels, outputs, fusion):
        super().__init__()
        self.encoder, self.fusion, self.channels = encoder, fusion, channels
        self.join = None if fusion == "none" else nn.Conv2d(2 * channels if fusion == "concat" else channels, channels, 1)
        if self.join is not None:
            nn.init.kaiming_uniform_(self.join.weight, a=1)
            nn.init.zeros_(self.join.bias)
        self.last = Head(channels, outputs)

    def head(self, cells, context, inside=None):
        if self.join is not None:
            cells = self.join(torch.cat([cells, context], dim=1) if self.fusion == "concat" else cells + context)
            cells = cells if inside is None else cells * inside
        return self.last(cells, inside)


def build(model, width, norm, outputs, fusion):
    """A BoxNet. model: a key of ENCODERS; width: channels of the encoder's first level; outputs: classes; norm, fusion: as of
    models.build."""
    return BoxNet(ENCODERS[model](width, norm), 4 * width, outputs, fusion)
