import fractions
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import generate, samplers, sharding
from dmd_jax import process as process_lib

EDM, VP = process_lib.EDM(), process_lib.VP()
CHURN = dict(churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)  # EDM's for ImageNet-64


def gaussian(params, x_t, t, cond):
    """The exact EDM denoiser of N(0, 0.5^2) data."""
    return 0.25 * x_t / (0.25 + process_lib.expand(t, x_t) ** 2)


def images(values):
    return jnp.asarray(values).reshape(-1, 1, 1, 1)


def count_calls(make, process, **settings):
    calls = []

    def denoise(params, x_t, t, cond):
        jax.debug.callback(lambda t: calls.append(float(t[0])), t)
        return 0.5 * x_t

    sampler = make(denoise, process, **settings)
    jax.block_until_ready(sampler.sample(None, jnp.ones((1, 1)), None, lambda i: jnp.ones((1, 1))))
    jax.effects_barrier()
    return calls, sampler.nfe


@pytest.mark.parametrize(
    ("num_steps", "golden"), [(18, 0.527624637), (40, 0.504876865), (256, 0.500095425)]
)
def test_heun_goldens(num_steps, golden):
    sample = samplers.heun(gaussian, EDM, num_steps=num_steps).sample
    np.testing.assert_allclose(sample(None, images([1.0]), None).item(), golden, rtol=3e-6)
    with jax.enable_x64(True):  # the state is float64: only the network's own rounding is left
        np.testing.assert_allclose(sample(None, images([1.0]), None).item(), golden, rtol=2e-7)


def test_stochastic_heun_goldens():
    sample = samplers.stochastic_heun(gaussian, EDM, num_steps=256, **CHURN).sample
    for float64, tolerance in ((True, 1e-6), (False, 2e-5)):
        with jax.enable_x64(float64):
            x = sample(None, images([1.0, -0.7, 0.2]), None, lambda i: jnp.ones((3, 1, 1, 1)))
        np.testing.assert_allclose(
            x.ravel(), [3.7559039029, 3.7559039024, 3.7559039026], rtol=tolerance
        )


@pytest.mark.parametrize("num_steps", [18, 40, 256])
def test_samples_of_an_exact_score_have_the_datas_variance(num_steps):
    """The standard deviation is 0.5. The deterministic sampler has its golden value's error, and
    the stochastic one corrects it.
    """
    z = jax.random.normal(jax.random.key(0), (20_000, 1, 1, 1))
    noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), z.shape)
    exact = float(
        samplers.heun(gaussian, EDM, num_steps=num_steps).sample(None, images([1.0]), None).item()
    )
    x = samplers.heun(gaussian, EDM, num_steps=num_steps).sample(None, z, None)
    assert float(x.std()) == pytest.approx(exact * float(z.std()), rel=1e-4)
    stochastic = samplers.stochastic_heun(
        gaussian, EDM, num_steps=num_steps, **CHURN | dict(s_noise=1.0)
    ).sample(None, z, None, noise)
    assert abs(stochastic.mean()) < 0.02
    assert float(stochastic.std()) == pytest.approx(
        0.5, rel={18: 0.15, 40: 0.05, 256: 0.02}[num_steps]
    )
    assert abs(np.corrcoef(stochastic.ravel(), z.ravel())[0, 1]) < (0.9 if num_steps == 18 else 0.5)


def test_without_churn_stochastic_heun_is_heun():
    z = images([1.0, -0.3])
    stochastic = samplers.stochastic_heun(gaussian, EDM, num_steps=18, **CHURN | dict(churn=0.0))
    heun = samplers.heun(gaussian, EDM, num_steps=18)
    np.testing.assert_array_equal(
        stochastic.sample(None, z, None, lambda i: jnp.ones_like(z)), heun.sample(None, z, None)
    )
    assert stochastic.nfe == heun.nfe == 35


