"""GLNet, two branches that see each other's maps at every level ('Collaborative Global-Local Networks', Chen et al. 2019, arXiv
1905.06368, section 3; docs/method.md, section 8). Each is a backbone, with torchvision's names, and a feature pyramid. Maps of a
level: the backbone's, and three of the pyramid's, one after another; flat: those of all levels (edge.glnet.split)."""
import torch
from torch import nn

from edge.geometry import bilinear_matrix
from edge.glnet import STRIDES, split
from train_lite.models import patchnet
from train_lite.models.mobilenet import LEVELS, MobileNetV2
from train_lite.models.norm import begin
from train_lite.models.resnet import ResNet50


class ResNetLevels(ResNet50):
    """(B, 3, h, w) -> maps of the four STRIDES, of `channels` each."""

    def __init__(self, width, norm):
        super().__init__(width, norm)
        self.channels = [4 * width, 8 * width, 16 * width, 32 * width]
        begin(self)

    def forward(self, x):
        return self.levels(x)


class MobileNetLevels(MobileNetV2):
    """As a ResNetLevels."""

    def __init__(self, width, norm):
        super().__init__(width, norm, last=False)
        self.channels = [self.features[index].channels for index in LEVELS]
        begin(self)

    def forward(self, x):
        return self.levels(x)


ENCODERS = {"glnet": ResNetLevels, "glnet-mobilenetv2": MobileNetLevels}


class Pyramid(nn.Module):
    """Levels of a backbone -> (maps of each level, the deepest map (B, 8 * width, h / 4, w / 4)). shared: whether every convolution also
    reads the other branch's maps, which doubles what it takes in. No layer but convolutions, as published."""

    def __init__(self, channels, width, shared):
        super().__init__()
        fold = 2 if shared else 1
        self.width = width
        self.lateral = nn.ModuleList([nn.Conv2d(fold * count, 4 * width, 1) for count in channels])
        self.smooth1 = nn.ModuleList([nn.Conv2d(fold * 4 * width, 4 * width, 3, padding=1) for _ in channels])
        self.smooth2 = nn.ModuleList([nn.Conv2d(fold * 4 * width, 2 * width, 3, padding=1) for _ in channels])
        self.smooth = nn.Conv2d(fold * 8 * width, 8 * width, 3, padding=1) if shared else None
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                nn.init.zeros_(conv.bias)

    def forward(self, levels, others=None):
        parts = [[None] * 4] * 4
        if others is not None:
            sizes = [[int(level.shape[1]), 4 * self.width, 4 * self.width, 2 * self.width] for level in levels]
            parts = [torch.split(other, size, dim=1) for other, size in zip(others, sizes)]
        own0, above = [], None
        for level, lateral, (theirs, _, _, _) in reversed(list(zip(levels, self.lateral, parts))):
            here = lateral(joined(level, theirs))
            above = here if above is None else here + resized(above, here.shape[2])
            own0.insert(0, above)
        own1 = [smooth(joined(own, part[1])) for own, smooth, part in zip(own0, self.smooth1, parts)]
        own2 = [smooth(joined(own, part[2])) for own, smooth, part in zip(own1, self.smooth2, parts)]
        side = levels[0].shape[2]
        deep = torch.cat([resized(joined(own, part[3]), side) for own, part in zip(own2, parts)], dim=1)
        return [torch.cat(maps, dim=1) for maps in zip(levels, own0, own1, own2)], deep if self.smooth is None else self.smooth(deep)


def joined(own, theirs):
    return own if theirs is None else torch.cat([own, theirs], dim=1)


def resized(maps, side):
    """Square maps (..., n, n) brought to side x side, bilinear."""
    matrix = torch.from_numpy(bilinear_matrix(int(side), int(maps.shape[-1]))).to(maps)
    return torch.matmul(torch.matmul(matrix, maps), matrix.t())


def moved(maps, rows, cols):
    """Flat maps, split into levels (1 or n, C, a, a), by the matrices of edge.glnet.crops or places, split into (n, b, a) each."""
    return [patchnet.moved(*level) for level in zip(maps, rows, cols)]


class Branch(nn.Module):
    """(B, 3, p, p) and the other branch's maps -> (maps, deepest map, class scores), at a quarter of the pixels each way."""

    def __init__(self, model, width, norm, outputs, shared):
        super().__init__()
        self.encoder = ENCODERS[model](width, norm)
        self.pyramid = Pyramid(self.encoder.channels, width, shared)
        self.classify = nn.Conv2d(8 * width, outputs, 3, padding=1)

    def maps(self, pixels, others=None):
        return self.pyramid(self.encoder(pixels), others)

    def forward(self, pixels, others=None):
        maps, deep = self.maps(pixels, others)
        return maps, deep, self.classify(deep)


