"""The training loop: schedule, optimiser, one jitted step, and checkpoints it goes on from.

Every step's data follow from (seed, step), so a run that was killed goes on as if it had not been.
What it is not: the command line (`scripts/train_default_model.py`).
"""

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
from jax import Array
from needle.model import Params, Shape, forward, init, save
from needle.sequences import DECOY, PROSE, Content, Sample, batch
from needle.tokens import Corpus, Tokens, prepare
from tqdm import tqdm

_NEAR_TOKENS = 24  # keys so near are never multiplied
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MUON_MOMENTUM = 0.95
_ANSWERS = 3.5  # weights above it are those of answers
_AHEAD = 4  # batches made before they are needed


class Stage(msgspec.Struct, frozen=True):
    """Of a run: ends at the fraction `until`."""

    until: float
    content: Content


# First what keys are, in short sequences of facts that hardly look alike; then ever more near misses, and drills.
STAGES = (
    Stage(0.22, Content(128, 0.0, (2, 5), near_misses=0.3, same_start=0.0)),
    Stage(0.45, Content(256, 0.2, (2, 5, 5), near_misses=0.5, same_start=0.3)),
    Stage(0.92, Content(256, 0.4, (2, 5, 5, 5), near_misses=0.75, same_start=0.6)),
    Stage(1.0, Content(512, 0.4, (2, 5, 5, 5), near_misses=0.75, same_start=0.6)),
)


class Schedule(msgspec.Struct, frozen=True):
    """Fractions are of the whole run."""

    seed: int = 0
    steps: int | None = None
    minutes: float | None = None
    tokens_per_step: int = 2048
    stages: tuple[Stage, ...] = STAGES
    ramp_from: float = 0.35
    ramp_until: float = 0.75
    decay_from: float = 0.6
    max_multiplicity: float = 256.0
    max_decoy_multiplicity: float = 16.0
    learning_rate: float = 5e-3
    warm_up_steps: int = 60
    weight_decay: float = 0.05
    save_every: int = 100

    def fraction(self, step: int, elapsed_s: float) -> float:
        by_steps = step / self.steps if self.steps else 0.0
        by_time = elapsed_s / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def content(self, fraction: float) -> Content:
        return next(stage.content for stage in self.stages if fraction <= stage.until)

    def multiplicity(self, fraction: float) -> float:
        ramp = (fraction - self.ramp_from) / (self.ramp_until - self.ramp_from)
        return self.max_multiplicity ** min(1.0, max(0.0, ramp))

    def rate(self, step: int, fraction: float) -> float:
        decay = max(0.03, min(1.0, (1 - fraction) / (1 - self.decay_from)))
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up_steps) * decay


class State(NamedTuple):
    """What a checkpoint holds."""

    params: Params
    optimizer: optax.OptState
    step: int
    elapsed_s: float


def muon(momentum: float = _MUON_MOMENTUM) -> optax.GradientTransformation:
    """Momentum whose matrices are made orthogonal (arXiv:2502.16982), here over a leading axis of layers."""

    def orthogonal(update: Array) -> Array:
        a, b, c = _NEWTON_SCHULZ
        x = update / (jnp.linalg.norm(update, axis=(-2, -1), keepdims=True) + 1e-7)
        tall = x.shape[-2] > x.shape[-1]
        x = jnp.swapaxes(x, -1, -2) if tall else x
        for _ in range(5):
            square = x @ jnp.swapaxes(x, -1, -2)
            x = a * x + (b * square + c * square @ square) @ x
        x = jnp.swapaxes(x, -1, -2) if tall else x
        return 0.2 * max(x.shape[-2:]) ** 0.5 * x

    def update(updates, state, params=None):
        del params
        state = jax.tree.map(lambda m, g: momentum * m + g, state, updates)
        return jax.tree.map(lambda m, g: orthogonal(momentum * m + g), state, updates), state

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def optimizer(weight_decay: float) -> optax.GradientTransformation:
    """Directions of unit learning rate: Muon for the stacked matrices, Adam for the embedding and the norms."""
    matrices = lambda params: {name: "muon" if value.ndim == 3 else "adam" for name, value in params.items()}
    decayed = lambda params: {name: value.ndim == 3 or name == "embed" for name, value in params.items()}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"muon": muon(), "adam": optax.scale_by_adam(b1=0.9, b2=0.98)}, matrices),
        optax.add_decayed_weights(weight_decay, decayed),
    )