def test_heun_is_edms_algorithm_1():
    x, grid = 80 * np.float64([[0.3, -1.2]]), EDM.grid(4)
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        d = (x - np.tanh(x)) / t
        ahead = x + (s - t) * d
        if i < 3:
            d = (d + (ahead - np.tanh(ahead)) / s) / 2
        x = x + (s - t) * d
    sampler = samplers.heun(lambda params, x_t, t, cond: jnp.tanh(x_t), EDM, num_steps=4)
    np.testing.assert_allclose(sampler.sample(None, jnp.float32([[0.3, -1.2]]), None), x, atol=1e-5)


@pytest.mark.parametrize("process", [EDM, process_lib.VP()])
def test_heun_calls_the_network_twice_a_step_but_once_where_no_noise_is_left(process):
    calls, nfe = count_calls(samplers.heun, process, num_steps=18)
    assert len(calls) == nfe == 35


def test_noise_is_added_before_the_first_call_of_a_step():
    calls, nfe = count_calls(samplers.stochastic_heun, EDM, num_steps=18, **CHURN)
    grid = EDM.grid(18)
    raised = [
        t * 2**0.5 if 0.05 <= t <= 50 else t for t in grid[:-1]
    ]  # 40 / 18 is above the limit of sqrt(2) - 1
    assert len(calls) == nfe == 35
    np.testing.assert_allclose(sorted(calls), sorted([*raised, *grid[1:-1]]), rtol=1e-6)


def test_euler_calls_the_network_once_a_step():
    calls, nfe = count_calls(samplers.euler, EDM, num_steps=18)
    assert nfe == 18
    np.testing.assert_allclose(sorted(calls, reverse=True), EDM.grid(18)[:-1], rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_straight_flows_need_one_step(num_steps):
    point = jnp.array([[0.3, -0.7]])
    sampler = samplers.euler(
        lambda params, x_t, t, cond: jnp.broadcast_to(point, x_t.shape),
        process_lib.RectifiedFlow(),
        num_steps=num_steps,
    )
    x = sampler.sample(None, jax.random.normal(jax.random.key(0), (4, 2)), None)
    np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=1e-6)


def test_heun_is_of_second_order():
    exact = 80 * 0.5 / np.sqrt(80**2 + 0.5**2)
    errors = [
        samplers.heun(gaussian, EDM, num_steps=n).sample(None, images([1.0]), None).item() - exact
        for n in (20, 40)
    ]
    assert 3.5 < errors[0] / errors[1] < 8


SD15 = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
)  # of its scheduler
DDIM, PNDM = (
    dict(SD15, set_alpha_to_one=False, clip_sample=False),
    dict(SD15, set_alpha_to_one=False, skip_prk_steps=True),
)
SIGMA_MIN = dict(SD15, final_sigmas_type="sigma_min")
SCHEDULERS = {  # ours and diffusers'
    "leading": (samplers.ddim, dict(spacing="leading"), "DDIMScheduler", DDIM),
    "trailing": (
        samplers.ddim,
        dict(spacing="trailing"),
        "DDIMScheduler",
        DDIM | dict(timestep_spacing="trailing"),
    ),
    "linspace": (
        samplers.ddim,
        dict(spacing="linspace"),
        "DPMSolverMultistepScheduler",
        SD15 | dict(solver_order=1),
    ),
    "pndm": (samplers.pndm, {}, "PNDMScheduler", PNDM),
    "dpm_solver_pp": (samplers.dpm_solver_pp, {}, "DPMSolverMultistepScheduler", SD15),
    "sigma_min": (
        samplers.dpm_solver_pp,
        dict(last="sigma_min"),
        "DPMSolverMultistepScheduler",
        SD15 | dict(final_sigmas_type="sigma_min"),
    ),
    "euler": (samplers.euler, {}, "EulerDiscreteScheduler", SD15),
}
CASES = sorted(
    {
        *itertools.product(SCHEDULERS, (1, 2, 4, 7, 20, 50)),
        *(("sigma_min", n) for n in (10, 14, 15, 25)),
    }
    - {("pndm", 1)}
)
Z = np.random.default_rng(0).standard_normal((2, 3, 3, 2), np.float32)


def network(library, x, t):
    return library.tanh(1.5 * x + library.cos(t / 300))


