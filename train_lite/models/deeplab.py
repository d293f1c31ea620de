"""DeepLabv3 on ResNet-50 (Chen 2017), output stride 8, with torchvision's state-dict names, so its weights load."""
import torch
from torch import nn

from train_lite.models.norm import NORMS
from train_lite.models.resnet import ResNet50

RATES = (12, 24, 36)
DILATED = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 2))  # stages 3 and 4 are dilated instead of strided


class ImagePooling(nn.Sequential):
    """Mean over the patch, spread back over it; as a resize, which exports as one operator where expand() takes five."""

    def forward(self, x):
        return nn.functional.interpolate(super().forward(x), scale_factor=(float(x.shape[2]), float(x.shape[3])))


class ASPP(nn.Module):
    def __init__(self, channels_in, channels, norm):
        super().__init__()
        branches = [nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), NORMS[norm](channels), nn.ReLU())]
        for rate in RATES:
            branches.append(nn.Sequential(nn.Conv2d(channels_in, channels, 3, padding=rate, dilation=rate, bias=False),
                                          NORMS[norm](channels), nn.ReLU()))
        branches.append(ImagePooling(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels_in, channels, 1, bias=False),
                                     NORMS[norm](channels), nn.ReLU()))
        self.convs = nn.ModuleList(branches)
        self.project = nn.Sequential(nn.Conv2d(5 * channels, channels, 1, bias=False), NORMS[norm](channels),
                                     nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x):
        return self.project(torch.cat([branch(x) for branch in self.convs], dim=1))


class DeepLabV3(nn.Module):
    """(B, 3, h, w) float -> (B, features, h, w), h and w multiples of 16. width 64 is the published net; the
    last convolution has `features` maps in place of torchvision's classes."""
    stride = 16

    def __init__(self, features=8, width=64, norm="group"):
        super().__init__()
        self.backbone = ResNet50(width, norm, DILATED)
        self.classifier = nn.Sequential(
            ASPP(32 * width, 4 * width, norm),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1, bias=False), NORMS[norm](4 * width), nn.ReLU(),
            nn.Conv2d(4 * width, features, 1))

    def segments(self):
        """Parts that recompute() may run twice."""
        return self.backbone.blocks() + [self.classifier[0]]

    def forward(self, x):
        return nn.functional.interpolate(self.classifier(self.backbone(x)), scale_factor=8.0, mode="bilinear",
                                         align_corners=False)
