"""Steps against the papers' algorithms in numpy, and against themselves on other meshes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process, recipes, sharding
from dmd_jax.models import unet_edm, unet_sd
from dmd_jax.recipes import distil, dmd, reflow, teacher
from dmd_jax.stages import train

OPTIMIZER = dict(learning_rate=1e-3, warmup_steps=2)
SETTINGS = {
    teacher: dict(optimizer=OPTIMIZER, ema_decay=0.9, cond_dropout=0.3),
    reflow: dict(optimizer=OPTIMIZER, ema_decay=0.9, ema_warmup=10, cond_dropout=0.3),
    distil: dict(optimizer=OPTIMIZER, ema_decay=0.9, ema_warmup=10),
    dmd: dict(
        optimizer=OPTIMIZER,
        fake_score_optimizer=OPTIMIZER,
        ema_decay=0.9,
        matching_weight=1.0,
        regression_weight=0.25,
        guidance_scale=2.0,
        matching_levels=(20, 980),
        fake_score_levels=(0, 999),
    ),
}
MESHES = {
    "one": (1, 1, 1),
    "data8": (8, 1, 1),
    "data2_fsdp4": (2, 4, 1),
    "accumulation2": (1, 1, 2),
}
NUM_STEPS = 6


def make(recipe, network, *, mesh="one", null_cond=10, **changes):
    data, fsdp, accumulation = MESHES[mesh]
    parallel = sharding.Parallel(sharding.make_mesh(data, fsdp), accumulation)
    denoiser = denoiser_lib.Denoiser(network, process.EDM())
    if recipe is reflow:
        denoiser = denoiser_lib.Denoiser(
            network,
            process.RectifiedFlow(),
            denoiser_lib.rectified(process.EDM(), denoiser_lib.edm),
        )
    return recipe.make(
        denoiser, parallel, seed=0, null_cond=null_cond, **SETTINGS[recipe] | changes
    ), parallel


def make_batch(recipe, seed, fresh=32, pairs=16):
    rng = np.random.default_rng(seed)

    def images(n):
        return rng.standard_normal((n, 8, 8, 1), dtype=np.float32)

    def labels(n):
        return rng.integers(0, 10, n, dtype=np.int32)

    if recipe is teacher:
        return {"images": {"image": images(fresh), "cond": labels(fresh)}}
    made = {"pairs": {"noise": images(pairs), "image": images(pairs), "cond": labels(pairs)}}
    return made | {"fresh": {"cond": labels(fresh)}} if recipe is dmd else made


def small(params, x, noise, cond):
    """Three convolutions that know of noise and label: a program that compiles in no time."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    emb = params["label"][cond] + jnp.outer(noise, params["noise"])
    return conv(
        jax.nn.silu(conv(jax.nn.silu(conv(x, params["in"]) + emb[:, None, None]), params["mid"])),
        params["out"],
    )


SHAPES = {
    "label": (11, 32),
    "noise": (32,),
    "in": (3, 3, 1, 32),
    "mid": (3, 3, 32, 32),
    "out": (3, 3, 32, 1),
}
PARAMS = {
    name: 0.1 * np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    for name, shape in SHAPES.items()
}


def run(recipe, network, params, mesh):
    """The state and the metrics after every step, and the program's FLOPs per device."""
    made, parallel = make(recipe, network, mesh=mesh)
    state, shardings = start(made, parallel, params)
    batches = [
        jax.device_put(make_batch(recipe, i), parallel.batch_sharding) for i in range(NUM_STEPS)
    ]
    step = train.compile_step(made.train_step, state, batches[0], shardings).program
    metrics = []
    for batch in batches:
        state, values = step(state, batch)
        metrics.append(jax.device_get(values))
    return jax.device_get(state), metrics, step.cost_analysis()["flops"]


def start(made, parallel, params):
    shardings = parallel.state_shardings(jax.eval_shape(made.init, params, made.others))
    return jax.device_put(made.init(params, made.others), shardings), shardings


def assert_same_run(one, other):
    (state, metrics, _), (expected_state, expected_metrics, _) = one, other
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-4)
    parts = [
        (s.generator.params, s.generator.ema, s.fake_score and s.fake_score.params)
        for s in (state, expected_state)
    ]
    chex.assert_trees_all_close(
        *parts, atol=2e-5
    )  # Adam makes much of small differences; a step is 1e-3


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda recipe: recipe.__name__.split(".")[-1])
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def runs(recipe):
    return {mesh: run(recipe, small, PARAMS, mesh) for mesh in MESHES}


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_a_run_does_not_depend_on_the_mesh(runs, mesh):
    assert_same_run(runs[mesh], runs["one"])


