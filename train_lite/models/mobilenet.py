"""MobileNetV2 (Sandler 2018), with torchvision's state-dict names, so its weights load. Width 32 is the published net."""
from torch import nn

from train_lite.models.norm import NORMS

# per stage: expansion, channels, blocks, stride of the first; of width 32
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
LAST = 1280
LEVELS = (3, 6, 13, 17)  # blocks that end strides 4, 8, 16 and 32


def conv(channels_in, channels, norm, kernel=3, stride=1, groups=1):
    return nn.Sequential(nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
                         NORMS[norm](channels), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    def __init__(self, channels_in, channels, stride, expansion, norm):
        super().__init__()
        inner = channels_in * expansion
        layers = [conv(channels_in, inner, norm, kernel=1)] if expansion > 1 else []
        self.conv = nn.Sequential(*layers + [conv(inner, inner, norm, stride=stride, groups=inner),
                                             nn.Conv2d(inner, channels, 1, bias=False), NORMS[norm](channels)])
        self.shortcut, self.channels = stride == 1 and channels_in == channels, channels

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """(B, 3, h, w) -> (B, channels, h / 32, w / 32), rounded up. width: channels of the first level; last: whether the widest
    convolution ends it."""

    def __init__(self, width=32, norm="group", last=True):
        super().__init__()

        def scaled(channels):  # multiples of 4: the norms' groups
            return max(4, int(round(channels * width / 128.0)) * 4)

        layers, channels_in = [conv(3, width, norm, stride=2)], width
        for expansion, channels, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(InvertedResidual(channels_in, scaled(channels), stride if number == 0 else 1, expansion, norm))
                channels_in = scaled(channels)
        self.channels = scaled(LAST) if last else channels_in
        self.features = nn.Sequential(*layers + ([conv(channels_in, self.channels, norm, kernel=1)] if last else []))

    def segments(self):
        """Parts that recompute() may run twice."""
        return list(self.features)

    def residual_ends(self):
        """The norms that end what is added to a shortcut."""
        return [block.conv[-1] for block in self.features if getattr(block, "shortcut", False)]

    def levels(self, x):
        """What the blocks LEVELS give."""
        found = []
        for number, block in enumerate(self.features):
            x = block(x)
            if number in LEVELS:
                found.append(x)
        return found

    def forward(self, x):
        return self.features(x)
