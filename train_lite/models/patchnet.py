"""Encoder (theta 1) and head (theta 2) of PatchGD with a global patch, for segmentation (docs/method.md, section 2)."""
import torch
from torch import nn

from edge.contract import FEATURES  # maps that the encoder gives per pixel: 8, the published number


class PatchNet(nn.Module):
    """encoder: (B, 3, p, p) -> (B, 8, p, p). The head is one 1x1 convolution, so it works on any part of an image.

    fusion: how the global feature joins the local ones: 'concat' (the authors' setting), 'add', or 'none'."""

    def __init__(self, encoder, outputs, fusion):
        super().__init__()
        self.encoder = encoder
        self.fusion = fusion
        self.head = nn.Conv2d(2 * FEATURES if fusion == "concat" else FEATURES, outputs, 1)

    def score(self, features, g, rows, cols):
        """Class scores of tiles. features (B, 8, p, p); g (B or 1, 8, q, q) global features, rows (B, p, q) and
        cols (B, p, q) the interpolation of g to each tile (edge.geometry.bilinear_matrix); the last three are
        ignored without fusion. Returns logits (B, outputs, p, p)."""
        if self.fusion != "none":
            spread = moved(g, rows, cols)
            features = torch.cat([features, spread], dim=1) if self.fusion == "concat" else features + spread
        return self.head(features)

    def forward(self, pixels, g=None, rows=None, cols=None):
        return self.score(self.encoder(pixels), g, rows, cols)


def moved(maps, rows, cols):
    """Maps (B or 1, C, a, b) by matrices rows (B, p, a) and cols (B, q, b): (B, C, p, q)."""
    return torch.matmul(torch.matmul(rows.unsqueeze(1), maps), cols.unsqueeze(1).transpose(2, 3))
