"""Optimizers and the one way in which a network is updated."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from dmd_jax import state


def adamw(
    *,
    learning_rate: float,
    warmup_steps: int,
    decay_steps: int = 0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.01,
    clip: float = 10.0,
    frozen: str = r"\bfreqs$",
) -> optax.GradientTransformation:
    """AdamW on every parameter, after clipping the gradient's global norm; the defaults are DMD's (arXiv 2311.18828, Appendix B).

    Args:
      learning_rate: after the warm-up.
      warmup_steps: of linear increase from 0.
      decay_steps: the step at which a cosine decay ends in 0; with 0 the rate stays constant.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      weight_decay: decoupled, on biases and norms too.
      clip: largest global norm of the gradient.
      frozen: regex of the parameters that stay as they are; the default are the random frequencies of NCSN++.
    """
    rest = (
        optax.cosine_decay_schedule(learning_rate, decay_steps - warmup_steps)
        if decay_steps
        else optax.constant_schedule(learning_rate)
    )
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup_steps), rest], [warmup_steps]
    )
    adam = optax.adamw(schedule, beta1, beta2, weight_decay=weight_decay)
    is_frozen = functools.partial(
        jax.tree_util.tree_map_with_path,
        lambda path, _: bool(
            re.search(frozen, jax.tree_util.keystr(path, simple=True, separator="."))
        ),
    )
    return optax.chain(
        optax.clip_by_global_norm(clip), adam, optax.masked(optax.set_to_zero(), is_frozen)
    )


def warmed_up(ema_decay: float, ema_warmup: float, step: jax.Array) -> jax.Array:
    """The decay of a running mean at `step`: min(ema_decay, (1 + step) / (ema_warmup + step)).

    Without a warm-up the initial parameters stay in it for some 1 / (1 - ema_decay) steps. The code of rectified flows has 10; 0 is none.
    """
    return jnp.minimum(ema_decay, (1 + step) / (ema_warmup + step))


def apply_gradients(
    net: state.Net, grads: dict, tx: optax.GradientTransformation, *, ema_decay: float = 0.0
):
    """One update of parameters and running mean; all of it is skipped, and counted, when the gradient is not finite.

    Returns:
      The new `Net` and the gradient's global norm.
    """
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, net.opt_state, net.params)
    params = optax.apply_updates(net.params, updates)
    ema = net.ema and optax.incremental_update(params, net.ema, 1 - ema_decay)
    finite = jnp.isfinite(norm)
    updated = state.Net(params, opt_state, ema, net.skipped)
    net = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, net)
    return net.replace(skipped=net.skipped + ~finite), norm
