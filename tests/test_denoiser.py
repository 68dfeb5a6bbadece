import jax.numpy as jnp
import numpy as np
import pytest

from dmd_jax import denoiser as denoiser_lib
from dmd_jax import process as process_lib
from dmd_jax import samplers

LEVELS = np.array([0, 20, 300, 500, 700, 980, 998])
RNG = np.random.default_rng(0)
X, EPS = RNG.standard_normal((2, len(LEVELS), 4, 4, 2))


def edm_target(alpha, sigma):
    """c_out and c_skip of EDM's Table 1, for sigma_data 0.5."""
    return (
        (X - 0.25 / (sigma**2 + 0.25) * (X + sigma * EPS))
        * np.sqrt(sigma**2 + 0.25)
        / (0.5 * sigma)
    )


# What the papers say the network predicts, in float64.
PAIRS = {
    "edm": (process_lib.EDM(), denoiser_lib.edm, edm_target),
    "edm-eps": (process_lib.EDM(), denoiser_lib.eps, lambda alpha, sigma: EPS),
    "vp-eps": (process_lib.VP(), denoiser_lib.eps, lambda alpha, sigma: EPS),
    "vp-v": (process_lib.VP(), denoiser_lib.v, lambda alpha, sigma: alpha * EPS - sigma * X),
    "flow": (process_lib.RectifiedFlow(), denoiser_lib.flow, lambda alpha, sigma: EPS - X),
    "flow_to_data": (
        process_lib.RectifiedFlow(),
        denoiser_lib.flow_to_data,
        lambda alpha, sigma: X - EPS,
    ),
}


def returns_its_params(params, x, noise, cond):
    return params


def adds_its_condition(params, x, noise, cond):
    return params * x + process_lib.expand(0.1 * noise + jnp.sin(1.0 * cond), x)


@pytest.fixture(params=PAIRS)
def exact(request):
    """A denoiser whose params are its network's output; the right output for X and EPS; x_t; t."""
    process, prediction, target = PAIRS[request.param]
    t = process.level(jnp.asarray(LEVELS))
    alpha, sigma = (
        np.asarray(a, np.float64).reshape(-1, 1, 1, 1) for a in (process.alpha(t), process.sigma(t))
    )
    x_t = (alpha * X + sigma * EPS).astype(np.float32)
    return (
        denoiser_lib.Denoiser(returns_its_params, process, prediction),
        target(alpha, sigma).astype(np.float32),
        x_t,
        t,
    )


def test_edm_coefficients_at_80():
    coefficients = denoiser_lib.edm(process_lib.EDM(), jnp.array([80.0]))
    np.testing.assert_allclose(
        np.ravel(coefficients), [3.90610e-5, 0.49999023, 0.012499756, 1.0955067], rtol=2e-6
    )


def test_the_right_output_gives_the_clean_image(exact):
    denoiser, output, x_t, t = exact
    amplified = np.reshape(
        denoiser.process.sigma(t) / denoiser.process.alpha(t), (-1, 1, 1, 1)
    )  # of float32's rounding
    assert np.all(np.abs(denoiser(output, x_t, t) - X) <= 2e-6 * (1 + amplified))


def test_target_is_the_papers(exact):
    denoiser, output, _, t = exact
    x, eps = X.astype(np.float32), EPS.astype(np.float32)
    _, target = denoiser.output_and_target(output, x, eps, t)
    cancelled = np.reshape(denoiser.process.alpha(t) / denoiser.process.sigma(t), (-1, 1, 1, 1))
    assert np.all(np.abs(target - output) <= 2e-6 * (1 + cancelled))


@pytest.mark.parametrize("level", LEVELS)
def test_unweighted_loss_on_the_output_is_edms_weighted_loss_on_the_image(level):
    denoiser = denoiser_lib.Denoiser(adds_its_condition, process_lib.EDM())
    x, eps = X.astype(np.float32), EPS.astype(np.float32)
    t = denoiser.process.level(jnp.full(len(x), level))
    cond = jnp.arange(len(x))
    output, target = denoiser.output_and_target(0.5, x, eps, t, cond)
    x_hat = denoiser(0.5, process_lib.add_noise(denoiser.process, x, eps, t), t, cond)
    weight = float(t[0]) ** -2 + 0.5**-2
    np.testing.assert_allclose(
        np.mean((output - target) ** 2), weight * np.mean((x_hat - x) ** 2), rtol=1e-4
    )


