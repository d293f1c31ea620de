"""Folders on disk -> pairs of image and labels -> the tile store; sets that we draw ourselves."""
