"""Checkpoints in the safetensors layout: 8 bytes of header size, a JSON header, raw tensors. No pickle.

A file is written under another name, flushed to the disk and renamed; the one before it stays as a second
generation. The header carries a checksum of everything else, so a flipped bit or a short file is found."""
import hashlib
import json
import os
import struct

import numpy as np

from edge.command import say, sync_folder, written
from edge.errors import BadFile, UsageError

DTYPES = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I8": np.int8,
          "U8": np.uint8}
NAMES = {np.dtype(value): key for key, value in DTYPES.items()}
HEADER_LIMIT = 100 << 20


def _digest(entries, meta, blobs):
    digest = hashlib.sha256(json.dumps([entries, meta], sort_keys=True).encode())
    for blob in blobs:
        digest.update(blob)
    return digest.hexdigest()


def write(path, tensors, meta):
    """tensors: dict name -> numpy array; meta: JSON-able dict. Atomic; an existing file becomes PATH's older
    generation (previous(path))."""
    entries, blobs, at = {}, [], 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        array = array if array.flags["C_CONTIGUOUS"] else np.ascontiguousarray(array)
        entries[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        blobs.append(array.reshape(-1).view(np.uint8).data)
        at += array.nbytes
    text = json.dumps(meta, sort_keys=True)
    header = dict(entries, __metadata__={"nanopatch": text, "sha256": _digest(entries, text, blobs)})
    head = json.dumps(header, sort_keys=True).encode()
    head += b" " * (-len(head) % 8)
    with written(path, "wb") as handle:
        handle.write(struct.pack("<Q", len(head)) + head)
        for blob in blobs:
            handle.write(blob)
        handle.flush()
        os.fsync(handle.fileno())
        if os.path.exists(path):
            os.replace(path, previous(path))
    sync_folder(os.path.dirname(os.path.abspath(path)))


def previous(path):
    """Where the generation before `path` is kept."""
    stem, suffix = os.path.splitext(path)
    return stem + ".1" + suffix


def exists(path):
    """Whether `path` or its older generation is there."""
    return os.path.exists(path) or os.path.exists(previous(path))


def read(path, ours=True, prefix=""):
    """Returns (tensors: dict name -> writable array, meta: dict). ours: demand our checksum, as in every file we write;
    False accepts any safetensors file. prefix: of the names to keep; the others are only checked, one at a time. Raises
    BadFile when it is cut short, altered or something else."""
    try:
        with open(path, "rb") as handle:
            size = struct.unpack("<Q", handle.read(8))[0]
            if size > HEADER_LIMIT:
                raise ValueError("the header would have %d bytes" % size)
            header = json.loads(handle.read(size).decode("utf-8"))
            metadata, tensors = header.pop("__metadata__", {}), {}
            left = os.fstat(handle.fileno()).st_size - 8 - size

            def blobs():
                for name in sorted(header):
                    begin, end = header[name]["data_offsets"]
                    if not 0 <= begin <= end <= left:
                        raise ValueError("it is cut short: %s is missing" % name)
                    blob = np.empty(end - begin, np.uint8)
                    handle.seek(8 + size + begin)
                    if handle.readinto(blob) != len(blob):
                        raise ValueError("it is cut short: %s is missing" % name)
                    if name.startswith(prefix):
                        tensors[name] = blob.view(DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
                    yield blob

            if not ours:
                for _blob in blobs():
                    pass
                return tensors, metadata
            text = metadata["nanopatch"]
            if _digest(header, text, blobs()) != metadata["sha256"]:
                raise ValueError("its checksum is wrong")
            return tensors, json.loads(text)
    except FileNotFoundError as exc:
        raise BadFile("no such checkpoint: %s" % path) from exc
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as exc:
        raise BadFile("%s is damaged or no checkpoint: %s" % (path, exc)) from exc


def read_newest(path, drop_damaged=False, prefix=""):
    """As read(), with the file's path as meta["file"], but falls back to the older generation when `path` is damaged or gone, and
    says so. drop_damaged: a damaged `path` is deleted, so that the next write() cannot put it in the place of the good older one."""
    try:
        tensors, meta = read(path, prefix=prefix)
        return tensors, dict(meta, file=path)
    except BadFile as exc:
        if not os.path.exists(previous(path)):
            raise BadFile("%s. There is no older one beside it: train again" % exc) from exc
        try:
            tensors, meta = read(previous(path), prefix=prefix)
        except BadFile as older:
            raise BadFile("%s; nor can the one before it be read: %s. Train again, from nothing; what best.safetensors beside it holds can be "
                          "exported" % (exc, older)) from older
        say("warning: %s; taking the one before it, %s" % (exc, previous(path)))
        if drop_damaged and os.path.exists(path):
            os.remove(path)
        return tensors, dict(meta, file=previous(path))


def find(path):
    """The checkpoint that a user means by a file or a run folder (there: best, else last). Raises UsageError."""
    if os.path.isdir(path):
        for name in ("best.safetensors", "last.safetensors"):
            if exists(os.path.join(path, name)):
                return os.path.join(path, name)
        raise UsageError("%s holds no checkpoint; expected a run folder, such as runs/train/last" % path)
    if not os.path.exists(path):
        raise UsageError("no such checkpoint or run folder: %s. Train first: python -m train_lite --res 1024" % path)
    return path
