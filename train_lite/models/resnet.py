"""ResNet-50 (He 2016), with torchvision's state-dict names, so its weights load. Width 64 is the published net."""
import torch
from torch import nn

from train_lite.models.norm import NORMS

BLOCKS = (3, 4, 6, 3)
STRIDED = ((1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1))  # output stride 32


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
    """(B, 3, h, w) -> (B, 32 * width, h / stride, w / stride), rounded up. strides: per stage its stride, its dilation, and that
    of its first block."""

    def __init__(self, width=64, norm="group", strides=STRIDED):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = NORMS[norm](width)
        channels = width
        for index, blocks in enumerate(BLOCKS):
            planes = width * 2 ** index
            stride, dilation, first_dilation = strides[index]
            layer = [Bottleneck(channels, planes, stride, first_dilation, True, norm)]
            layer += [Bottleneck(4 * planes, planes, 1, dilation, False, norm) for _ in range(blocks - 1)]
            setattr(self, "layer%d" % (index + 1), nn.Sequential(*layer))
            channels = 4 * planes

    def blocks(self):
        """All residual blocks, in their order."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def segments(self):
        """Parts that recompute() may run twice."""
        return self.blocks()

    def residual_ends(self):
        """The norms that end what is added to a shortcut."""
        return [block.bn3 for block in self.blocks()]

    def levels(self, x):
        """What the four stages give: of 4, 8, 16 and 32 * width channels."""
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        found = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x):
        return self.levels(x)[-1]
