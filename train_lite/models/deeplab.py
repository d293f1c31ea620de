"""DeepLabv3 on ResNet-50 (Chen 2017), output stride 8, with torchvision's state-dict names, so its weights load."""
import torch
from torch import nn

from train_lite.models.norm import NORMS

STAGES = (3, 4, 6, 3)
RATES = (12, 24, 36)


class Bottleneck(nn.Module):
    def __init__(self, channels_in, planes, stride, dilation, project, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, planes, 1, bias=False)
        self.bn1 = NORMS[norm](planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = NORMS[norm](planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = NORMS[norm](4 * planes)
        self.downsample = nn.Sequential(nn.Conv2d(channels_in, 4 * planes, 1, stride, bias=False),
                                        NORMS[norm](4 * planes)) if project else None

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """(B, 3, h, w) -> (B, 32 * width, ceil(h / 8), ceil(w / 8)): stages 3 and 4 are dilated instead of strided."""

    def __init__(self, width=64, norm="group"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = NORMS[norm](width)
        channels = width
        for index, blocks in enumerate(STAGES):
            planes = width * 2 ** index
            stride, dilation, first_dilation = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 2))[index]
            layer = [Bottleneck(channels, planes, stride, first_dilation, True, norm)]
            layer += [Bottleneck(4 * planes, planes, 1, dilation, False, norm) for _ in range(blocks - 1)]
            setattr(self, "layer%d" % (index + 1), nn.Sequential(*layer))
            channels = 4 * planes

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


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
        self.backbone = ResNet50(width, norm)
        self.classifier = nn.Sequential(
            ASPP(32 * width, 4 * width, norm),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1, bias=False), NORMS[norm](4 * width), nn.ReLU(),
            nn.Conv2d(4 * width, features, 1))

    def segments(self):
        """Parts that recompute() may run twice."""
        stages = (self.backbone.layer1, self.backbone.layer2, self.backbone.layer3, self.backbone.layer4)
        return [block for stage in stages for block in stage] + [self.classifier[0]]

    def forward(self, x):
        return nn.functional.interpolate(self.classifier(self.backbone(x)), scale_factor=8.0, mode="bilinear",
                                         align_corners=False)
