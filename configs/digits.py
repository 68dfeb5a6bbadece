"""Handwritten digits, 8x8 pixels: the whole of DMD in minutes on two CPU cores.

    python -m dmd_jax.main --config=configs/digits.py --workdir=/tmp/digits

Hardware: 2 CPU cores, 6 minutes. Expected scores: docs/results.md. Variants: `:no_matching` and
`:no_regression` leave out one of the losses (arXiv 2311.18828, Table 2); `:instaflow` straightens
the teacher's ODE in two rounds of reflow and distils it (arXiv 2309.06380), with DMD beside it, in
10 minutes; `:smoke` and `:smoke_instaflow` are for tests.
"""

import ml_collections


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.stages = ("teacher", "pairs", "dmd", "evaluate")  # in this order; each is a key below
    images = dict(source="digits", split="train")  # arguments of a function in dmd_jax/data
    conditions = dict(source="labels.every", num_classes=10)  # of images yet to be made
    config.null_cond = 10  # the label that means no label
    config.process = dict(
        name="EDM",
        sigma_data=0.5,  # EDM's
        # Of ln(sigma) in training; EDM's -1.2 is for 32x32 and larger, here structure needs more
        # noise to hide.
        p_mean=-0.5,
        p_std=1.2,  # EDM's
    )
    config.prediction = "edm"  # what the network predicts, see dmd_jax/denoiser.py
    # What the protocol leaves open of the features' arguments.
    config.features = dict(path="{workdir}/classifier.npz")
    config.network = dict(  # arguments of a function in dmd_jax/models/unet_edm.py
        name="unet_edm.ddpmpp",
        size=8,  # pixels
        channels=1,
        num_classes=10,
        width=16,  # channels of the first layer
        multipliers=(1, 2),  # of the width, per level
        num_blocks=1,  # per level
        attention=(4,),  # resolutions
        dtype="float32",
        remat=False,
    )

    config.teacher = dict(
        program="train",
        recipe=dict(  # arguments of dmd_jax/recipes/teacher.py
            name="teacher",
            optimizer=dict(learning_rate=2e-3, warmup_steps=100, decay_steps=3000),  # steps
            ema_decay=0.998,  # per step
            cond_dropout=0.0,  # fraction of labels; above 0 for a teacher that is to be guided
        ),
        # Of dmd_jax/samplers.py: 35 network calls; EDM's for CIFAR-10.
        sampler=dict(name="heun", num_steps=18),
        data=dict(images=images),
        batch_size=64,  # images, over all devices
        num_steps=3000,
        log_every=50,  # steps
        checkpoint_every=500,  # steps
        max_skipped_updates=20,  # gradients that are not finite
    )

    config.pairs = dict(
        program="pairs",
        teacher="teacher",  # stage
        conditions=conditions,
        count=3000,  # pairs
        shard_size=1000,  # pairs
        batch_size=500,  # pairs, over all devices of a process
    )

    # The paper: 5e-5, constant, 300,000 steps.
    optimizer = dict(learning_rate=1e-3, warmup_steps=50, decay_steps=600)
    config.dmd = dict(
        program="train",
        recipe=dict(  # arguments of dmd_jax/recipes/dmd.py
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.99,  # per step
            matching_weight=1.0,
            regression_weight=2.0,  # of the L2 loss; the paper has 0.25 of LPIPS
            guidance_scale=1.0,  # of the real score; 1 = none
            matching_levels=(20, 980),  # of 1000 noise levels
            fake_score_levels=(0, 999),
            distance=dict(name="squared_error"),  # of the regression loss
        ),
        sampler=dict(name="one_step"),
        data=dict(
            fresh=conditions,
            pairs=dict(source="records.read", directory="{workdir}/pairs"),
        ),
        init_from="teacher",
        batch_size=64,  # of fresh images and of pairs, over all devices
        num_steps=600,
        log_every=20,
        preview_every=100,
        # Steps, of dmd_jax/evals/protocols.py, images.
        scores=dict(every=100, protocol="digits:train", count=1000),
        checkpoint_every=200,
        best_metric="FD-mlp@8-1000",
        max_skipped_updates=20,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",  # stage
        student="dmd",  # stage
        protocol="digits",  # of dmd_jax/evals/protocols.py
        batch_size=500,  # images, over all devices
    )
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/digits.py has no variant {variant!r}; there are: "
            f"{', '.join(filter(None, VARIANTS))}."
        )
    return VARIANTS[variant](config)


