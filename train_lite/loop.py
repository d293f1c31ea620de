"""The training loop. Everything random is a function of (seed, epoch, batch), so a run that is killed and resumed ends
with the same bits."""
import contextlib
import signal
import sys
import time

import numpy as np

from edge.command import on_signals, say
from edge.errors import UsageError
from edge.optional import need
from jetson import phases
from jetson.memory import peak_rss_mib
from train_lite.config import validation_due

AGAIN_S = 1.0
SAMPLES = 3  # validation images drawn as pictures


def train(problem, run, state):
    """Take `state` to the end of the schedule. problem: a problem.Problem; run: a RunFolder.
    Returns the metrics of the last epoch, None without validation images. Raises KeyboardInterrupt, with all saved,
    after Ctrl-C or SIGTERM."""
    result = None
    with asked_to_stop() as stop:
        while state.epoch < problem.config.epochs:
            started = time.time()
            train_epoch(problem, run, state, stop)
            result = end_epoch(problem, run, state, started)
        if stop:  # asked for while the last epoch was scored: all is saved
            say("stopped after the last epoch. Go on: python -m train_lite --resume %s" % run.path)
            raise KeyboardInterrupt
    return result


def train_epoch(problem, run, state, stop):
    """The rest of the epoch that `state` is in, batch by batch."""
    config, saved = problem.config, time.time()
    gradient = problem.gradient(state)
    for number in _progress(range(state.batch, problem.batches), problem, state):
        if not gradient.pending:
            state.freeze_if_due(problem, stop)
            if stop:
                leave(problem, run, state)
        state.net.train()
        batch, rng = problem.batch(state.epoch, number)
        for loss in gradient.rounds(batch, rng):
            state.loss_sum, state.loss_count = state.loss_sum + loss, state.loss_count + 1
            if gradient.pending == config.accumulation:
                step(problem, run, state, gradient, loss)
        state.batch = number + 1
        if gradient.pending and state.batch == problem.batches:  # the rest of an epoch makes a step of its own
            step(problem, run, state, gradient, loss)
        if not gradient.pending and stop:
            leave(problem, run, state)
        if not gradient.pending and time.time() - saved > config.save_every:
            state.save(run.last, problem)
            saved = time.time()


def leave(problem, run, state):
    """Save in the middle of an epoch, and end."""
    state.save(run.last, problem)
    say("stopped in epoch %d. Go on: python -m train_lite --resume %s" % (state.epoch + 1, run.path))
    raise KeyboardInterrupt


def step(problem, run, state, gradient, loss):
    """One optimizer step on what `gradient` has gathered; none, but its place in the schedule, when half precision
    overflowed."""
    phases.mark("step")
    norm = gradient.finish(problem.config.clip)
    finite = bool(np.isfinite(norm))
    if not finite and not state.loss_scale.lower():
        raise UsageError("training diverged at step %d: loss %s, gradient %s. Train again with a smaller rate: --lr %g"
                         % (state.step + 1, loss, norm, problem.config.lr / 3))
    rate = problem.learning_rate(state.step + 1, state.frozen_at)
    if finite:
        state.optimizer.step(rate)
        state.loss_scale.succeed()
    for parameter in state.net.parameters():
        parameter.grad = None  # freed, not zeroed: the first pass and validation need the room
    state.step += 1
    run.log(step=state.step, epoch=state.epoch + 1, loss=loss, lr=rate, grad_norm=norm if finite else None)


def end_epoch(problem, run, state, started):
    """Validate, draw, keep the best net; one line for people, one row for machines. Moves `state` to the next epoch."""
    config = problem.config
    row = {"epoch": state.epoch + 1, "step": state.step, "loss": state.loss_sum / max(1, state.loss_count),
           "lr": problem.learning_rate(state.step, state.frozen_at)}
    state.epoch, state.batch, state.loss_sum, state.loss_count = state.epoch + 1, 0, 0.0, 0.0
    last, result, text = state.epoch == config.epochs, None, ""
    due = problem.val and validation_due(config, state.epoch)
    if due or last:
        state.measure_norms(problem)
    phases.mark("validate")
    if due:
        result = problem.evaluate(state.net, problem.val, final=last and not problem.test)
        row.update(problem.row(result))
        text = "  val " + problem.line(row)
    score = row.get(problem.SCORE, state.best if problem.val else state.epoch)
    if np.isnan(score) and not any(problem.SCORE in earlier for earlier in run.rows):
        say("warning: the validation images hold nothing that could be found: there is no score, and the newest net counts as the best")
    if score > state.best or np.isnan(score):
        state.best = state.best if np.isnan(score) else score
        state.save(run.best, problem)
    if result or last:
        phases.mark("validate")
        for stored in (problem.val or problem.train)[:SAMPLES]:
            problem.draw(state.net, stored, run.sample(stored.pair.name))
    row.update(seconds=time.time() - started, peak_mib=peak_rss_mib())
    run.add_epoch(row, problem.COLUMNS, problem.CURVES)
    state.save(run.last, problem)  # last: a run killed before this does the end of the epoch again
    say("epoch %d/%d  loss %.4f%s  %.0f s  peak %s MiB" % (
        state.epoch, config.epochs, row["loss"], text, row["seconds"],
        "?" if row["peak_mib"] is None else "%.0f" % row["peak_mib"]))
    return result


def _progress(numbers, problem, state):
    return need("tqdm").tqdm(numbers, initial=state.batch, total=problem.batches, leave=False, unit="batch",
                             desc="epoch %d/%d" % (state.epoch + 1, problem.config.epochs),
                             disable=not sys.stderr.isatty())


@contextlib.contextmanager
def asked_to_stop():
    """Yields a list that is non-empty once Ctrl-C, SIGTERM or SIGHUP came: the loop then saves and leaves. A second one stops at once,
    but not within AGAIN_S: what is sent to all of a service's processes reaches us twice, through the supervisor too."""
    asked = []

    def handler(_number, _frame):
        if asked and time.monotonic() - asked[0] < AGAIN_S:
            return
        if asked:
            raise KeyboardInterrupt
        asked.append(time.monotonic())
        say("stopping after this batch; once more to stop at once")

    with on_signals(handler, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield asked
