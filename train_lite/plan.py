"""How training is made to fit a memory budget: what each owner will take, and which lever to pull next.

The estimate needs no training: parameters are counted, activations are those that autograd keeps of small tiles, times
the area of all tiles in memory together; docs/measured.md holds it against measured peaks."""
import ctypes
import gc
import json
import math
import os
import signal
from typing import NamedTuple

import torch

from edge import errors
from edge.command import end_with_parent
from edge.errors import OverBudget
from jetson import phases
from jetson.memory import rss_mib
from train_lite.config import SUPERVISOR_MIB, budget_mib, micro_batch, mode_settings, patch_step
from train_lite.device import JETSON_CUDA_MIB, Peak, memory_mib, out_of_memory, own_memory
from train_lite.models.recompute import recompute
from train_lite.optimizer import STATE_BYTES
from train_lite.tasks.problem import task

MIB = 2.0 ** 20
PROBE_PX = 64       # side of the tile whose activations are counted
MARGIN = 1.05       # a plan must fit with this much to spare: the kernel's page tables, and what two processes differ by
LEAST_PATCH = 64    # px; smaller patches lose the objects that they cut
TIGHT_BYTES = 1 << 20


class Levers(NamedTuple):
    """What memory is saved with, in the order in which it is given up."""
    micro_batch: int      # patches in memory at once: the same gradient, up to rounding (batch norm and dropout see chunks)
    half: bool            # of layers, on CUDA: rounding, and faster
    tight: bool           # freed tensors go back to the system at once: the same bits, slower
    recompute: bool       # activation checkpointing: the same bits, slower
    spill: bool           # of a GLNet's third stage, what tiles' maps are merged to, to disk: the same bits, and wear
    optimizer: str        # a kind of train_lite.optimizer
    patch: int            # px; another net in the end, so the last; 0: the net sees whole images, or samples of them

    def words(self):
        return "micro-batch %d, %s%s memory, %s, %s%s%s" % (
            self.micro_batch, "half precision, " if self.half else "", "tight" if self.tight else "pooled",
            "recomputed activations" if self.recompute else "kept activations", "merged maps on disk, " if self.spill else "", self.optimizer,
            ", patch %d px" % self.patch if self.patch else "")

    def smaller_net(self):
        """What is left to the user when not even these fit."""
        return "a smaller --width or --patch" if self.patch else "a smaller --width, --task-size or --res"


