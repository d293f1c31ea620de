"""What `python -m train_lite` can be told. One NamedTuple; its comments of unit are in HELPS."""
import re
from typing import NamedTuple

from edge.errors import UsageError
from jetson.memory import parse_bytes

SUPERVISOR_MIB = 14  # what the supervisor holds beside the training
CLASSIFIERS = ("resnet50", "mobilenetv2")
DETECTORS = ("fcos-resnet50", "fcos-mobilenetv2")
PLAIN = ("unet", "deeplabv3")
GLNETS = ("glnet", "glnet-mobilenetv2")
DENSE = PLAIN + GLNETS  # a class for every pixel
LAST_STRIDE = {"detection": 128, "glnet": 32}  # px between the cells of a net's last level; 16 of others
RUN_PIPE = "NANOPATCH_RUN_PIPE"  # names the file descriptor by which train_lite.run tells its supervisor of the run it holds
RETRY_SMALLER = 75  # exit code between train_lite.run and its supervisor: out of memory, go on one notch smaller


class TrainConfig(NamedTuple):
    # data
    res: int = 1024
    fit: str = "long"
    data: str = ""
    classes: int = 1
    ignore: int = 255
    val_share: float = 0.2
    group_by: str = ""
    cache: str = ""
    cache_gb: float = 16.0
    demo_images: int = 0
    # net
    model: str = "unet"
    head: str = "small"
    width: int = 16
    norm: str = "group"
    freeze_at: float = 1.0
    freeze: str = "large"
    weights: str = ""
    allow_pickle: bool = False
    # patches
    mode: str = "patch"
    gradient: str = "sampled"
    global_patch: str = "concat"
    patch: int = 128
    patches: int = 4
    inner: int = 4
    draw: str = "once"
    fill: str = "sample"
    overlap: int = 32
    max_boxes: int = 100
    # of GLNet
    stage: str = "123"
    base: str = ""
    focal: float = 3.0
    feature: float = 0.15
    coarse: float = 0.0
    # learned down-sampling, in the place of patches
    sampler: str = "none"
    task_size: str = "256x256"
    density: int = 64
    deform_width: int = 32
    radius: float = 0.25
    edge_loss: str = "divergence"
    gamma: float = -1.0
    gamma_power: float = 0.0
    shrink: float = 0.8
    # optimisation
    epochs: int = 0
    batch: int = 1
    accumulation: int = 1
    micro_batch: int = 0
    lr: float = 1e-3
    beta2: float = 0.999
    warm_up: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    dice: float = 1.0
    optimizer: str = "adamw"
    augment: bool = True
    seed: int = 0
    # memory
    budget: str = ""
    plan: bool = False
    smaller: int = 0
    half: bool = False
    tight: bool = False
    recompute: bool = False
    spill: bool = False
    # run
    name: str = ""
    out: str = "runs/train"
    resume: str = ""
    save_every: float = 60.0
    validate_every: int = 0
    device: str = "auto"
    threads: int = 0
    json: bool = False
    debug: bool = False


