"""CIFAR-10, 32x32 pixels: DMD of EDM's teacher with the paper's hyper-parameters (arXiv 2311.18828, Appendix B, Tables 1 to 3).

    python -m dmd_jax.main --config=configs/cifar10.py --workdir=/data/cifar10

Hardware: the paper used 7 GPUs. Expected FID of the one-step generator: 2.66 class-conditional, 3.77 `:uncond`; of the teacher at 35
network calls: 1.84 and 1.97 (arXiv 2206.00364, Table 2). The source of the images is not part of the package yet: the config can be
constructed, printed and dry-run.
"""

import ml_collections


def get_config(variant: str = "cond") -> ml_collections.ConfigDict:
    if variant not in ("cond", "uncond"):
        raise ValueError(f"configs/cifar10.py has no variant {variant!r}; there are: cond, uncond.")
    conditional = variant == "cond"
    config = ml_collections.ConfigDict()
    config.seed = 0  # of everything
    config.stages = ("teacher", "pairs", "dmd", "evaluate")
    config.mesh = dict(data=-1, fsdp=1)  # devices; -1 = all
    config.images = dict(
        train=dict(source="images.cifar10", split="train"),
        held_out=dict(source="images.cifar10", split="test"),
    )
    config.conditions = dict(source="images.labels", num_classes=10)
    config.null_cond = 10  # the label that means no label
    config.process = dict(name="EDM", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)
    config.prediction = "edm"
    config.network = dict(  # DDPM++ of EDM's cifar10 "vp" checkpoints: 55.7 M parameters
        name="unet_edm",
        size=32,  # pixels
        channels=3,
        num_classes=10 if conditional else 0,
        width=128,
        multipliers=(2, 2, 2),
        num_blocks=4,
        attention=(16,),
        dtype="float32",  # the paper does not say
        remat=False,
    )

    config.teacher = dict(  # EDM's own training, arXiv 2206.00364, Table 7, for those who do not have its checkpoint
        program="train",
        recipe=dict(
            name="teacher",
            optimizer=dict(learning_rate=1e-3, warmup_steps=19532, weight_decay=0.0),  # 10 M images of warm-up
            ema_decay=0.99929,  # half-life of 0.5 M images
            cond_dropout=0.0,
            sample_steps=18,  # 35 network calls
        ),
        data=dict(images=config.images.train),
        init_from="",
        batch_size=512,
        accumulation=1,
        num_steps=390625,  # 200 M images
        log_every=100,
        preview_every=5000,
        preview_images=504,
        preview_scores=False,
        checkpoint_every=5000,
        keep_checkpoints=2,
        best_metric="",
        max_skipped_updates=100,
    )

    config.pairs = dict(
        program="pairs",
        teacher="teacher",
        conditions=config.conditions,
        count=100_000 if conditional else 500_000,
        shard_size=10_000,
        batch_size=1008,
    )

    optimizer = dict(learning_rate=5e-5, warmup_steps=500, weight_decay=0.01, clip=10.0)
    config.dmd = dict(
        program="train",
        recipe=dict(
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.999,  # the paper uses no running mean
            matching_weight=1.0,
            regression_weight=0.25 if conditional else 0.5,  # of LPIPS in the paper; L2 gives FID 2.78 instead of 2.66 (Appendix I)
            guidance_scale=1.0,
            matching_levels=(20, 980),
            fake_score_levels=(0, 999),
        ),
        data=dict(fresh=config.conditions, pairs=dict(source="pairs.read", directory="{workdir}/pairs")),
        init_from="{workdir}/teacher",
        batch_size=392,  # of fresh images and of pairs, over all devices
        accumulation=1,
        num_steps=300_000,
        log_every=100,
        preview_every=5000,
        preview_images=504,
        preview_scores=False,
        checkpoint_every=5000,
        keep_checkpoints=2,
        best_metric="",
        max_skipped_updates=100,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",
        student="dmd",
        count=50_000,
        batch_size=1008,
        timing_repeats=5,
    )
    return config
