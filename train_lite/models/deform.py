"""The deformation net of 'Learning to Downsample' (Jin et al. 2022, arXiv 2109.11071, appendix): where does an image deserve
samples? Width 192 is the published one."""
from torch import nn

from train_lite.models.norm import NORMS

LAST = 24  # channels before the one of the logits


class DeformNet(nn.Module):
    """(B, 3, h, w) float, the image shrunk -> (B, 1, h, w) density logits; their softmax over h x w is the density."""

    def __init__(self, width=192, norm="batch"):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), NORMS[norm](width), nn.ReLU6(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False), NORMS[norm](width), nn.ReLU6(inplace=True),
            nn.Conv2d(width, LAST, 3, padding=1, bias=False), NORMS[norm](LAST), nn.ReLU(inplace=True))
        self.last = nn.Conv2d(LAST, 1, 1)
        nn.init.zeros_(self.last.weight)  # training begins at a flat density: the plain resize
        nn.init.zeros_(self.last.bias)

    def forward(self, x):
        return self.last(self.layers(x))