def _no_matching(config):
    config.dmd.recipe.matching_weight = 0.0
    return config


def _no_regression(config):
    config.dmd.recipe.regression_weight = 0.0
    return config


def _smoke(config):
    config.network.update(width=8, multipliers=(1,), num_blocks=0, attention=())
    for settings in (config[stage] for stage in config.stages):
        if settings.program == "train":
            settings.update(num_steps=20, checkpoint_every=10, log_every=5, batch_size=16)
        if settings.program == "pairs":
            settings.update(count=64, shard_size=16, batch_size=16)
    config.teacher.update(num_steps=30, log_every=10, batch_size=64)
    config.dmd.update(preview_every=10, preview_images=64, best_metric="FD-mlp@8-64")
    config.dmd.scores.update(every=10, count=64)
    config.evaluate.update(count=64, batch_size=32, timing_repeats=1)
    return config


def _instaflow(config, rounds=2):
    """Reflows in rounds, each on pairs of the one before, and distils the last.

    Beside it are distillation without reflow, and DMD.
    """

    def stage(name, recipe, start, pairs, num_steps, sampler):
        # A longer stage needs a longer decay.
        optimizer = dict(learning_rate=1e-3, warmup_steps=50, decay_steps=num_steps)
        config[name] = dict(
            program="train",
            process=dict(name="RectifiedFlow"),
            # By the change of variables from EDM; "flow", for all of them: the weights as they are.
            prediction="rectified",
            # Arguments of a recipe in dmd_jax/recipes.
            recipe=dict(recipe, optimizer=optimizer, ema_decay=0.99, ema_warmup=10),
            sampler=sampler,
            data=dict(pairs=dict(source="records.read", directory=f"{{workdir}}/{pairs}")),
            init_from=start,
            num_steps=num_steps,
            batch_size=64,
            log_every=50,
            checkpoint_every=500,
            max_skipped_updates=20,
        )
        return name

    names, flow, pairs = ["teacher", "pairs"], "teacher", "pairs"
    for k in range(1, rounds + 1):
        flow = stage(
            f"reflow_{k}", dict(name="reflow"), flow, pairs, 800, dict(name="euler", num_steps=25)
        )
        pairs = f"pairs_{k}"
        config[pairs] = dict(config.pairs.to_dict(), teacher=flow)
        names += [flow, pairs]
    distil = dict(name="distil", distance=dict(name="squared_error"))
    for name, start, made in (("distil", flow, pairs), ("direct", "teacher", "pairs")):
        names.append(stage(name, distil, start, made, 400, dict(name="one_step")))

    config.dmd.update(preview_every=200)
    config.dmd.scores.every = 200
    config.stages = (*names, "dmd", "evaluate")
    flows = [name for name in names if name.startswith("reflow")]
    steps = (
        {"teacher": (1, 2, 4, 8)}
        | dict.fromkeys(flows, (1, 2, 25))
        | {"reflow_1": (1, 2, 4, 8, 25)}
    )
    rows = {
        f"{name}_euler_{n}": dict(stage=name, sampler=dict(name="euler", num_steps=n))
        for name in steps
        for n in steps[name]
    }
    rows |= {name: dict(stage=name, sampler=dict(name="one_step")) for name in ("direct", "dmd")}
    rows["distil_int8"] = dict(stage="distil", sampler=dict(name="one_step"), quantize="int8")
    straightness = dict(stages=("teacher", *flows), num_steps=100, count=200)
    config.evaluate.update(
        student="distil", others=rows, straightness=straightness, timing_repeats=1
    )
    return config


VARIANTS = {
    "": lambda config: config,
    "no_matching": _no_matching,
    "no_regression": _no_regression,
    "instaflow": _instaflow,
    "smoke": _smoke,
    "smoke_instaflow": lambda config: _smoke(_instaflow(config)),
}
