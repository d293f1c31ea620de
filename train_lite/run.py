"""One training, from flags to report, in the process that holds torch. __main__ starts it and looks after it."""
import json
import os
import shlex
import signal
import sys
import time

from edge.command import DISK_FULL, banner, from_json, guarded, on_signals, parse, read_json, say, written
from edge.errors import BadFile, OverBudget, UsageError, raise_all
from edge.images import fitted_size, photo_header
from edge.optional import need
from jetson import phases
from jetson.memory import peak_rss_mib
from train_lite import checkpoint
from train_lite.config import CHOICES, HELPS, RETRY_SMALLER, TrainConfig, check, mode_settings, whole_side
from train_lite.data import demo, store
from train_lite.data.dataset import demand_sizes
from train_lite.runfolder import RunFolder

OWN_WORDS = ("--resume", "--data", "--budget", "--json", "--debug", "--smaller")  # of a command that goes on with a run


@guarded
def main(argv):
    phases.mark("load")
    config = parse(TrainConfig, argv, "python -m train_lite", __doc__, HELPS, CHOICES)
    run = None
    if config.resume:
        config, run = _resumed(config, argv)
    check(config)
    config = config._replace(epochs=config.epochs or (30 if config.data else 8), **{  # --resume may be typed elsewhere
        name: os.path.abspath(getattr(config, name)) for name in ("data", "cache", "weights") if getattr(config, name)})
    if os.path.islink(os.path.normpath(config.base)):  # runs/train/last, which is to point at this run
        config = config._replace(base=os.path.realpath(config.base))
    # before torch loads: threads that wait by spinning make a busy machine five times slower (docs/measured.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch, _ = need("torch"), need("tqdm")
    from train_lite.device import out_of_memory, pick
    device = pick(config)
    banner("train_lite", device.type, "torch " + torch.__version__)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    config = config._replace(threads=torch.get_num_threads())  # kept with the run: sums depend on how they are shared
    try:
        while config:  # one training after another, of nets that are made of several
            config, run = _next(_train(config, run, device))
        return 0
    except (MemoryError, RuntimeError, OSError) as exc:
        if not out_of_memory(exc):
            raise
        say("out of memory: %s" % (str(exc).splitlines() or [type(exc).__name__])[0])
        return RETRY_SMALLER


def _train(config, run, device):
    """Returns the config of the training that follows, or None."""
    from train_lite import loop, state
    from train_lite.tasks.problem import task
    if not config.resume:
        task(config).demand(config)
    pairs, classes = task(config).find(config, config.data)  # no pairs without --data; refuses a task that has no demo set
    candidates, allowed = _plan(config, pairs, classes, device)
    if config.plan:
        return None
    data = config.data or demo.make(os.path.join("runs", "demo-%d" % config.res), config.res, config.demo_images)
    if not config.data:
        pairs, classes = task(config).find(config, data)
    stored = _ingest(config, data, pairs, classes)
    config, problem = _settle(config, candidates, allowed, classes, stored, device)
    if config.resume:
        run.hold()
        run.keep(config)
        run.announce()
        start = state.State.load(run.last, problem) if checkpoint.exists(run.last) else state.new(problem)
        run.rewind(start.step, start.epoch)
        say("going on after step %d" % start.step if start.step else "no checkpoint was written yet: starting again")
    else:
        start = state.new(problem)
        how = config.mode if config.sampler == "none" else config.sampler
        run = RunFolder.create(config, "%s-%s" % (os.path.basename(os.path.abspath(data)).replace(".csv", ""), how))
        run.announce()
    began, again, coming = time.time(), start.epoch >= config.epochs, problem.following(run.path)
    if not (again and coming):
        run.point_last()
    _describe(problem, start, run)
    try:
        result = loop.train(problem, run, start)
        _report(config, problem, start, run, result, time.time() - began, again, last=not coming)
    except OSError as exc:
        if exc.errno not in DISK_FULL:
            raise
        raise BadFile("the disk is full, while writing %s. Free some space, then go on: python -m train_lite --resume %s"
                      % (exc.filename or "a file", shlex.quote(run.path))) from exc
    run.release()
    return coming


