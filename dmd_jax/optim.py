"""The optimizer, and the update of a network by its gradient."""

import dataclasses
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
    """Makes AdamW with clipping of the gradient's global norm; the defaults are DMD's.

    Args:
      learning_rate: after the warm-up.
      warmup_steps: steps in which the rate increases linearly from 0.
      decay_steps: the step at which a cosine decay ends in 0; 0 keeps the rate constant.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      weight_decay: decoupled, on all parameters, biases and norms too.
      clip: largest global norm of the gradient.
      frozen: regex of the names of parameters that stay as they are; the default stands for the
        random frequencies of NCSN++, which weight decay would shrink.

    Source: arXiv 2311.18828, Appendix B.
    """
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    rest = optax.constant_schedule(learning_rate)
    if decay_steps:
        rest = optax.cosine_decay_schedule(learning_rate, decay_steps - warmup_steps)
    schedule = optax.join_schedules([warmup, rest], [warmup_steps])

    def is_frozen(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return re.search(frozen, name) is not None

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, beta1, beta2, weight_decay=weight_decay),
        optax.masked(
            optax.set_to_zero(),
            lambda params: jax.tree_util.tree_map_with_path(is_frozen, params),
        ),
    )


def warmed_up(ema_decay: float, ema_warmup: float, step: jax.Array) -> jax.Array:
    """Returns the decay of a running mean: min(ema_decay, (1 + step) / (ema_warmup + step)).

    Without a warm-up the mean remembers the initial parameters for some 1 / (1 - ema_decay) steps.

    Args:
      ema_decay: after the warm-up, per step.
      ema_warmup: 0 for none; the code of rectified flows has 10.
      step: int32 count of steps.
    """
    return jnp.minimum(ema_decay, (1 + step) / (ema_warmup + step))


def apply_gradients(
    net: state.Net, grads: dict, tx: optax.GradientTransformation, *, ema_decay: float = 0.0
):
    """Updates parameters and running mean.

    If the gradient is not finite, nothing is updated, and `Net.skipped` counts one more.

    Returns:
      The new `Net` and the gradient's global norm.
    """
    norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, net.opt_state, net.params)
    params = optax.apply_updates(net.params, updates)
    ema = None
    if net.ema is not None:
        ema = optax.incremental_update(params, net.ema, 1 - ema_decay)
    finite = jnp.isfinite(norm)
    updated = state.Net(params, opt_state, ema, net.skipped)
    net = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, net)
    return dataclasses.replace(net, skipped=net.skipped + ~finite), norm