def ladder(config, device):
    """All Levers from the config's own to the smallest, each one notch smaller than the one before. A patch is not made
    smaller once training has begun, in this run or in the one that it goes on from, nor where images are stored at its size."""
    settings = mode_settings(config)
    whole = not settings.tile
    notches = [Levers(micro_batch(config), config.half, config.tight, config.recompute, config.spill, config.optimizer,
                      0 if whole else config.patch)]

    def lower(**change):
        if notches[-1]._replace(**change) != notches[-1]:
            notches.append(notches[-1]._replace(**change))

    while notches[-1].micro_batch > 1:
        lower(micro_batch=notches[-1].micro_batch // 2)
    if device.type == "cuda":
        lower(half=True)
    else:
        lower(tight=True)
    if whole and config.norm != "batch":  # of one patch it saves nothing: the top level alone fills the peak
        lower(recompute=True)
    if settings.merges and config.batch > 1:
        lower(spill=True)
    if config.optimizer == "adamw":
        lower(optimizer="adamw8")
    step = patch_step(config.model)
    patch = 0 if whole or config.resume or config.base else config.patch // (2 * step) * step
    while patch >= LEAST_PATCH and patch > settings.overlap and mode_settings(config._replace(patch=patch)).resize_px == settings.resize_px:
        lower(patch=patch)
        patch = patch // (2 * step) * step
    return notches


def apply(config, levers):
    """The config with the levers set. The effective batch is k patches of each image as before."""
    return config._replace(smaller=0, **dict(levers._asdict(), patch=levers.patch or config.patch))


class Look:
    """The net that a config asks for, as far as memory goes. Building it and counting, on the CPU, take a second or less."""

    def __init__(self, config, outputs, device, unseen):
        self._task, self.outputs, self._counted, self._images = task(config), outputs, {}, config.batch
        small = self._task.build(config._replace(width=4, sampler="none"), 1, config.norm)
        self._task.probe(small, 1, 1, PROBE_PX).backward()  # loads what torch loads late
        self.libraries = (rss_mib() or 0.0) + unseen + SUPERVISOR_MIB
        if device.type == "cuda":  # a card's context is in use already when we look
            self.libraries = 0.0 if own_memory(device) else self.libraries + JETSON_CUDA_MIB
        self.net = self._task.build(config, outputs, config.norm)
        sizes = [p.numel() * 4 / MIB for p in self.net.parameters()]
        self.weights, self.largest_weight = sum(sizes), max(sizes)
        self.trained = sum(p.numel() * 4 / MIB for p in self.net.parameters() if p.requires_grad)
        deform, side = getattr(self.net, "deform", None), mode_settings(config).density
        self.deform_kept = _kept(deform, lambda: deform(torch.zeros((1, 3) + side)).sum())[0] if deform else 0.0

    def kept(self, tiles, recomputed):
        """MiB of activations that autograd keeps of `tiles` tiles of PROBE_PX, in one pass: (all, largest, those that the backward
        pass still holds when it comes to the largest weight)."""
        if (tiles, recomputed) not in self._counted:
            if recomputed:  # for good: ladders go from False to True
                recompute(self.net.encoder)
            self._counted[tiles, recomputed] = _kept(self.net, lambda: self._task.probe(self.net, self.outputs, tiles, PROBE_PX))
        return self._counted[tiles, recomputed]

    def held(self, levers):
        """MiB that a chunk of tiles of PROBE_PX brings along."""
        return self._task.held(self.net, levers.micro_batch, PROBE_PX, self._images, levers.spill) / MIB


def _kept(net, forward):
    own, seen, below = {p.data_ptr(): p.numel() for p in net.parameters()}, {}, []
    most = max(own.values())

    def pack(tensor):
        storage = getattr(tensor, "untyped_storage", tensor.storage)()
        if own.get(storage.data_ptr()) == most:  # what is kept by now is what the backward pass holds when it is back here
            below.append(sum(size for size, _tensor in seen.values()) / MIB)
        elif storage.data_ptr() not in own:
            size = storage.nbytes() if hasattr(storage, "nbytes") else storage.size() * tensor.element_size()  # torch 1.10
            seen[storage.data_ptr()] = size, tensor  # held, so that its address is not given out again
        return None  # nothing goes back through this graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _nothing: None):
        forward()
    sizes = [size / MIB for size, _tensor in seen.values()]
    seen.clear()  # torch 1.10 never lets go of the hooks, nor of what they hold
    return sum(sizes), max(sizes), max(below, default=sum(sizes) / 2)  # unseen in parts that are recomputed


def estimates(config, outputs, tile_px, headers, device, scored_px=0):
    """Predicted MiB by owner at the peak: a dict for every notch of ladder(config). tile_px: pixels of the largest image
    where that is the tile, else 0; headers: list of edge.images.photo_header(); scored_px: width of the widest image whose pixels are
    scored, a band of a tile's height at a time."""
    def count(unseen):
        look, loader = Look(config, outputs, device, unseen), 0.0 if own_memory(device) else _loader_mib(headers)
        return [_estimate(look, notch, tile_px or notch.patch ** 2, loader, scored_px) for notch in ladder(config, device)]

    predicted = count(0.0) if device.type == "cuda" else apart(count)  # CUDA does not survive a fork
    if predicted is None:
        raise OverBudget("there is not even the memory to build the net and look at it; close other programs, or take a "
                         "smaller --width")
    return predicted


def _estimate(look, levers, tile_px, loader_mib, scored_px):
    kept, largest, below = look.kept(levers.micro_batch, levers.recompute)
    area = tile_px / float(PROBE_PX ** 2)
    scale = area / (2 if levers.half else 1)
    # the backward pass peaks either at its start, with all activations and a few gradients of the largest, or at the largest weight:
    # about half of them are left there in a U-Net, nearly all in a DeepLabv3; the CPU's convolutions copy weights
    top = kept * scale + 2.5 * largest * scale
    deep = below * scale + (2.5 if levers.tight else 4) * look.largest_weight
    band = look.outputs * 4 * (levers.patch or tile_px ** 0.5) * scored_px / MIB  # when images are scored
    samplers = levers.micro_batch * look.deform_kept  # one for every image in the micro-batch
    return {"runtime libraries": look.libraries, "weights": look.weights * (1.5 if levers.half else 1), "gradients": look.trained,
            "optimizer": look.trained / 4 * STATE_BYTES[levers.optimizer],
            "activations": max(max(top, deep) + look.held(levers) * area + samplers, band) + (30 if levers.tight else 45),
            "loader": loader_mib}


def _loader_mib(headers):
    """7.5 bytes per pixel of the largest image that is decoded whole; of those that are read in bands 48 per pixel of a band."""
    return max([w * 128 * 48 / MIB if bands else h * w * 7.5 / MIB for h, w, bands in headers], default=0.0)


def peak(owners):
    """MiB at the highest point: images are read before the net is built, so the two never meet."""
    training = sum(mib for owner, mib in owners.items() if owner != "loader")
    return max(training, owners["runtime libraries"] + owners["loader"])


class Budget(NamedTuple):
    asked: str         # as typed; '' for the machine's memory
    total_mib: float
    in_use_mib: float  # by others, at the start
    free_mib: float    # what training may take
    machine_mib: float = float("inf")  # what this machine has free, whatever was asked


def budget(text, device):
    """What --budget leaves for us: of the board's memory, or of what this machine has free when that is less. On a
    desktop card, of the card's."""
    machine, used = memory_mib(device)
    used = used or 0.0
    total = budget_mib(text) if text else machine
    if total is None:  # a system that does not say how much memory it has
        return Budget(text, float("inf"), used, float("inf"))
    free = float("inf") if machine is None else machine - used
    return Budget(text, total, used, min(total, free), free)


def choose(notches, predicted, allowed, first=0):
    """Index of the first notch, from number `first` on, whose estimate fits the Budget `allowed`. predicted: what
    estimates() returned. Raises OverBudget, naming the smallest budget that would do."""
    for index in range(first, len(notches)):
        if peak(predicted[index]) * MARGIN <= allowed.free_mib:
            return index
    if first >= len(notches):
        raise OverBudget("training took more than the %.0f MiB that are free in each of its ways, down to %s. Take "
                         "%s, or close other programs" % (allowed.free_mib, notches[-1].words(), notches[-1].smaller_net()))
    least = min(map(peak, predicted))
    needs = "training needs %.0f MiB at the least (%s)" % (least * MARGIN, notches[-1].words())
    budget_words = smallest_budget(least, allowed)
    if not budget_words:
        raise OverBudget("%s; this machine has %.0f MiB free. Close other programs, or take %s"
                         % (needs, allowed.machine_mib if allowed.asked else allowed.free_mib, notches[-1].smaller_net()))
    raise OverBudget("%s; --budget %s leaves %.0f MiB. %s" % (needs, allowed.asked, allowed.free_mib, budget_words))


def smallest_budget(least_mib, allowed):
    """What to type for a training that takes least_mib at the least; '' where no --budget was asked, or the machine has not that much."""
    enough_mib = (least_mib + 2) * MARGIN  # 2: as two processes differ
    if not allowed.asked or enough_mib >= allowed.machine_mib:  # neither is known: both are infinite
        return ""
    return "The smallest budget that would do: --budget %dMB" % math.ceil(enough_mib * MIB / 1e6)


def as_object(notches, chosen, predicted, allowed):
    """The plan for programs: a dict for JSON."""
    return {"budget_mib": allowed.total_mib, "in_use_mib": allowed.in_use_mib, "free_mib": allowed.free_mib, "chosen": chosen,
            "notches": [dict(levers=notch._asdict(), peak_mib=peak(owners), owners_mib=owners)
                        for notch, owners in zip(notches, predicted)]}


def describe(notches, chosen, predicted, allowed):
    """The plan as lines of text for people."""
    lines = ["budget %.0f MiB, %.0f MiB in use by others, %.0f MiB for training" % (
        allowed.total_mib, allowed.in_use_mib, allowed.free_mib), "notch  MiB    levers"]
    for index, (notch, owners) in enumerate(zip(notches, predicted)):
        lines.append("%s%5d %5.0f   %s" % (">" if index == chosen else " ", index, peak(owners), notch.words()))
    lines.append("owner of memory        MiB (predicted)")
    lines += ["%-20s %5.0f" % item for item in predicted[chosen].items()]
    return "\n".join(lines + ["%-20s %5.0f" % ("peak", peak(predicted[chosen]))])


def tighten():
    """Let glibc map every larger block on its own from now on, so that freeing it gives it back. Without effect
    where the C library has no mallopt."""
    try:
        ctypes.CDLL(None).mallopt(-3, TIGHT_BYTES)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError):
        pass