def _resumed(flags, argv):
    """The config and folder of the run to go on with."""
    run = RunFolder(flags.resume)
    if not run.begun():
        raise UsageError("--resume %s: expected a run folder, such as runs/train/last" % flags.resume)
    extra = [word for word in argv if word.startswith("--") and word.split("=")[0] not in OWN_WORDS]
    if extra:
        raise UsageError("--resume takes all settings but --data and --budget from the run; leave out %s, or start a new run" % " ".join(extra))
    return _stored(RunFolder(os.path.realpath(run.path)) if os.path.islink(run.path) else run, flags)


def _stored(run, flags):
    """The config of a run that was begun, and its RunFolder."""
    config = TrainConfig()._replace(**from_json(run.config, TrainConfig._field_defaults, CHOICES))
    config = config._replace(resume=flags.resume, data=flags.data or config.data, budget=flags.budget or config.budget, json=flags.json,
                             debug=flags.debug, smaller=flags.smaller)
    if config.data and not os.path.exists(config.data):
        raise UsageError("the data of %s, %s, is not there. Where is it now? --resume %s --data DIR" % (run.path, config.data, flags.resume))
    return config, run


def _next(config):
    """The training `config` that follows another, None after the last, as _train() takes it: with its RunFolder where it was begun
    already. Raises UsageError where another run has its name."""
    run = config and RunFolder(os.path.join(config.out, config.name))
    if not run or not run.begun():
        return config, None
    stored, run = _stored(run, config._replace(resume=run.path))
    if stored.stage != config.stage or os.path.basename(os.path.normpath(stored.base)) != os.path.basename(config.base):
        raise UsageError("the run %s exists and does not go on from %s. Move it away, then go on: --resume %s"
                         % (run.path, config.base, config.base))
    return stored._replace(base=config.base), run  # both may have been moved


def _plan(config, pairs, classes, device):
    """Predict, print, and choose. Returns (list of (Levers to try, MiB predicted), plan.Budget). Raises OverBudget when
    none fits."""
    from train_lite import plan
    from train_lite.tasks.problem import task
    phases.mark("plan")
    plan.trim()  # what the training before this one held
    headers = [photo_header(pair.image) for pair in pairs]
    demand_sizes(pairs, headers)
    headers = [header for header in headers if header] or [(config.res, config.res, True)]  # _ingest() names those without
    settings = mode_settings(config)
    fitted = [fitted_size(h, w, settings.resize, settings.resize_px) for h, w, _bands in headers]
    whole = settings.task or (whole_side(config.model, max(map(max, fitted))),) * 2
    tile_px = 0 if settings.tile else whole[0] * whole[1]
    scored = [fitted_size(h, w, config.fit, config.res)[1] for h, w, _bands in headers] if task(config).scores_pixels and not settings.task else [0]
    allowed, found = plan.budget(config.budget, device), []
    for words, one in [("", config)] + task(config).later(config):  # refused now, not after hours of the one before
        notches = plan.ladder(one, device)
        predicted = plan.estimates(one, classes.outputs, tile_px, headers, device, max(scored))
        found.append((notches, predicted, plan.choose(notches, predicted, allowed, config.smaller if one is config else 0)))
        if config.plan and not config.json:
            print("%s%s" % ("then %s: " % words if words else "", plan.describe(notches, found[-1][2], predicted, allowed)))
    if config.plan and config.json:
        print(json.dumps({"plans": [plan.as_object(notches, chosen, predicted, allowed) for notches, predicted, chosen in found]}))
    notches, predicted, chosen = found[0]
    if not config.plan and (chosen or config.budget):
        say(plan.describe(notches, chosen, predicted, allowed))
    return [(notch, plan.peak(owners)) for notch, owners in zip(notches, predicted)][chosen:], allowed