def test_a_run_of_the_unet_does_not_depend_on_the_mesh(tiny):
    network = unet_edm.ddpmpp(
        **tiny | dict(multipliers=(2,))
    )  # one level compiles in half the time
    params = jax.tree.map(lambda p: p + 0.01, network.init(0))  # no zeros
    assert_same_run(*(run(teacher, network.apply, params, mesh) for mesh in ("data2_fsdp4", "one")))


@pytest.mark.parametrize("make_network", [unet_edm.ddpmpp, unet_edm.adm, unet_sd.unet])
def test_networks_compute_the_same_with_cast_parameters(tiny, make_network):
    """A UNet in bfloat16, whose embeddings of time and norms stay in float32."""
    settings, cond = tiny, np.int32([3, 10])
    if make_network is unet_sd.unet:
        settings = dict(
            size=8,
            channels=1,
            num_classes=0,
            block_out_channels=(32,),
            layers_per_block=1,
            attention=(True,),
            num_heads=2,
        )
        settings |= dict(cross_attention_dim=16, norm_num_groups=8)
        cond = np.random.default_rng(1).standard_normal((2, 5, 16), np.float32)
    network = make_network(**settings, dtype="bfloat16")
    params = jax.tree.map(lambda p: p + 0.01, network.init(0))
    inputs = (
        np.random.default_rng(0).standard_normal((2, 8, 8, 1), np.float32),
        np.float32([0.1, 2]),
        cond,
    )
    cast = network.cast(params)
    np.testing.assert_array_equal(
        jax.jit(network.apply)(cast, *inputs), jax.jit(network.apply)(params, *inputs)
    )
    sizes = {
        dtype: sum(a.size for a in jax.tree.leaves(cast) if a.dtype == dtype)
        for dtype in (jnp.bfloat16, jnp.float32)
    }
    assert sizes[jnp.bfloat16] > sizes[jnp.float32] > 0


def test_a_run_trains(runs):
    state, metrics, _ = runs["one"]
    assert state.step == NUM_STEPS
    assert all(np.isfinite(jax.tree.leaves(metrics)))
    moved = jax.tree.map(
        lambda new, old: np.abs(new - old).max() > 1e-4, state.generator.params, PARAMS
    )
    assert all(jax.tree.leaves(moved)), moved


def test_the_teacher_stays_as_it_was(runs, recipe):
    if recipe is dmd:
        for state, _, _ in runs.values():
            chex.assert_trees_all_equal(state.frozen["real_score"], PARAMS)


def test_devices_share_the_work(runs):
    assert runs["data8"][2] <= 1.2 / 8 * runs["one"][2]
    assert runs["data2_fsdp4"][2] <= 1.2 / 8 * runs["one"][2]


@pytest.mark.parametrize(
    ("guidance_scale", "expected"), [(2.0, [12, 16, 8, 8]), (1.0, [12, 8, 8, 8])]
)
def test_network_calls_of_a_dmd_step(guidance_scale, expected):
    """The generator is called once for fresh images and pairs, the guided teacher once, and the
    fake score twice.
    """
    sizes = []

    def counting(params, x, noise, cond):
        sizes.append(len(x))
        return small(params, x, noise, cond)

    made, _ = make(dmd, counting, guidance_scale=guidance_scale)
    jax.eval_shape(
        made.train_step,
        jax.eval_shape(made.init, PARAMS, made.others),
        make_batch(dmd, 0, fresh=8, pairs=4),
    )
    assert sizes == expected


def linear(params, x, noise, cond):
    return params["w"] * x * (1 + 0.1 * cond[:, None, None, None])


def recorded_step(monkeypatch, recipe, step=0, **changes):
    """Makes a step of a linear network from w = 0.7 (fake score 0.5, teacher 0.9).

    Returns:
      The state, the metrics and the arrays that it drew.
    """
    drawn = []

    def split(self, tree):
        drawn.append(tree)
        return tree

    monkeypatch.setattr(sharding.Parallel, "split", split)
    made, _ = make(recipe, linear, null_cond=0, **changes)
    state = made.init({"w": jnp.float32(0.7)}, made.others)
    state = state.replace(step=jnp.int32(step))
    if recipe is dmd:
        state = state.replace(
            fake_score=state.fake_score.replace(params={"w": jnp.float32(0.5)}),
            frozen={"real_score": {"w": jnp.float32(0.9)}, "distance": None},
        )
    state, metrics = made.train_step(state, make_batch(recipe, 0, fresh=1000, pairs=40))
    return state, metrics, jax.tree.map(lambda a: np.asarray(a, np.float64), drawn[0])


def edm_parts(t):
    """skip, out and in of EDM's Table 1, for sigma_data 0.5."""
    t = np.reshape(t, (-1, 1, 1, 1))
    return 0.25 / (t**2 + 0.25), 0.5 * t / np.sqrt(t**2 + 0.25), 1 / np.sqrt(t**2 + 0.25)