def test_network_sees_scaled_input_noise_condition_and_params():
    seen = []

    def network(*args):
        seen.extend(args)
        return args[1].astype(jnp.bfloat16)

    denoiser = denoiser_lib.Denoiser(network, process_lib.EDM())
    x_t, t = jnp.ones((2, 1, 1, 1)), jnp.array([1.0, 80.0])
    assert denoiser("params", x_t, t, "cond").dtype == jnp.float32
    params, x, noise, cond = seen
    np.testing.assert_allclose(np.ravel(x), 1 / np.sqrt([1.25, 6400.25]), rtol=1e-6)
    np.testing.assert_allclose(noise, [0, 1.0955067], rtol=1e-6)
    assert (params, cond) == ("params", "cond")
    assert denoiser.output_and_target("params", x_t, x_t, t)[0].dtype == jnp.float32


@pytest.mark.parametrize(("name", "scale"), [("vp-eps", 1), ("vp-v", 1), ("flow", 1000)])
def test_time_as_the_network_is_told_it(name, scale):
    process, prediction, _ = PAIRS[name]
    t = process.level(jnp.asarray(LEVELS))
    _, _, in_, noise = prediction(process, t)
    np.testing.assert_allclose(noise, scale * t)
    np.testing.assert_array_equal(in_, np.ones(len(t)))


@pytest.mark.parametrize(
    ("name", "prior", "t"), [("edm", 80, 80), ("vp-eps", 1, 999), ("flow", 1, 1)]
)
def test_generator_is_the_denoiser_at_the_noisiest_time(name, prior, t):
    denoiser = denoiser_lib.Denoiser(adds_its_condition, *PAIRS[name][:2])
    z, cond = jnp.asarray(EPS, jnp.float32), jnp.arange(len(EPS))
    np.testing.assert_array_equal(
        samplers.one_step(denoiser, denoiser.process).sample(0.5, z, cond),
        denoiser(0.5, prior * z, jnp.full(len(z), float(t)), cond),
    )


@pytest.mark.parametrize(
    ("process", "prediction", "expected"),
    [
        (process_lib.RectifiedFlow(), denoiser_lib.edm, "flow or flow_to_data"),
        (process_lib.RectifiedFlow(), denoiser_lib.eps, "flow or flow_to_data"),
        (process_lib.EDM(), denoiser_lib.flow, "edm or eps"),
        (process_lib.VP(), denoiser_lib.flow, "eps or v"),
    ],
)
def test_a_prediction_that_does_not_fit_the_process_is_refused(process, prediction, expected):
    message = (
        f"^the prediction {prediction.__name__} does not fit the process "
        f"{type(process).__name__}; expected {expected}, or a function of your own.$"
    )
    with pytest.raises(ValueError, match=message):
        denoiser_lib.Denoiser(returns_its_params, process, prediction)


def test_a_network_that_changes_the_shape_is_refused():
    denoiser = denoiser_lib.Denoiser(returns_its_params, process_lib.EDM())
    with pytest.raises(ValueError, match=r"the network made \(2, 4\) of \(2, 1, 1, 4\)"):
        denoiser(jnp.ones((2, 4)), jnp.ones((2, 1, 1, 4)), jnp.ones(2))


def test_epsilon_round_trip_at_999():
    denoiser = denoiser_lib.Denoiser(returns_its_params, process_lib.VP(), denoiser_lib.eps)
    x, eps = X.astype(np.float32), EPS.astype(np.float32)
    t = jnp.full(len(x), 999.0)
    np.testing.assert_allclose(
        denoiser(eps, process_lib.add_noise(denoiser.process, x, eps, t), t), x, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1, 0.5, 0])
def test_guidance_of_one_or_less_is_the_denoiser(scale):
    denoiser = denoiser_lib.Denoiser(adds_its_condition, process_lib.EDM())
    assert denoiser_lib.guided(denoiser, scale, null_cond=10) is denoiser