def _ingest(config, data, pairs, classes):
    """Bring all pairs into the tile store. Returns (train, val, test), lists of Stored."""
    phases.mark("read images")
    from train_lite.tasks.problem import task
    settings, folder = mode_settings(config), store.cache_folder(config, data)
    began, problems, overview = time.time(), [], task(config).overview(settings)

    def ingest(split, resize, px):
        chosen = [pair for pair in pairs if pair.split == split]
        return store.ingest(chosen, classes, resize, px, folder, config.cache_gb, overview, began, problems)

    scored = (config.fit, config.res) if task(config).scores_pixels else (settings.resize, settings.resize_px)
    stored = ingest("train", settings.resize, settings.resize_px), ingest("val", *scored), ingest("test", *scored)
    problems += store.contradictions(sum(stored, []))
    raise_all(problems, "some images or masks cannot be used", "Mend or remove the files named; the others are kept.")
    if not stored[0]:
        raise UsageError("--data %s has no training images" % data)
    task(config).check(config, stored[0])
    missing = store.absent(stored[0], classes.names) if stored[0][0].pair.mask else []
    if missing:
        say("warning: none of the %d training masks holds %s: what is never seen is not learned" % (len(stored[0]), ", ".join(missing)))
    return stored


def _settle(config, candidates, allowed, classes, stored, device):
    """Go down the candidates of _plan() until one chunk, really computed, stays within the budget. Returns (config, Problem)."""
    from train_lite import plan, state
    from train_lite.device import hold
    from train_lite.tasks.problem import task
    hold(device, allowed.free_mib)
    least = float("inf")
    for notch, predicted in candidates:
        if notch.tight:
            plan.tighten()
        config = plan.apply(config, notch)
        problem = task(config)(config, classes, *stored, device=device)
        measured = plan.confirm(problem, lambda: state.State(problem), allowed)
        if measured is not None and measured * plan.MARGIN <= allowed.free_mib:
            if config.budget and measured:
                say("one chunk measured: %.0f MiB at the peak, %.0f predicted" % (measured, predicted))
            return config, problem
        least = min(least, measured or least)
        took = "was killed" if measured is None else "takes %.0f MiB at the peak" % measured
        say("one chunk %s, %.0f MiB are free; one notch smaller" % (took, allowed.free_mib))
    raise OverBudget("one chunk %s; %.0f MiB are free. %s, or take %s" % (
        took, allowed.free_mib, plan.smallest_budget(least, allowed) or "Close other programs, add memory", notch.smaller_net()))


def _known(value):
    """`value` as JSON has it: None for what is no number."""
    if isinstance(value, dict):
        return {key: _known(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_known(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def _describe(problem, start, run):
    config = problem.config
    say("%s width %d, %.2f M parameters | %s" % (
        config.model, config.width, sum(p.numel() for p in start.net.parameters()) / 1e6, problem.words()))
    say("%d train, %d val, %d test images | %d steps in %d epochs | run folder %s" % (
        len(problem.train), len(problem.val), len(problem.test), problem.steps, config.epochs, run.path))


def _report(config, problem, start, run, result, seconds, again, last):
    """Score the best net on the test images, if any, and say where everything is. again: whether the run was done before;
    last: whether no other training follows."""
    from train_lite.state import restore
    phases.mark("validate")
    summary = {"run": run.path, "seconds": seconds, "steps": start.step, "best_val_" + problem.SCORE: start.best if problem.val and start.best >= 0 else None,
               "val": result, "test": None}
    if problem.test:
        start.net = start.optimizer = None  # make room: the best net takes its place
        best = restore(run.best)[0].to(problem.device)
        summary["test"] = problem.evaluate(best, problem.test, final=True)
        say("test  %s (best net, %d images)" % (problem.describe(summary["test"]), len(problem.test)))
    elif problem.settings.task and result:
        say("val  %s (last net, %d images)" % (problem.describe(result), len(problem.val)))
    summary, path = _known(dict(summary, peak_mib=peak_rss_mib())), os.path.join(run.path, "summary.json")
    if again:
        try:
            said = read_json(path, "the summary")
        except BadFile:  # cut short, or never written: the disk was full
            said = {}
        summary.update({key: said.get(key, summary[key]) for key in ("seconds", "val", "peak_mib")})
    with written(path) as handle:
        json.dump(summary, handle, indent=1)
    say("done in %.0f s. Pictures: %s, %s" % (seconds, os.path.join(run.path, "curves.png"), os.path.join(run.path, "samples")))
    say("next: python -m export %s --out model.onnx" % shlex.quote(run.path))
    if config.json and last:
        print(json.dumps(summary))


if __name__ == "__main__":
    with on_signals(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, before and after the loop too
        sys.exit(main())