def denoise(w, x_t, t, cond):
    """The linear network's x_hat, and its derivative by w."""
    skip, out, scale = edm_parts(t)
    slope = out * scale * x_t * (1 + 0.1 * np.reshape(cond, (-1, 1, 1, 1)))
    return skip * x_t + w * slope, slope


def test_a_step_is_traced_once(recipe):
    made, parallel = make(recipe, linear, null_cond=0)
    state, shardings = start(made, parallel, {"w": jnp.float32(0.7)})
    chex.clear_trace_counter()
    step = jax.jit(
        chex.assert_max_traces(made.train_step, n=1),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    for i in range(3):
        state, _ = step(state, make_batch(recipe, i))


@pytest.mark.parametrize("matched", [("fresh",), ("fresh", "pairs")])
def test_a_dmd_step_is_the_papers(monkeypatch, matched):
    state, metrics, drawn = recorded_step(monkeypatch, dmd, matched=matched)
    pairs = drawn["pairs"]
    noised = {
        name: np.concatenate([drawn["noised"][m][name] for m in matched])
        for name in ("t", "eps", "fake_t", "fake_eps")
    }
    z, cond = (
        np.concatenate([drawn["fresh"][name], pairs[paired]])
        for name, paired in (("z", "noise"), ("cond", "cond"))
    )
    z, cond = z[: len(noised["t"])], cond[: len(noised["t"])]
    t, fake_t = noised["t"], noised["fake_t"]

    x, dx = denoise(0.7, 80 * z, 80.0, cond)
    x_pairs, dx_pairs = denoise(0.7, 80 * pairs["noise"], 80.0, pairs["cond"])
    x_t = x + t.reshape(-1, 1, 1, 1) * noised["eps"]
    null, given, x_fake = (
        denoise(w, x_t, t, c)[0] for w, c in ((0.9, 0 * cond), (0.9, cond), (0.5, cond))
    )
    x_real = null + 2 * (given - null)
    g = (x_fake - x_real) / np.abs(x - x_real).mean(axis=(1, 2, 3), keepdims=True)
    grad = np.mean(g * dx) + 0.25 * np.mean(2 * (x_pairs - pairs["image"]) * dx_pairs)

    skip, out, scale = edm_parts(fake_t)
    noisy = (
        x + fake_t.reshape(-1, 1, 1, 1) * noised["fake_eps"]
    )  # of the images before the generator's update
    slope = scale * noisy * (1 + 0.1 * cond.reshape(-1, 1, 1, 1))
    error = 0.5 * slope - (x - skip * noisy) / out

    expected = {
        "matching": 0.5 * np.mean(g**2),
        "regression": np.mean((x_pairs - pairs["image"]) ** 2),
        "fake_score": np.mean(error**2),
        "real_fake": np.mean(np.abs(x_real - x_fake)),
        "grad_norm": abs(grad),
        "fake_grad_norm": abs(np.mean(2 * error * slope)),
        "skipped": 0,
    }
    assert metrics.keys() == expected.keys()
    chex.assert_trees_all_close({k: float(v) for k, v in metrics.items()}, expected, rtol=1e-4)
    moments = [net.opt_state[1][0].mu["w"] for net in (state.generator, state.fake_score)]
    np.testing.assert_allclose(
        moments, [0.1 * grad, 0.1 * np.mean(2 * error * slope)], rtol=1e-4
    )  # with their signs


def test_a_teacher_step_is_edms(monkeypatch):
    state, metrics, drawn = recorded_step(monkeypatch, teacher)
    image, t = drawn["image"], drawn["t"].reshape(-1, 1, 1, 1)
    x_hat, slope = denoise(0.7, image + t * drawn["eps"], t, drawn["cond"])
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    np.testing.assert_allclose(metrics["loss"], np.mean(weight * (x_hat - image) ** 2), rtol=1e-4)
    np.testing.assert_allclose(
        state.generator.opt_state[1][0].mu["w"],
        0.1 * np.mean(2 * weight * (x_hat - image) * slope),
        rtol=1e-4,
    )

    cond = make_batch(teacher, 0, fresh=1000)["images"]["cond"]
    dropped = (cond != 0) & (drawn["cond"] == 0)
    np.testing.assert_array_equal(np.where(dropped, 0, cond), drawn["cond"])
    assert 0.26 < dropped.sum() / (cond != 0).sum() < 0.34


def test_a_reflow_step_is_the_papers(monkeypatch):
    state, metrics, drawn = recorded_step(monkeypatch, reflow)
    x, eps, t = drawn["image"], drawn["noise"], drawn["t"].reshape(-1, 1, 1, 1)
    given = make_batch(reflow, 0, pairs=40)["pairs"]
    np.testing.assert_array_equal(x, given["image"])  # and no other noise than theirs
    np.testing.assert_array_equal(eps, given["noise"])
    sigma = np.minimum(t / (1 - t), 80)  # EDM's noise of that ratio
    z = (1 - t) * x + t * eps
    x_hat, slope = denoise(0.7, sigma / t * z, sigma, drawn["cond"])
    error = (z - x_hat) / t - (eps - x)
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-4)
    np.testing.assert_allclose(
        state.generator.opt_state[1][0].mu["w"], 0.1 * np.mean(2 * error * -slope / t), rtol=1e-4
    )
    assert ((drawn["cond"] == 0) >= (given["cond"] == 0)).all() and (
        drawn["cond"] != given["cond"]
    ).any()
    assert drawn["t"].min() > 0 and np.ptp(drawn["t"]) > 0.8


