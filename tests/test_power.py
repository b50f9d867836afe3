"""Power: the parts of the error are found, and the formulas are what normal draws give."""
import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from cxrlg.core import DataError
from cxrlg.eval import bootstrap, simulate
from cxrlg.power import PairedError, minimum_detectable_effect, paired_error, patients_needed, power


def simulated(n_patients=120, L=4, seed=0):
    return simulate(n_patients, np.linspace(.05, .5, L), 1.2, seed)


def test_parts_of_the_error_are_found():
    "Known parts: a patient's own chance, a seed's own chance, and training runs that differ"
    rng, P, S, got = np.random.default_rng(0), 400, 4, []
    for i in range(30):
        y = (rng.random((P, 1)) < .4).astype(float)
        loss = lambda x: (x - y)**2
        base = np.full((S, P, 1), .5)
        shift = .02 * rng.normal(size=(1, P, 1)) + .03 * rng.normal(size=(S, P, 1)) + .004 * rng.normal(size=(S, 1, 1))
        e = paired_error(y, base, .5 - np.where(y == 1, -1, 1) * shift, np.arange(P), n_boot=200, metric='brier', seed=i)
        got.append([e.shared**2, e.own**2, e.training**2])
        assert np.isfinite([e.shared, e.own, e.training, e.se()]).all()
    found = np.sqrt(np.mean(got, 0))
    assert np.allclose(found, [.02 / 20, .03 / 20, .004], rtol=.25), found


def test_standard_error_scales_and_one_seed_knows_no_training():
    e = PairedError(.01, 100, 2, .01, .02, .003)
    assert np.isclose(e.se(), np.sqrt(.01**2 + .02**2 / 2 + .003**2 / 2))
    assert np.isclose(e.se(400, 4), np.sqrt((.01**2 + .02**2 / 4) / 4 + .003**2 / 4))
    assert np.isclose(e.se(1e12, 1), .003, atol=1e-6) and np.isclose(PairedError(0, 100, 1, .01, 0, np.nan).se(400), .005)
    y, z, pat = simulated()
    one = paired_error(y, z, z.round(), pat, n_boot=100)
    t = bootstrap(y, z.round(), pat, n_boot=100).mean((1, 2, 3)) - bootstrap(y, z, pat, n_boot=100).mean((1, 2, 3))
    assert np.isnan(one.training) and one.own == 0 and np.isclose(one.se(), t[1:].std(ddof=1)) and one.patients == 120


@pytest.mark.parametrize('gain,margin', [(.01, None), (0, .01), (.004, .01), (-.004, .01), (.03, None)])
def test_power_is_what_normal_draws_give(gain, margin):
    e = PairedError(0, 100, 1, .004, 0, np.nan)
    d = gain + e.se() * np.random.default_rng(0).normal(size=200_000)
    se = e.se() * np.sqrt(np.random.default_rng(1).chisquare(99, len(d)) / 99)
    found = np.abs(d) > student.ppf(.975, 99) * se if margin is None else np.abs(d) < margin - student.ppf(.95, 99) * se
    assert abs(power(e, gain, margin=margin) - found.mean()) < .004
    n = patients_needed(e, gain, margin=margin)
    assert power(e, gain, n, margin=margin) >= .8 > power(e, gain, n - 1, margin=margin)


def test_degrees_of_freedom_are_those_of_the_larger_part():
    "Satterthwaite: S - 1 where training rules, P - 1 where patients do, and in between the formula"
    assert np.isclose(PairedError(0, 100, 3, 0, 0, .01).df(), 2) and np.isclose(PairedError(0, 100, 3, .01, 0, 0).df(), 99)
    assert PairedError(0, 100, 1, .01, 0, np.nan).df() == 99
    e = PairedError(0, 100, 3, .01, .004, .006)
    shared, runs = .01**2, (.004**2 + .006**2) / 3
    assert np.isclose(e.df(), (shared + runs)**2 / (shared**2 / 99 + runs**2 / 2))
    assert np.isclose(
        e.df(400),
        (shared / 4 + (0.004**2 / 4 + 0.006**2) / 3) ** 2
        / ((shared / 4) ** 2 / 399 + ((0.004**2 / 4 + 0.006**2) / 3) ** 2 / 2),
    )
    assert e.df(np.array([100, 400])).shape == (2,)


@pytest.mark.parametrize('training', [.002, .01, .03])
def test_type_one_error_with_few_seeds(training):
    "Three trainings of one recipe, twice: Student's t calls a change in about 5 %, the normal quantile in far more where training rules"
    rng, P, S, t, n = np.random.default_rng(1), 200, 3, [], 600
    y = (rng.random((P, 1)) < .4).astype(float)
    for i in range(n):
        loss = .02 * rng.normal(size=(1, P, 1)) + .02 * rng.normal(size=(S, P, 1)) + training * rng.normal(size=(S, 1, 1))
        e = paired_error(y, np.full((S, P, 1), .5), .5 + np.where(y == 1, 1, -1) * loss, np.arange(P), n_boot=80, metric='brier', seed=i)
        true = .02**2 + .02**2 + training**2 # of the squared deviations
        t.append((abs(e.change - true) / e.se(), e.df()))
    t, df = np.transpose(t)
    by_t, by_normal = (t > student.ppf(.975, df)).mean(), (t > norm.ppf(.975)).mean()
    assert by_t < .085, (by_t, by_normal)
    if training > .002: assert by_normal > .1 and by_t > .01, (by_t, by_normal)


def test_detectable_is_the_inverse_of_power():
    e = PairedError(0, 100, 3, .004, .002, .001)
    assert abs(power(e, minimum_detectable_effect(e, 300, 2), 300, 2) - .8) < 1e-6
    assert abs(power(e, 0, 300, 2, margin=minimum_detectable_effect(e, 300, 2, equivalence=True)) - .8) < 1e-6
    assert patients_needed(e, .0005, seeds=1) == np.inf and np.isfinite(patients_needed(e, .0005, seeds=100))


@pytest.mark.parametrize('gain,margin,text', [(0, None, 'gain=0'), (.1, .05, 'not within margin')])
def test_a_gain_that_no_study_can_find_is_refused(gain, margin, text):
    with pytest.raises(DataError, match=text): patients_needed(PairedError(0, 9, 1, .01, 0, np.nan), gain, margin=margin)


def test_models_of_other_shapes_are_refused():
    y, z, pat = simulated()
    with pytest.raises(DataError, match='must agree'): paired_error(y, z, z[:5], pat)


@pytest.mark.filterwarnings('error')
def test_equal_arms_print_no_warning():
    equal = PairedError(0., 100, 1, 0., 0., np.nan)
    assert power(equal, 0) == pytest.approx(.05, abs=1e-4) and power(equal, .01) == 1 and power(equal, 0, margin=.01) == 1