HELPS = {
    "res": "px, longer side at which images are trained on and evaluated",
    "fit": "how an image comes to --res: long (longer side, shape kept), stretch (square, as published), none (as it is)",
    "data": "folder or pairs.csv; none given: a demo set of the asked size is made and used",
    "classes": "1: binary masks; N: masks hold ids 0..N-1. A classes.json in the data folder takes its place",
    "ignore": "mask value that counts neither in loss nor in scores",
    "val_share": "share of the training images held out, where the data has no val folder",
    "group_by": "regular expression on image names; images with the same match stay on one side of the split",
    "cache": "folder of the tile store; none given: .nanopatch in the data folder, or in the user's cache",
    "cache_gb": "GB that the tile store may take; the oldest sets go first",
    "demo_images": "images in the demo set; 0: as many as fit the size, 16 at 1024 px",
    "model": "net of the encoder: unet and deeplabv3 give every pixel a class, glnet (of ResNet50) and glnet-mobilenetv2 too, by two nets "
             "that see each other; resnet50 and mobilenetv2 every image; fcos-resnet50 and fcos-mobilenetv2 find boxes",
    "head": "classification, what reads the grid of patches: small, or PatchGD's published one",
    "width": "channels of the net's first level; published: 64, mobilenetv2 32",
    "norm": "normalisation: group (exact gradients), batch, frozen (fixed statistics, measured before the first step)",
    "freeze_at": "share of the steps after which group norms are frozen, so that they fold at export (0.5 is a good one); 1: never",
    "freeze": "which of them: large, those of the largest maps, which take three quarters of the time; or all, at some cost in F1. Of --norm frozen all",
    "weights": "pretrained weights of the encoder: .safetensors, or .pth with torchvision's names",
    "allow_pickle": "load a .pth on a torch without a safe loader (before 1.13): the file can run any code",
    "mode": "patch; or the paper's comparisons: full (whole image), down (image shrunk to --patch), tiled (no global patch)",
    "gradient": "sampled: --patches random patches per step (PatchGD); exact: the true gradient of the whole image",
    "global_patch": "how the global feature joins the local ones",
    "patch": "px, side of a patch, a multiple of 16",
    "patches": "patches per image and inner iteration (sampled)",
    "inner": "inner iterations per batch (sampled)",
    "draw": "sampled, once: no patch comes twice in a batch before all have come; again: drawn anew in every inner iteration, as published with the global patch",
    "fill": "sampled, where the Dice sums come from: sample (the patches drawn), image (every patch, as published)",
    "overlap": "px shared by neighbouring tiles when predicting",
    "max_boxes": "detection, most boxes of an image, and of a class when scored; 100 is COCO's, a canvas of 36 images holds about 260",
    "stage": "glnet, what is trained, one after another, --epochs each: 1 a net of whole images, 2 one of tiles that sees the first's maps, "
             "3 one of whole images that sees the tiles'",
    "base": "glnet, run folder of the stage before, for a --stage that begins with 2 or 3",
    "focal": "glnet, exponent of the focal loss; 0: cross-entropy",
    "feature": "glnet, stage 2: weight of the difference between what tiles and whole images see",
    "coarse": "glnet, of one class: tiles where whole images give foreground less than this probability everywhere are not worked on; "
              "0: every tile is",
    "sampler": "the net sees the whole image at --task-size, sampled: deform (by a density trained with the net), uniform, edge (by a "
               "density that learns label edges), edge-oracle (by the label edges themselves), marin (8x8 nodes drawn to label edges, Marin 2019). none: patches",
    "task_size": "WIDTHxHEIGHT px that the net sees, multiples of 16",
    "density": "px, longer side of what the deformation net sees, and of its density",
    "deform_width": "channels of the deformation net; 192 is the published one",
    "radius": "reach of a density's pull, as a share of its shorter side",
    "edge_loss": "how the density is told where labels change: divergence (of distributions), spanned (published: squared "
                 "difference of what is brought to 0..1)",
    "gamma": "weight of the edge loss on the density; 0: the task's loss alone; -1: 1 for divergence, 100 for spanned, as published",
    "gamma_power": "--gamma times (1 - step / steps) to this power; published: 0, and 0.9 for slides",
    "shrink": "share of the steps in which the deformation net sees images blurred at random, so that it learns coarse cues",
    "epochs": "passes over the training images; 0: 8 over the demo set, 30 over your data",
    "batch": "images per batch",
    "accumulation": "inner iterations (sampled) or batches (exact) whose gradients make one step",
    "micro_batch": "patches in memory at once; 0: 64 / width, between 1 and 8",
    "lr": "peak learning rate of AdamW",
    "beta2": "of AdamW; the warm-up lasts 2 / (1 - beta2) steps",
    "warm_up": "share of the steps that the warm-up may last at most",
    "weight_decay": "of AdamW",
    "clip": "largest norm of the gradient; 0: no limit",
    "dice": "weight of the Dice loss beside the cross-entropy",
    "optimizer": "adamw; adamw8: its moments in 8 bits, 2 bytes per parameter in place of 8; sgd: none",
    "augment": "flip and quarter-turn whole images at random; with boxes, mirror them left to right",
    "seed": "of weights, data order, patches and augmentation",
    "budget": "memory of the board, such as 4GB: training is made to fit what it leaves; none given: the machine's",
    "plan": "print what training will take, and which levers make it fit, and stop",
    "smaller": "begin this many notches below the plan, or below where --resume stopped",
    "half": "compute in half precision, with loss scaling; weights and moments stay float32. Needs CUDA",
    "tight": "give freed memory back to the system at once: less fragmentation, more time",
    "recompute": "keep the inputs of the net's blocks only, and compute their inside again in the backward pass",
    "spill": "stage 3: what an image's tiles are merged to lies on disk until it is read, for batches of more than one image",
    "name": "of the run; none given: data, mode and time",
    "out": "folder of the runs",
    "resume": "run folder to go on with, exactly where it stopped; all other flags come from it, but --budget, and --data where it was moved",
    "save_every": "seconds between checkpoints within an epoch",
    "validate_every": "epochs between validations, the last epoch always has one; 0: about eight validations in all",
    "device": "cpu, cuda or auto",
    "threads": "CPU threads; 0: torch's choice",
    "json": "print one JSON object on stdout at the end",
    "debug": "show the traceback of an error",
}

