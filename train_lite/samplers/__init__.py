"""In the place of patches: nets that see few samples of the whole image, and what says where those lie."""
