"""Half precision on CUDA with a scaled loss (Micikevicius et al. 2018, arXiv 1710.03740, sections 3.1 and 3.2): layers compute in
float16; weights, moments and all sums over pixels stay float32."""
import torch

START, GROW_AFTER, LEAST, MOST = 1.0, 200, 2.0 ** -20, 2.0 ** 20  # gradients per pixel are of order 1 (gradient.py)


def apply(net, half, pixels, *rest):
    """net(pixels, *rest), its layers in float16 when `half`; then the result is float32 again."""
    if not half:
        return net(pixels, *rest)
    with torch.autocast(pixels.device.type, dtype=torch.float16):
        return net(pixels, *rest).float()


class LossScale:
    """What the loss is multiplied with, so that float16 gradients neither vanish nor overflow: halved by a step that
    overflowed (which is then left out), doubled after GROW_AFTER that did not. Without `half` it stays 1."""

    def __init__(self, half):
        self.half, self.value, self._good = half, START, 0

    def lower(self):
        """After an overflow. False when half precision is not what caused it."""
        self.value, self._good = self.value / 2, 0
        return self.half and self.value >= LEAST

    def succeed(self):
        self._good += 1
        if self.half and self._good % GROW_AFTER == 0:
            self.value = min(MOST, self.value * 2)

    def position(self):
        """[value, good steps], for a checkpoint."""
        return [self.value, self._good]

    def restore(self, position):
        self.value, self._good = map(float, position)