def test_a_distillation_step_is_the_papers(monkeypatch):
    made, _ = make(distil, linear, null_cond=0)
    pairs = make_batch(distil, 0, pairs=40)["pairs"]
    state, metrics = made.train_step(
        made.init({"w": jnp.float32(0.7)}, made.others), {"pairs": pairs}
    )
    x, slope = denoise(0.7, 80 * pairs["noise"].astype(np.float64), 80.0, pairs["cond"])
    np.testing.assert_allclose(metrics["loss"], np.mean((x - pairs["image"]) ** 2), rtol=1e-4)
    np.testing.assert_allclose(
        state.generator.opt_state[1][0].mu["w"],
        0.1 * np.mean(2 * (x - pairs["image"]) * slope),
        rtol=1e-4,
    )


def test_distillation_takes_the_distance_and_its_parameters_which_stay():
    def absolute(scale, x, y):
        return scale * jnp.abs(x - y).mean(axis=(1, 2, 3))

    made, _ = make(distil, linear, null_cond=0, distance=absolute, distance_params=3.0)
    pairs = make_batch(distil, 0)["pairs"]
    state, metrics = made.train_step(
        made.init({"w": jnp.float32(0.7)}, made.others), {"pairs": pairs}
    )
    x, _ = denoise(0.7, 80 * pairs["noise"].astype(np.float64), 80.0, pairs["cond"])
    np.testing.assert_allclose(metrics["loss"], 3 * np.mean(np.abs(x - pairs["image"])), rtol=1e-4)
    assert state.frozen == 3.0


def test_reflow_refuses_what_is_no_flow():
    with pytest.raises(ValueError, match="reflow needs the process RectifiedFlow, got EDM"):
        reflow.make(
            denoiser_lib.Denoiser(linear, process.EDM()),
            None,
            seed=0,
            null_cond=0,
            optimizer=OPTIMIZER,
            ema_decay=0,
        )


def test_noises_are_independent_and_levels_are_the_papers(monkeypatch):
    (first, second) = (
        {**d["fresh"], **d["noised"]["fresh"]}
        for d in (recorded_step(monkeypatch, dmd, step=step)[2] for step in (0, 1))
    )
    names = ("z", "eps", "fake_eps")
    noises = np.stack([draw[name].ravel() for draw in (first, second) for name in names])
    np.testing.assert_allclose(np.corrcoef(noises), np.eye(6), atol=0.02)
    np.testing.assert_allclose(noises.std(axis=1), 1, atol=0.02)

    table = np.asarray(process.EDM().level(jnp.arange(1000)))
    levels = np.stack(
        [np.searchsorted(table, draw[name]) for draw in (first, second) for name in ("t", "fake_t")]
    )
    assert abs(np.corrcoef(levels) - np.eye(4)).max() < 0.1
    for matching, fake in (levels[:2], levels[2:]):
        assert 20 <= matching.min() < 35 and 965 < matching.max() <= 980
        assert fake.min() < 15 and fake.max() > 985
        np.testing.assert_allclose(
            np.histogram(fake, 4, (0, 1000))[0] / fake.size, 0.25, atol=0.05
        )  # even over levels


def test_a_method_says_what_it_reads_and_which_metrics_it_has(recipe):
    made, _ = make(recipe, small)
    batch = {
        stream: {field: rows[field] for field in recipe.STREAMS[stream]}
        for stream, rows in make_batch(recipe, 0).items()
    }
    state = jax.eval_shape(made.init, PARAMS, made.others)
    _, metrics = jax.eval_shape(made.train_step, state, batch)
    assert recipe.STREAMS.keys() == batch.keys()
    assert set(recipe.PLOTTED) <= metrics.keys()
    assert recipe.METHOD is None or isinstance(recipe.METHOD, recipes.Method)