def test_guidance_is_one_call_that_equals_two():
    calls = []

    def network(params, x, noise, cond):
        calls.append(x.shape)
        return adds_its_condition(params, x, noise, cond["label"] + cond["text"].mean(axis=(1, 2)))

    denoiser = denoiser_lib.Denoiser(network, process_lib.VP(), denoiser_lib.eps)
    x_t, t, n = jnp.asarray(X, jnp.float32), jnp.asarray(LEVELS, jnp.float32), len(LEVELS)
    cond = {
        "label": jnp.arange(n),
        "text": jnp.asarray(RNG.standard_normal((n, 3, 2)), jnp.float32),
    }
    null = {"label": 10, "text": np.ones((3, 2))}
    x_guided = denoiser_lib.guided(denoiser, 2.5, null)(0.5, x_t, t, cond)
    assert calls == [(2 * n, 4, 4, 2)]

    x_cond = denoiser(0.5, x_t, t, cond)
    x_null = denoiser(0.5, x_t, t, {"label": jnp.full(n, 10), "text": jnp.ones((n, 3, 2))})
    np.testing.assert_allclose(x_guided, x_null + 2.5 * (x_cond - x_null), rtol=1e-5, atol=1e-5)

    alpha, sigma = (
        np.reshape(a, (-1, 1, 1, 1)) for a in (denoiser.process.alpha(t), denoiser.process.sigma(t))
    )
    eps_cond, eps_null = ((x_t - alpha * x_hat) / sigma for x_hat in (x_cond, x_null))
    in_eps_space = (x_t - sigma * (eps_null + 2.5 * (eps_cond - eps_null))) / alpha
    np.testing.assert_allclose(x_guided, in_eps_space, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("process", "prediction"),
    [(process_lib.VP(), denoiser_lib.eps), (process_lib.EDM(), denoiser_lib.edm)],
)
def test_rectified_is_the_change_of_variables_of_rectified_flows(process, prediction):
    """In the papers' time tau = alpha / (alpha + sigma), z = x_s / (alpha + sigma), and v is
    x_hat - eps_hat.
    """
    s = process.level(jnp.asarray(LEVELS))
    alpha, sigma = (np.asarray(a, np.float64) for a in (process.alpha(s), process.sigma(s)))
    seen = []

    def network(params, x, noise, cond):
        seen.append((x, noise))
        return jnp.cos(x) + process_lib.expand(0.1 * noise, x)

    x_s = np.random.default_rng(1).standard_normal(X.shape) * (alpha + sigma)[:, None, None, None]
    original = denoiser_lib.Denoiser(network, process, prediction)
    flow = denoiser_lib.Denoiser(
        network, process_lib.RectifiedFlow(), denoiser_lib.rectified(process, prediction)
    )
    t = jnp.asarray(sigma / (alpha + sigma), jnp.float32)  # 1 - tau
    z = (x_s / (alpha + sigma)[:, None, None, None]).astype(np.float32)
    x_hat = original(None, jnp.asarray(x_s, jnp.float32), s)
    np.testing.assert_allclose(flow(None, z, t), x_hat, rtol=1e-4, atol=1e-4 * np.abs(x_hat).max())
    np.testing.assert_allclose(*(np.asarray(x) for x, _ in seen), rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(
        *(noise for _, noise in seen), rtol=1e-4, atol=1e-2
    )  # float32 of t near 1 tells timesteps apart to 1e-3

    eps_hat = (x_s - alpha[:, None, None, None] * x_hat) / sigma[:, None, None, None]
    velocity = np.asarray(denoiser_lib.velocity(z, flow(None, z, t), t), np.float64)
    np.testing.assert_allclose(
        velocity, eps_hat - x_hat, rtol=1e-3, atol=1e-3 * np.abs(x_hat).max()
    )


def test_a_rectified_network_sees_its_noisiest_time_where_the_flow_is_noisier():
    seen = []

    def network(params, x, noise, cond):
        seen.append((x, noise))
        return x

    for process, prediction in (
        (process_lib.VP(), denoiser_lib.eps),
        (process_lib.EDM(), denoiser_lib.edm),
    ):
        flow = denoiser_lib.Denoiser(
            network, process_lib.RectifiedFlow(), denoiser_lib.rectified(process, prediction)
        )
        assert np.isfinite(flow(None, jnp.ones((2, 1, 1, 1)), jnp.array([1.0, 0.999]))).all()
    (vp_input, label), (edm_input, log_sigma) = seen
    np.testing.assert_allclose(label, 999)
    np.testing.assert_allclose(
        vp_input[0], 0.9976672, rtol=1e-5
    )  # sigma(999), with which Stable Diffusion takes unit noise
    np.testing.assert_allclose(log_sigma, np.log(80) / 4, rtol=1e-6)
    np.testing.assert_allclose(edm_input[0], 80 / np.sqrt(80**2 + 0.25), rtol=1e-5)


def test_ddim_is_eulers_method_on_the_rectified_teacher():
    """On the grid of its own timesteps."""
    process, grid = process_lib.VP(), process_lib.VP().timesteps(10, "trailing")
    network = lambda params, x, noise, cond: (
        jnp.tanh(x) + process_lib.expand(jnp.sin(noise / 100), x)
    )
    original = denoiser_lib.Denoiser(network, process, denoiser_lib.eps)
    flow = denoiser_lib.Denoiser(
        network, process_lib.RectifiedFlow(), denoiser_lib.rectified(process, denoiser_lib.eps)
    )
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    z = np.asarray(X, np.float32)
    x = z / (alpha + sigma)[0]
    for t, s in zip(sigma / (alpha + sigma), (sigma / (alpha + sigma))[1:], strict=False):
        times = jnp.full(len(x), t, jnp.float32)
        x = x + (s - t) * np.asarray(
            denoiser_lib.velocity(x, flow(None, x.astype(np.float32), times), times), np.float64
        )
    expected = samplers.ddim(original, process, num_steps=10, spacing="trailing").sample(
        None, z, None
    )
    np.testing.assert_allclose((alpha + sigma)[-1] * x, expected, rtol=1e-3, atol=2e-3)
