"""U-Net (Ronneberger 2015) with padded convolutions: width 64 and 8 output maps is the published 31.04 M net."""
import torch
from torch import nn

from train_lite.models.norm import NORMS


def block(channels_in, channels, norm):
    """Twice convolution, norm, ReLU; the convolution stands before its norm, so that the norm can be folded."""
    layers = []
    for first in (channels_in, channels):
        layers += [nn.Conv2d(first, channels, 3, padding=1), NORMS[norm](channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """(B, 3, h, w) float -> (B, features, h, w), h and w multiples of 16. width: channels of the first level."""
    stride = 16

    def __init__(self, features=8, width=64, norm="group"):
        super().__init__()
        sizes = [width * 2 ** level for level in range(5)]
        self.down = nn.ModuleList([block(a, b, norm) for a, b in zip([3] + sizes[:-1], sizes)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * c, c, 2, stride=2) for c in sizes[:-1]])
        self.merge = nn.ModuleList([block(2 * c, c, norm) for c in sizes[:-1]])
        self.last = nn.Conv2d(width, features, 1)

    def segments(self):
        """Parts that recompute() may run twice."""
        return list(self.down) + list(self.merge)

    def forward(self, x):
        kept = []
        for level in range(4):
            x = self.down[level](x)
            kept.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.down[4](x)
        for level in (3, 2, 1, 0):
            x = self.merge[level](torch.cat([kept.pop(), self.up[level](x)], dim=1))
        return self.last(x)