CHOICES = {
    "fit": ["long", "stretch", "none"],
    "model": list(DENSE + CLASSIFIERS + DETECTORS),
    "stage": ["123", "12", "23", "1", "2", "3"],
    "head": ["small", "patchgd"],
    "norm": ["group", "batch", "frozen"],
    "freeze": ["large", "all"],
    "mode": ["patch", "full", "down", "tiled"],
    "gradient": ["sampled", "exact"],
    "global_patch": ["concat", "add", "none"],
    "draw": ["once", "again"],
    "fill": ["sample", "image"],
    "sampler": ["none", "deform", "uniform", "edge", "edge-oracle", "marin"],
    "edge_loss": ["divergence", "spanned"],
    "optimizer": ["adamw", "adamw8", "sgd"],
    "device": ["auto", "cpu", "cuda"],
}

OF_MODELS = {"head": CLASSIFIERS, "max_boxes": DETECTORS, "stage": GLNETS, "base": GLNETS, "coarse": GLNETS, "focal": GLNETS, "feature": GLNETS, "spill": GLNETS,
             "classes": DENSE, "ignore": DENSE, "overlap": DENSE, "dice": PLAIN, "fill": PLAIN,
             **dict.fromkeys(("gradient", "global_patch", "patches", "inner", "draw"), PLAIN + CLASSIFIERS + DETECTORS)}  # flags that only these take
OF_SAMPLERS = ("task_size", "density", "deform_width", "radius", "edge_loss", "gamma", "gamma_power", "shrink")
OF_PATCHES = ("gradient", "global_patch", "patch", "patches", "inner", "draw", "fill", "overlap")


def check(config):
    """Raise UsageError for a value out of range or for flags that exclude each other."""
    _check_ranges(config)
    _check_sampler(config)
    for name, models in OF_MODELS.items():
        value = getattr(config, name)
        if value != getattr(TrainConfig(), name) and config.model not in models and (name, value) != ("overlap", 0) and not config.resume:
            raise UsageError("--%s %s and --model %s: that is a flag for %s. Leave it out"
                             % (name.replace("_", "-"), value, config.model, ", ".join(models)))
    _check_glnet(config)
    if not config.resume:
        _check_use(config)
    if config.recompute and config.norm == "batch":
        raise UsageError("--recompute and --norm batch: its statistics would count every patch twice; leave one out")
    if config.classes > 250:
        raise UsageError("--classes is %d, expected 250 or fewer" % config.classes)
    if config.demo_images and config.demo_images < 3:
        raise UsageError("--demo-images is %d; a demo set needs 3 or more" % config.demo_images)