def ours(name, num_steps, prediction=denoiser_lib.eps, see=lambda t, x: None):
    def called(params, x, t, cond):
        jax.debug.callback(lambda t, x: see(float(t[0]), np.array(x)), t, x, ordered=True)
        return network(jnp, x, process_lib.expand(t, x))

    make, settings, _, _ = SCHEDULERS[name]
    sampler = make(
        denoiser_lib.Denoiser(called, VP, prediction), VP, num_steps=num_steps, **settings
    )
    x = np.asarray(sampler.sample(None, jnp.asarray(Z), None))
    jax.effects_barrier()
    return x, sampler.nfe


def scheduler_of(name, num_steps, **changes):
    _, _, theirs, settings = SCHEDULERS[name]
    scheduler = getattr(pytest.importorskip("diffusers"), theirs)(**settings | changes)
    scheduler.set_timesteps(num_steps)
    return scheduler


def theirs(name, num_steps, see=lambda t, x: None, **changes):
    torch, scheduler = pytest.importorskip("torch"), scheduler_of(name, num_steps, **changes)
    x = torch.from_numpy(Z) * scheduler.init_noise_sigma
    for t, s in itertools.zip_longest(scheduler.timesteps, scheduler.timesteps[1:], fillvalue=0):
        if (
            name == "trailing"
        ):  # its step is 1000 // this, which is not always where the next one begins
            scheduler.num_inference_steps = fractions.Fraction(1000, int(t - s))
        x_t = scheduler.scale_model_input(x, t)
        see(float(t), x_t.numpy())
        x = scheduler.step(network(torch, x_t, t), t, x).prev_sample
    return x.numpy()


def difference(x, y):
    return np.abs(x - y).max() / np.abs(y).max()


@pytest.mark.parametrize("name", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers(name):
    for n in range(1, 1000):
        grid = VP.timesteps(n, name)
        np.testing.assert_array_equal(
            grid[:-1], scheduler_of(name, n).timesteps[:n]
        )  # 61, "trailing" and some others: theirs add a -1
        assert (np.diff(grid) <= 0).all() and (VP.sigma(grid[:-1]) > 0).all()


@pytest.mark.parametrize(("name", "num_steps"), CASES)
def test_what_the_network_sees_and_the_result_are_those_of_diffusers(name, num_steps):
    seen, expected = [], []
    x, nfe = ours(name, num_steps, see=lambda *call: seen.append(call))
    seen.append((0, x))
    expected_x = theirs(name, num_steps, see=lambda *call: expected.append(call))
    expected.append((0, expected_x))
    assert len(seen) - 1 == nfe == num_steps + (name == "pndm")
    tolerance = (
        2e-5 if (name, num_steps) == ("euler", 1) else 1e-5
    )  # it begins at timestep 0, of which diffusers' sigma is 1.3e-5 off
    for (t, x_t), (expected_t, expected_x_t) in zip(seen, expected, strict=True):
        assert t == pytest.approx(expected_t, rel=1e-7)
        assert difference(x_t, expected_x_t) < tolerance


@pytest.mark.parametrize(
    "name", ["leading", "trailing", "linspace", "dpm_solver_pp", "sigma_min", "euler"]
)
def test_networks_of_v_are_sampled_as_by_diffusers(name):
    assert (
        difference(
            ours(name, 7, denoiser_lib.v)[0], theirs(name, 7, prediction_type="v_prediction")
        )
        < 1e-5
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_float64_on_eight_devices_agrees_with_diffusers(name):
    make, settings, _, _ = SCHEDULERS[name]
    denoise = denoiser_lib.Denoiser(
        lambda params, x, t, cond: network(jnp, x, process_lib.expand(t, x)), VP, denoiser_lib.eps
    )
    sampler = make(denoise, VP, num_steps=20, **settings)
    sample = generate.make_sample(sampler, sharding.Parallel(sharding.make_mesh()), 8)
    x = sample(
        {},
        dict(
            z=np.tile(Z, (4, 1, 1, 1)), key=np.zeros((8, 2), np.uint32), cond=np.zeros(8, np.int32)
        ),
    )
    assert difference(x, np.tile(theirs(name, 20), (4, 1, 1, 1))) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("leading", dict(set_alpha_to_one=True)),
        ("pndm", dict(set_alpha_to_one=True)),
        ("dpm_solver_pp", dict(final_sigmas_type="sigma_min")),
        ("sigma_min", dict(final_sigmas_type="zero")),
        ("sigma_min", dict(euler_at_final=True)),
        ("dpm_solver_pp", dict(solver_order=1)),
        ("dpm_solver_pp", dict(solver_type="heun")),
        ("euler", dict(timestep_spacing="leading")),
    ],
)
def test_other_settings_of_diffusers_are_far_away(name, changes):
    assert difference(ours(name, 20)[0], theirs(name, 20, **changes)) > 1e-4


