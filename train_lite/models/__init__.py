"""The nets by name. One file per net; no config, no file access."""
from train_lite.models.deeplab import DeepLabV3
from train_lite.models.patchnet import FEATURES, PatchNet
from train_lite.models.unet import UNet

MODELS = {"unet": UNet, "deeplabv3": DeepLabV3}


def build(model, width, norm, outputs, fusion):
    """A PatchNet. model: a key of MODELS; width: channels of its first level; norm 'group' | 'batch' | 'frozen';
    outputs: score maps (1: binary); fusion of the global patch 'concat' | 'add' | 'none'."""
    return PatchNet(MODELS[model](FEATURES, width, norm), outputs, fusion)
