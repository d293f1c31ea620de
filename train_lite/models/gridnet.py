"""PatchGD for whole-image labels: every patch becomes one vector of a grid, and a head reads the grid ('PatchGD', Gupta et al. 2023,
arXiv 2301.13817, section 3; the global patch: 'Resource Efficient Perception for Vision Systems', section 3)."""
import torch
from torch import nn

from train_lite.models.mobilenet import MobileNetV2
from train_lite.models.norm import NORMS, begin
from train_lite.models.resnet import ResNet50


class ResNetEncoder(ResNet50):
    """(B, 3, h, w) -> (B, features)."""

    def __init__(self, features, width, norm):
        super().__init__(width, norm)
        self.fc, self.features_out = nn.Linear(32 * width, features), features

    def forward(self, x):
        return self.fc(super().forward(x).mean(dim=(2, 3)))


class MobileNetEncoder(MobileNetV2):
    """(B, 3, h, w) -> (B, features)."""

    def __init__(self, features, width, norm):
        super().__init__(width, norm)
        self.classifier, self.features_out = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.channels, features)), features

    def forward(self, x):
        return self.classifier(super().forward(x).mean(dim=(2, 3)))


ENCODERS = {"resnet50": (ResNetEncoder, 64), "mobilenetv2": (MobileNetEncoder, 32)}  # name: class, published width
FEATURES = 256  # of the published widths


class PatchGDHead(nn.Module):
    """The published one: four convolutions, three of them with stride 2, then one linear layer over all that is left. Its
    grid is fixed."""

    def __init__(self, channels_in, channels, outputs, grid, norm):
        super().__init__()
        layers, (rows, cols) = [], grid
        for number in range(4):
            stride = 1 if number == 0 else 2
            layers += [nn.Conv2d(channels_in if number == 0 else channels, channels, 3, stride, 1), nn.ReLU(inplace=True),
                       NORMS[norm](channels), nn.Dropout2d(0.2)]
            rows, cols = -(-rows // stride), -(-cols // stride)
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(channels * rows * cols, outputs)

    def forward(self, x):
        return self.last(self.layers(x).flatten(1))


class SmallHead(nn.Module):
    """For the board: two convolutions and a mean over the grid. No norm: over few cells it would erase what they hold."""

    def __init__(self, channels_in, channels, outputs, _grid, _norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels_in, channels, 1), nn.ReLU(inplace=True),
                                    nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(inplace=True))
        self.last = nn.Linear(channels, outputs)

    def forward(self, x):
        return self.last(self.layers(x).mean(dim=(2, 3)))


HEADS = {"patchgd": PatchGDHead, "small": SmallHead}


class GridNet(nn.Module):
    """encoder: (n, 3, p, p) patches -> (n, F), F is its features_out. head: a grid of them (B, F, rows, cols) and the global patch's (B, F) -> class scores
    (B, outputs). fusion: how the global patch joins: 'add' (published), 'concat', 'none'."""

    def __init__(self, encoder, head, fusion):
        super().__init__()
        self.encoder, self.last, self.fusion, self.features = encoder, head, fusion, encoder.features_out
        begin(encoder)

    def head(self, cells, g):
        if self.fusion != "none":
            spread = g[:, :, None, None]
            cells = torch.cat([cells, spread.repeat(1, 1, *cells.shape[2:])], dim=1) if self.fusion == "concat" else cells + spread
        return self.last(cells)


def build(model, head, width, norm, outputs, grid, fusion):
    """A GridNet. model: a key of ENCODERS; head: of HEADS; width: channels of the encoder's first level; outputs: classes;
    grid: (rows, cols) of patches; norm, fusion: as of models.build."""
    encoder, published = ENCODERS[model]
    features = FEATURES * width // published
    into = features * (2 if fusion == "concat" else 1)
    return GridNet(encoder(features, width, norm), HEADS[head](into, features, outputs, grid, norm), fusion)