def _check_ranges(config):
    least = {"res": 16, "classes": 1, "width": 4, "patch": 16, "patches": 1, "inner": 1, "overlap": 0, "epochs": 0,
             "batch": 1, "accumulation": 1, "micro_batch": 0, "lr": 0.0, "clip": 0.0, "dice": 0.0, "cache_gb": 0.001,
             "save_every": 0.0, "validate_every": 0, "threads": 0, "demo_images": 0, "smaller": 0, "weight_decay": 0.0,
             "density": 8, "deform_width": 4, "gamma": -1.0, "max_boxes": 1, "focal": 0.0, "feature": 0.0}
    for name, value in least.items():
        if not value <= getattr(config, name) < float("inf"):
            raise UsageError("--%s is %s, expected %s or more" % (name.replace("_", "-"), getattr(config, name), value))
    for name, low, high in (("val_share", 0.0, 0.9), ("freeze_at", 0.0, 1.0), ("beta2", 0.0, 0.99999), ("warm_up", 0.0, 1.0),
                            ("radius", 0.01, 1.0), ("gamma_power", 0.0, 9.0), ("shrink", 0.0, 1.0), ("coarse", 0.0, 0.5),
                            ("seed", 0, 2 ** 32 - 1)):
        if not low <= getattr(config, name) <= high:
            raise UsageError("--%s is %s, expected %s to %s" % (name.replace("_", "-"), getattr(config, name), low, high))
    step = patch_step(config.model)
    if config.patch % step:
        raise UsageError("--patch is %d; the nets halve it %s times: take a multiple of %d, such as %d"
                         % (config.patch, {16: "four", 32: "five", 128: "seven"}[step], step, max(step, config.patch // step * step)))
    if config.overlap >= config.patch and task_of(config.model) == "segmentation":
        raise UsageError("--overlap is %d, expected less than --patch, %d" % (config.overlap, config.patch))
    if config.width % 4:
        raise UsageError("--width is %d, expected a multiple of 4, such as 16" % config.width)
    if config.deform_width % 4:
        raise UsageError("--deform-width is %d, expected a multiple of 4, such as 32" % config.deform_width)
    if not (config.gamma >= 0 or config.gamma == -1):
        raise UsageError("--gamma is %s, expected 0 or more, or -1 for the edge loss's own" % config.gamma)
    if config.budget:
        budget_mib(config.budget)
    if config.density > 512:
        raise UsageError("--density is %d, expected 512 or less: it says where to look, not what is there" % config.density)


def budget_mib(text):
    """MiB of a --budget. Raises UsageError."""
    try:
        return parse_bytes(text) / 2.0 ** 20
    except ValueError as exc:
        raise UsageError("--budget: %s" % exc) from exc


def _given(config, names):
    """Those that are not at their default, as they were typed."""
    return ["--%s %s" % (name.replace("_", "-"), getattr(config, name)) for name in names
            if getattr(config, name) != getattr(TrainConfig(), name)]


def _check_use(config):
    """Flags that ask for what another flag rules out."""
    if config.gradient == "exact":
        for word in _given(config, ("patches", "inner", "draw", "fill")):
            raise UsageError("--gradient exact and %s: every patch is in every step; leave one out" % word)
    if config.mode != "patch" and config.global_patch != "none":
        for word in _given(config, ("global_patch",)):
            raise UsageError("--mode %s and %s: that is without a global patch; leave one out" % (config.mode, word))
    if config.norm != "group":
        for word in _given(config, ("freeze_at",)):
            raise UsageError("--norm %s and %s: it is group norms that freeze on the way; leave one out" % (config.norm, word))
    if config.norm == "batch" or config.norm == "group" and config.freeze_at == 1:
        for word in _given(config, ("freeze",)):
            raise UsageError("%s without --freeze-at: nothing would be frozen. Add --freeze-at 0.5, or leave it out" % word)


def _check_sampler(config):
    if config.sampler == "none":
        if not config.resume:
            for word in _given(config, OF_SAMPLERS):
                raise UsageError("%s without --sampler: nets of patches have no use for it. Add --sampler deform, or leave it out" % word)
        return
    task_size(config)
    if config.model not in PLAIN:
        raise UsageError("--sampler %s and --model %s: samplers are for nets that give every pixel a class, %s"
                         % (config.sampler, config.model, " and ".join(PLAIN)))
    if config.mode != "patch":
        raise UsageError("--sampler %s and --mode %s: a sampler takes the place of patches; leave one out" % (config.sampler, config.mode))
    for word in _given(config, OF_PATCHES):
        raise UsageError("--sampler %s and %s: the net sees all samples at once, there are no patches behind them; leave one out"
                         % (config.sampler, word))


def _check_glnet(config):
    if config.coarse and config.mode != "patch":
        raise UsageError("--coarse %g and --mode %s: proposals come from whole images and are for the tiles beside them; leave one out"
                         % (config.coarse, config.mode))
    if config.coarse and config.stage == "1":
        raise UsageError("--coarse %g and --stage 1: proposals are for the tiles of stage 2; take --stage 12, or leave --coarse out" % config.coarse)
    if config.coarse and "3" in config.stage:
        raise UsageError("--coarse %g and --stage %s: whole images that see their tiles' maps need all tiles; take --stage %s"
                         % (config.coarse, config.stage, config.stage.replace("3", "") or "2"))
    if config.stage != TrainConfig().stage and config.mode != "patch":
        raise UsageError("--stage %s and --mode %s: a baseline has no stages; leave one out" % (config.stage, config.mode))
    if config.weights and config.model in GLNETS and config.stage == "3" and not config.resume:
        raise UsageError("--weights %s and --stage 3: it begins with the encoders of its base. Leave --weights out" % config.weights)
    if config.model in GLNETS and config.mode == "full":
        raise UsageError("--mode full and --model %s: its two baselines are --mode down, whole images, and --mode tiled, tiles" % config.model)
    if config.base and stage(config) == 1:
        raise UsageError("--base %s: %s begins from nothing; the net of a base goes on in --stage 23, 2 or 3"
                         % (config.base, "--stage %s" % config.stage if config.mode == "patch" else "--mode %s" % config.mode))
    if config.model in GLNETS and stage(config) > 1 and not config.base:
        raise UsageError("--stage %s begins with the net of stage %d: name its run folder, --base runs/train/NAME, or train all of "
                         "them, --stage 123" % (config.stage, stage(config) - 1))


def task_size(config):
    """(height, width) px of --task-size. Raises UsageError."""
    match = re.match(r"^([1-9]\d{0,4})x([1-9]\d{0,4})$", config.task_size)
    if not match or any(int(side) % 16 for side in match.groups()):
        raise UsageError("--task-size %s: expected WIDTHxHEIGHT, both multiples of 16, such as 256x256" % config.task_size)
    return int(match.group(2)), int(match.group(1))


def density_size(config):
    """(height, width) of the density: the task's shape, --density on the longer side."""
    height, width = task_size(config)
    return tuple(max(1, int(round(side * config.density / float(max(height, width))))) for side in (height, width))


def density_radius(config):
    """(rows, columns) that a density pulls over: the published radius R, horizontally times the whole part of width / height."""
    height, width = density_size(config)
    radius = max(1, int(round(config.radius * min(height, width))))
    return radius, radius * max(1, width // height)


class ModeSettings(NamedTuple):
    """What a --mode means for the one loop."""
    resize: str       # of the training images: a rule of edge.images.fitted_size
    resize_px: int
    tile: int         # px; 0: the whole image
    fusion: str       # of the global patch
    gradient: str
    fill: str
    overlap: int
    task: tuple = ()  # of a sampler, (height, width): px of the samples,
    density: tuple = ()  # px of the density,
    radius: tuple = ()   # rows and columns of it over which it pulls
    again: bool = False  # whether patches drawn once may be drawn again
    merges: bool = False   # of a GLNet, as its recipe (edge.glnet.Recipe)
    coarse: float = 0.0


def mode_settings(config):
    """Resolve --mode and --sampler into ModeSettings; the loop, the evaluation and the export read these only."""
    if config.sampler != "none":
        return ModeSettings(config.fit, config.res, 0, "none", "exact", "image", 0, task_size(config), density_size(config),
                            density_radius(config))
    settings = {
        "full": ModeSettings(config.fit, config.res, 0, "none", "exact", "image", 0),
        "down": ModeSettings("stretch", config.patch, config.patch, "none", "exact", "image", 0),
        "tiled": ModeSettings(config.fit, config.res, config.patch, "none", config.gradient, "sample", config.overlap),
        "patch": ModeSettings(config.fit, config.res, config.patch, config.global_patch, config.gradient, config.fill,
                              config.overlap)}[config.mode]._replace(again=config.draw == "again")
    if config.model in GLNETS:
        if config.mode == "patch":  # stage 1 sees whole images, of a tile's size
            settings = settings._replace(
                fusion="maps", merges=stage(config) == 3, coarse=config.coarse) if stage(config) > 1 else settings._replace(
                resize="stretch", resize_px=config.patch, fusion="none", overlap=0)
        return settings._replace(gradient="exact", fill="image")
    if task_of(config.model) == "classification":  # one grid for all images, whole from the start: PatchGD's Z
        return settings._replace(resize="none" if config.fit == "none" and config.mode != "down" else "stretch", fill="image", overlap=0)
    if task_of(config.model) == "detection":  # the head looks across patches: all of Z is there from the start
        return settings._replace(fill="image", overlap=0)
    return settings


def task_of(model):
    """The task that the net of this name is for."""
    return "classification" if model in CLASSIFIERS else "detection" if model in DETECTORS else "segmentation"


def patch_step(model):
    """px of which the side of a patch is a multiple."""
    return LAST_STRIDE.get("glnet" if model in GLNETS else task_of(model), 16)


def stage(config):
    """1, 2 or 3: the stage of a GLNet that is trained now; its baselines are of the first."""
    return int(config.stage[0]) if config.mode == "patch" else 1


def whole_side(model, longest):
    """px of the square tile that holds a whole image whose longer side is `longest`."""
    step = patch_step(model)
    return -(-longest // step) * step


def micro_batch(config):
    return config.micro_batch or max(1, min(8, 64 // config.width))


def validation_due(config, epoch):
    """Whether epoch 1, 2, ... ends with a validation."""
    return epoch == config.epochs or epoch % (config.validate_every or max(1, config.epochs // 8)) == 0