@pytest.mark.parametrize("name", ["pndm", "dpm_solver_pp"])
def test_the_order_of_the_predictions_matters(name, monkeypatch):
    expected, multistep = ours(name, 20)[0], samplers._multistep
    monkeypatch.setattr(
        samplers,
        "_multistep",
        lambda *args: multistep(*args[:3], (*args[3][:2], args[3][2][:, ::-1])),
    )
    assert not difference(ours(name, 20)[0], expected) < 1e-4


def test_plms_forgets_the_second_call(monkeypatch):
    expected = ours("pndm", 20)[0]
    monkeypatch.setattr(
        samplers,
        "PLMS",
        np.array([sorted(row, key=lambda weight: weight == 0) for row in samplers.PLMS]),
    )
    assert difference(ours("pndm", 20)[0], expected) > 1e-4


def test_ddim_is_euler_on_the_straight_flow():
    """A change of alpha / (alpha + sigma) moves x_t / (alpha + sigma) along x_hat - eps_hat."""
    grid = VP.timesteps(20, "leading")
    total = VP.alpha(grid) + VP.sigma(grid)
    tau, x = VP.alpha(grid) / total, Z / total[0]
    for i, t in enumerate(grid[:-1]):
        velocity = (x - network(np, total[i] * x, t)) / tau[i]
        x = x + (tau[i + 1] - tau[i]) * velocity
    assert difference(ours("leading", 20)[0], total[-1] * x) < 1e-5


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_dpm_solver_pp_has_finite_gradients(num_steps):
    denoise = lambda params, x_t, t, cond: jnp.tanh(params * x_t)
    sample = samplers.dpm_solver_pp(denoise, VP, num_steps=num_steps).sample
    values = jax.value_and_grad(lambda params, z: sample(params, z, None).sum(), argnums=(0, 1))(
        0.7, jnp.asarray(Z)
    )
    assert all(np.isfinite(a).all() and np.any(a) for a in jax.tree.leaves(values))


FLOW = process_lib.RectifiedFlow()
MEAN, SPREAD = (
    np.linspace(a, b, 32, dtype=np.float32).reshape(1, 4, 4, 2) for a, b in ((1, -0.5), (0.1, 0.8))
)


def flow_velocity(t, x):
    """The exact dx/dt of the rectified flow between N(0, 1) and N(MEAN, SPREAD^2), [B, 4, 4, 2]."""
    slope = (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2)
    return slope * (x - (1 - t) * MEAN) - MEAN


def flow_denoiser(params, x_t, t, cond):
    t = process_lib.expand(t, x_t)
    return x_t - t * flow_velocity(t, x_t)


