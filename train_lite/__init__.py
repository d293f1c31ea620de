"""Patch training with a global patch, in the memory of a small board. Importing does nothing and loads no torch."""