def attention_bias(data: Sample, multiplicity: Array, max_decoys: float) -> Array:
    """[b, tok, tok]: the logarithm of how many keys a key in another chunk stands for."""
    prose = jnp.log(multiplicity)[:, None]
    decoys = jnp.minimum(prose, math.log(max_decoys))
    key = jnp.where(data.kinds == PROSE, prose, jnp.where(data.kinds == DECOY, decoys, 0.0))
    other_chunk = data.chunks[:, :, None] != data.chunks[:, None, :]
    far = data.positions[:, :, None] - data.positions[:, None, :] > _NEAR_TOKENS
    return jnp.where(other_chunk & far, key[:, None, :], 0.0)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(shape: Shape, schedule: Schedule, params: Params, opt_state, data: Sample, multiplicity, rate):
    """Returns params, optimiser state and [loss, share of answer tokens right, prose loss]."""
    bias = attention_bias(data, multiplicity, schedule.max_decoy_multiplicity)
    targets, weights = data.ids[:, 1:], data.weights[:, 1:]
    answers, prose = weights > _ANSWERS, data.kinds[:, 1:] == PROSE

    def loss(params: Params):
        out = forward(shape, params, jnp.asarray(data.ids), jnp.asarray(data.positions), bias)[:, :-1]
        nll = optax.softmax_cross_entropy_with_integer_labels(out, targets)
        right = (out.argmax(-1) == targets) & answers
        told = jnp.stack([right.sum() / answers.sum(), (nll * prose).sum() / prose.sum()])
        return (nll * weights).sum() / weights.sum(), told

    (value, told), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer(schedule.weight_decay).update(grads, opt_state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params, opt_state, jnp.concatenate([value[None], told])


def train(folder: Path, shape: Shape, schedule: Schedule, tell: Callable[[str], None]) -> State:
    """Train, or go on, in `folder`; the model lies in `folder`/model after each checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens, corpora = prepare(folder, schedule.seed)
    state = restore(folder, shape, schedule)
    if state.step:
        tell(f"going on from step {state.step}")
    bar = tqdm(total=1000, initial=int(1000 * schedule.fraction(state.step, state.elapsed_s)), unit="‰")
    params, opt_state, step, before_s = state
    began_s, told = time.monotonic(), []
    for at, fraction, data, multiplicity in _batches(
        schedule, shape.max_position, tokens, corpora, step, began_s - before_s
    ):
        rate = schedule.rate(at, fraction)
        params, opt_state, numbers = train_step(shape, schedule, params, opt_state, data, multiplicity, rate)
        told.append(np.asarray(numbers))
        step = at + 1
        bar.update(int(1000 * fraction) - bar.n)
        if step % schedule.save_every == 0:
            loss, right, prose = np.mean(told, 0)
            minutes = (before_s + time.monotonic() - began_s) / 60
            tell(
                f"step {step} minute {minutes:.1f} length {data.ids.shape[1]} "
                f"copies {schedule.multiplicity(fraction):.0f} rate {rate:.1e} "
                f"loss {loss:.3f} answers {right:.4f} prose {prose:.3f}"
            )
            told.clear()
            _keep(folder, shape, State(params, opt_state, step, 60 * minutes))
    state = State(params, opt_state, step, before_s + time.monotonic() - began_s)
    _keep(folder, shape, state)
    bar.close()
    return state


def _batches(
    schedule: Schedule, max_position: int, tokens: Tokens, corpora: Sequence[Corpus], first: int, began_s: float
) -> Iterator[tuple[int, float, Sample, np.ndarray]]:
    """(step, fraction, data, multiplicity of each sequence) to the schedule's end, made by a thread ahead of use."""
    made: queue.Queue = queue.Queue(maxsize=_AHEAD)
    stop = threading.Event()

    def make() -> None:
        step = first
        while not stop.is_set():
            fraction = schedule.fraction(step, time.monotonic() - began_s)
            if fraction >= 1.0:
                break
            rng = random.Random(f"{schedule.seed} {step}")
            content = schedule.content(fraction)
            size = max(1, schedule.tokens_per_step // content.length)
            data = batch(rng, tokens, corpora, content, size, max_position)
            most = math.log(schedule.multiplicity(fraction))
            multiplicity = np.array([math.exp(rng.random() * most) for _ in range(size)], np.float32)
            made.put((step, fraction, data, multiplicity))
            step += 1
        made.put(None)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (item := made.get()) is not None:
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            try:
                made.get(timeout=0.1)
            except queue.Empty:
                pass


def restore(folder: Path, shape: Shape, schedule: Schedule) -> State:
    """The last checkpoint, or the beginning."""
    params = init(shape, schedule.seed)
    fresh = State(params, optimizer(schedule.weight_decay).init(params), 0, 0.0)
    path = folder / "checkpoint.npz"
    if not path.exists():
        return fresh
    with np.load(path) as arrays:
        leaves = [jnp.asarray(arrays[f"leaf{i}"]) for i in range(len(jax.tree.leaves(fresh[:2])))]
        params, opt_state = jax.tree.unflatten(jax.tree.structure(fresh[:2]), leaves)
        return State(params, opt_state, int(arrays["step"]), float(arrays["elapsed_s"]))


def _keep(folder: Path, shape: Shape, state: State) -> None:
    """The old checkpoint stays whole until the new one is."""
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state[:2]))}
    new = folder / "checkpoint.new.npz"
    np.savez(new, allow_pickle=False, step=state.step, elapsed_s=state.elapsed_s, **leaves)
    new.replace(folder / "checkpoint.npz")
    save(folder / "model", shape, state.params, folder / "tokenizer.json")