def test_rk45_is_scipys(optimisations):
    """It is as in the public code, except at the end of time, for each image of eight devices."""
    solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp
    z = (
        np.random.default_rng(1).standard_normal((12, 4, 4, 2), np.float32)
        * np.float32(np.linspace(0.3, 2, 12))[:, None, None, None]
    )
    inputs = dict(z=z, key=np.zeros((12, 2), np.uint32), cond=np.zeros(12, np.int32))
    sampler = samplers.rk45(flow_denoiser, FLOW)
    run = lambda sampler: generate.make_sample(
        sampler, sharding.Parallel(sharding.make_mesh()), 16
    )({}, inputs)
    x, calls = run(sampler), run(sampler._replace(sample=sampler.count))

    network = jax.jit(
        flow_denoiser
    )  # float32: its rounding decides on the length of steps whose error is next to nothing
    denoise = lambda t, x: (
        network(None, np.float32(x).reshape(1, 4, 4, 2), np.float32([t]), None).__array__().ravel()
    )
    for row, found, count in zip(z, x, calls, strict=True):
        theirs = solve_ivp(
            lambda t, x: (x - denoise(t, x)) / t,
            (1, 1e-3),
            row.ravel().astype(float),
            rtol=1e-5,
            atol=1e-5,
        )
        assert count == theirs.nfev + 1
        np.testing.assert_allclose(found.ravel(), denoise(1e-3, theirs.y[:, -1]), atol=1e-6)
    assert sampler.nfe is None and len(set(calls.tolist())) > 1
    np.testing.assert_allclose(x, MEAN + SPREAD * z, atol=5e-4)  # the tolerance is of a step


def test_the_end_of_rk45():
    """The error of the last step to t = 0 is T_MIN^2 / 2 times the acceleration z / SPREAD; without
    such a step it would be far larger.
    """
    with jax.enable_x64(True):
        z = jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
        x = samplers.rk45(flow_denoiser, FLOW, rtol=1e-7, atol=1e-7).sample(None, z, None)
    np.testing.assert_allclose(
        np.abs(x - (MEAN + SPREAD * z)), 0, atol=1.2 * 0.5e-6 / SPREAD.min() * np.abs(z).max()
    )
    assert 1e-3 * np.abs(flow_velocity(0, MEAN + SPREAD * z)).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "process", "settings", "message"),
    [
        (
            samplers.pndm,
            EDM,
            dict(num_steps=20),
            "pndm needs the process VP, got EDM; use euler or heun",
        ),
        (
            samplers.dpm_solver_pp,
            process_lib.RectifiedFlow(),
            dict(num_steps=20),
            "got RectifiedFlow",
        ),
        (
            samplers.dpm_solver_pp,
            VP,
            dict(num_steps=20, last="first"),
            "no end 'first' of dpm_solver_pp; there are: zero, sigma_min",
        ),
        (samplers.rk45, EDM, {}, "rk45 needs the process RectifiedFlow, got EDM"),
        (samplers.straightness, VP, {}, "straightness needs the process RectifiedFlow, got VP"),
        (
            samplers.ddim,
            VP,
            dict(num_steps=20, spacing="karras"),
            "no spacing 'karras'; there are: leading",
        ),
        (
            samplers.ddim,
            VP,
            dict(num_steps=0, spacing="leading"),
            "num_steps is 0, expected 1 to 999",
        ),
        (samplers.euler, VP, dict(num_steps=1001), "num_steps is 1001, expected 1 to 999"),
        (
            samplers.pndm,
            VP,
            dict(num_steps=1),
            "num_steps of pndm is 1, expected 2 or more; use ddim",
        ),
    ],
)
def test_samplers_that_there_are_not(make, process, settings, message):
    with pytest.raises(ValueError, match=message):
        make(None, process, **settings)


SETTINGS = {"stochastic_heun": CHURN, "rk45": {}, "one_step": {}}


@pytest.mark.parametrize("name", samplers.CHOICES)
def test_every_sampler_can_be_made_inside_jit(name):
    process = {"rk45": process_lib.RectifiedFlow(), "stochastic_heun": EDM}.get(name, VP)
    settings = SETTINGS.get(name, {})
    if "num_steps" in inspect.signature(getattr(samplers, name)).parameters:
        settings = settings | {"num_steps": 3}

    def images(z):
        sampler = getattr(samplers, name)(
            lambda params, x_t, t, cond: 0.5 * x_t, process, **settings
        )
        return sampler.sample(None, z, None, lambda i: jnp.ones_like(z))

    z = jnp.ones((2, 4, 4, 1))
    np.testing.assert_allclose(jax.jit(images)(z), images(z), rtol=1e-5)
