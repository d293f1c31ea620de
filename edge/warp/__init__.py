"""Learned down-sampling: where a deform net's density puts the samples of an image, and the way back to every pixel.

reference.py defines it in numpy; train_lite/samplers/warp.py trains through the same formulas, warp.cu computes them on a GPU."""
