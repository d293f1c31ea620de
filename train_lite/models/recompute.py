"""Activation checkpointing: memory of a segment's input in place of all that is inside it, for a second forward pass."""
import functools
import inspect

import torch
from torch.utils.checkpoint import checkpoint

# the form that torch 1.10 has, named where a newer torch wants it named
FORM = {"use_reentrant": True} if "use_reentrant" in inspect.signature(checkpoint).parameters else {}


def recompute(encoder):
    """From now on each of encoder.segments() is computed again in the backward pass. The gradients stay the same bits.
    Not for batch norm: it would count every batch twice."""
    for segment in encoder.segments():
        segment.forward = functools.partial(_twice, segment.forward)


def _twice(forward, x):
    if not torch.is_grad_enabled():
        return forward(x)
    if x.requires_grad:
        return checkpoint(forward, x, **FORM)
    # of an input without gradient this form of checkpoint would give the segment's weights none
    return checkpoint(lambda pixels, _flag: forward(pixels), x, torch.ones(1, requires_grad=True), **FORM)