class Alone(nn.Module):
    """One branch that sees no other: stage 1, and the two baselines. A net as edge.scores.score_bands takes it."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    @property
    def encoder(self):
        return self.branch.encoder

    def forward(self, pixels, _g=None, _rows=None, _cols=None):
        return resized(self.branch(pixels)[2], pixels.shape[2])


class GLNet(nn.Module):
    """Stage 2: `overview` is stage 1's branch, frozen; `local` and the fusion are trained. Stage 3 freezes local, and trains `whole`,
    which sees the tiles' maps, and the fusion.

    The fusion is one convolution of the two deepest maps; as it is linear it is two, and of a tile only what its own gives is kept."""

    def __init__(self, stage, model, width, norm, outputs):
        super().__init__()
        self.stage, self.outputs = stage, outputs
        self.overview = Branch(model, width, norm, outputs, False)
        self.local = Branch(model, width, norm, outputs, True)
        self.whole = Branch(model, width, norm, outputs, True) if stage == 3 else None
        self.fuse_local = nn.Conv2d(8 * width, outputs, 3, padding=1)
        self.fuse_deep = nn.Conv2d(8 * width, outputs, 3, padding=1, bias=False)
        self.channels = [count + 10 * width for count in self.local.encoder.channels]
        self.freeze()

    def freeze(self):
        """Ask for gradients of what this stage trains only."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        for branch in self.frozen():
            for parameter in branch.parameters():
                parameter.requires_grad_(False)

    def frozen(self):
        """The branches that this stage does not train."""
        return [self.overview] + ([self.local] if self.whole else [])

    @property
    def encoder(self):
        """The backbone that this stage trains."""
        return (self.whole or self.local).encoder

    def train(self, mode=True):
        super().train(mode)
        for branch in self.frozen():
            branch.eval()
        return self

    def look(self, pixels):
        """(B, 3, p, p) whole images -> (flat maps (B, M), deepest map (B, D, p / 4, p / 4), scores (B, C, p / 4, p / 4))."""
        maps, deep, scores = self.overview(pixels)
        return flat(maps), deep, scores

    def tiles(self, pixels, maps, rows, cols):
        """Tiles of one image, its flat maps (1, M), packed matrices (n, R) of edge.glnet.crops -> (maps, deepest map) of the tiles."""
        side = int(pixels.shape[2])
        return self.local.maps(pixels, moved(split(maps, side, self.channels), split(rows, side), split(cols, side)))

    def work(self, pixels, maps, rows, cols):
        """As tiles() -> the tiles' share of the fusion."""
        return self.fuse_local(self.tiles(pixels, maps, rows, cols)[1])

    def merge(self, pixels, maps, rows, cols, put_rows, put_cols, merged):
        """As work(), and the flat `merged` (1, M) with the tiles' maps added at their places."""
        own, deep = self.tiles(pixels, maps, rows, cols)
        side = int(pixels.shape[2])
        put = moved(own, split(put_rows, side), split(put_cols, side))
        return self.fuse_local(deep), merged + flat(put).sum(dim=0, keepdim=True)

    def deepen(self, pixels, merged):
        """Whole images (B, 3, p, p) and their tiles' merged maps (B, M) -> the deepest map of `whole`."""
        return self.whole.maps(pixels, split(merged, int(pixels.shape[2]), self.channels))[1]

    def fuse(self, part, deep, rows, cols):
        """part (n, C, h, h) of work(); deep (1 or n, D, h, h) of the whole image; rows, cols (n, h * h): the first level's of
        edge.glnet.crops -> scores (n, C, h, h)."""
        side = int(part.shape[2])
        crop, = moved([deep], [rows.reshape(-1, side, side)], [cols.reshape(-1, side, side)])
        return part + self.fuse_deep(crop)

    def fuse_large(self, part, deep, rows, cols):
        """fuse(), of the tiles' own size."""
        scores = self.fuse(part, deep, rows, cols)
        return resized(scores, int(scores.shape[2]) * STRIDES[0])


def flat(maps):
    """Maps (n, C, h, w) of each level -> (n, M)."""
    return torch.cat([level.reshape(int(level.shape[0]), -1) for level in maps], dim=1)


def widened(conv, plain):
    """Give `conv`, which reads another branch's maps too, the weights of `plain`, which does not; of the others nothing yet."""
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, :plain.weight.shape[1]] = plain.weight
        conv.bias.copy_(plain.bias)


def begin_as(branch, first):
    """Let a branch that sees the other start with the maps and scores of `first`, which sees none: nothing of the other is heard yet.
    Where a norm is frozen in `first` alone, its statistics are left out."""
    branch.encoder.load_state_dict(first.encoder.state_dict(), strict=False)
    branch.classify.load_state_dict(first.classify.state_dict())
    for name in ("lateral", "smooth1", "smooth2"):
        for conv, plain in zip(getattr(branch.pyramid, name), getattr(first.pyramid, name)):
            widened(conv, plain)
    smooth, own = branch.pyramid.smooth, 2 * branch.pyramid.width  # of each level, its own maps and as many of the other's
    with torch.no_grad():
        smooth.weight.zero_()
        smooth.bias.zero_()
        for channel in range(smooth.out_channels):
            smooth.weight[channel, channel // own * 2 * own + channel % own, 1, 1] = 1


def build(stage, model, width, norm, outputs):
    """The net of a stage: an Alone of stage 1, a GLNet of 2 or 3. model: a key of ENCODERS; norm: as of models.build."""
    if stage == 1:
        return Alone(Branch(model, width, norm, outputs, False))
    return GLNet(stage, model, width, norm, outputs)
