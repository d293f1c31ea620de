"""nanopatch's runtime: files and cameras through exported nets, without torch. Importing does nothing."""
__version__ = "0.1.0"