def trim():
    """Give the system back what was freed. Without effect where the C library has no malloc_trim."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def apart(function):
    """function(unseen) in a fork of this process, so that its memory goes when it ends and leaves no holes in ours.
    unseen: MiB of our libraries that are not resident in the fork until it touches them. Returns what it returned (JSON),
    or None when the fork was killed, as by the kernel for want of memory; raises what it raised: an OSError, an EdgeError, all else as
    RuntimeError. Dies of what else the fork dies of, so that the supervisor names it. The fork ends with us."""
    resident = rss_mib() or 0.0
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            end_with_parent()
            os.close(reading)
            os.environ.pop(phases.VARIABLE, None)  # a trial is no phase of the training
            torch.set_num_threads(1)  # the others did not survive the fork
            try:
                answer = {"value": function(resident - (rss_mib() or 0.0))}
            except OSError as exc:
                answer = {"system": [exc.errno, exc.strerror, exc.filename]}
            except errors.EdgeError as exc:
                answer = {"known": [type(exc).__name__, str(exc)]}
            except Exception as exc:
                answer = {"error": "%s: %s" % (type(exc).__name__, exc)}
            with os.fdopen(writing, "w") as handle:
                json.dump(answer, handle)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading) as handle:
            text = handle.read()
        status = os.waitpid(pid, 0)[1]
    except BaseException:  # Ctrl-C: what it computes nobody wants any more, and its memory is wanted
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    answer = json.loads(text) if text else {"value": None}
    if "Autograd-and-Fork" in answer.get("error", ""):
        return function(0.0)  # a Python that has trained before, and a torch that then refuses to in a fork
    if "system" in answer:
        raise OSError(*answer["system"])
    if "known" in answer:
        kind = getattr(errors, answer["known"][0])
        raise kind.__new__(kind, answer["known"][1])  # some make their text of other words
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def confirm(problem, new_state, allowed):
    """Train the state that new_state() makes on one chunk, for show, and measure: returns the peak to expect, in MiB, 0
    where the kernel does not let us measure, or None when it ran out of memory."""
    def trial(unseen):
        measured = _one_chunk(problem, new_state(), Peak(problem.device, allowed.in_use_mib))
        return measured and measured + unseen + (0 if own_memory(problem.device) else SUPERVISOR_MIB)

    if problem.device.type != "cuda":
        return apart(trial)
    try:  # CUDA does not survive a fork
        return trial(0.0)
    except RuntimeError as exc:
        if not out_of_memory(exc):
            raise
    finally:
        torch.cuda.empty_cache()
    return None


def _one_chunk(problem, state, peak_now):
    batch, _rng = problem.batch(0, 0)
    batch.brief = True
    gradient = problem.gradient(state)
    picks = batch.every_patch()[:gradient.micro_batch]
    gradient.add(batch, picks, gradient.objective.table(batch), 0)
    gradient.add(batch, picks, gradient.objective.table(batch), 0)  # now beside the gradients of the first
    measured = peak_now.mib()
    if measured is None:
        return 0.0
    trained = sum(p.numel() * p.element_size() for p in state.net.parameters() if p.requires_grad) / MIB
    return measured + trained * STATE_BYTES[problem.config.optimizer] / 4
