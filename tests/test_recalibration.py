"Recalibration: lines against scikit-learn, their errors against the bootstrap, prevalence against what was drawn."
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from cxrlg.eval import simulate
from cxrlg.recalibration import calibration_line, em_prevalence, shift_prevalence


@pytest.fixture(scope='module')
def films():
    "Targets, logits and patients of three findings"
    return simulate(400, [.3, .15, .05], [1.5, 1.2, 1.8], seed=2)


def test_slope_and_intercept_are_those_of_a_logistic_model(films):
    y, z, patients = films
    found = calibration_line(pd.DataFrame(y, columns=list('abc')), expit(z), patients)
    for l, name in enumerate('abc'):
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(z[:, [l]], y[:, l])
        assert found.slope[name] == pytest.approx(model.coef_.item(), abs=1e-3)
        assert expit(z[:, l] + found.intercept[name]).mean() == pytest.approx(y[:, l].mean(), abs=1e-6)
    weights = [(found.slope_high - found.slope_low)[l] ** -2 for l in 'abc']
    assert found.slope['macro'] == pytest.approx(np.average(found.slope[:-1], weights=weights), rel=.05)
    assert found.intercept['macro'] == pytest.approx(found.intercept[:-1].mean())


def test_intervals_are_as_wide_as_the_bootstrap_of_patients_says(films):
    y, z, patients = films
    found, rng, ids = calibration_line(y, expit(z), patients), np.random.default_rng(0), np.unique(patients)
    rows = {p: np.flatnonzero(patients == p) for p in ids}
    drawn = []
    for _ in range(150):
        some = np.concatenate([rows[p] for p in rng.choice(ids, len(ids))])
        drawn.append(calibration_line(y[some], expit(z[some]), patients[some])[['slope', 'intercept']].to_numpy())
    sd = np.std(drawn, 0)
    half = np.stack([(found[f'{c}_high'] - found[f'{c}_low']) / 2 for c in ('slope', 'intercept')], 1)
    assert np.abs(half / 1.96 / sd - 1).max() < .3


def test_what_has_no_line_has_none():
    y = np.array([[0, 0, np.nan], [0, 0, np.nan], [0, 1, np.nan], [0, 1, np.nan]])
    found = calibration_line(y, np.tile([[.1], [.2], [.8], [.9]], 3), np.arange(4))
    assert found.isna().all(axis=None)


def test_a_constant_probability_has_no_slope():
    assert np.isnan(calibration_line(np.array([[0.], [1.], [0.], [1.]]), np.full((4, 1), .5), np.arange(4)).slope['label 0'])


def test_prevalence_is_found_without_labels():
    rng = np.random.default_rng(0)
    def draw(share, n):
        y = rng.random(n) < share
        return y, rng.normal(size=n) + 2 * y
    def logits(x, share): return 2 * x - 2 + np.log(share / (1 - share))
    y, x = draw(.4, 20000)
    p = expit(logits(x, .1))[:, None]
    assert em_prevalence(p, np.array([.1])) == pytest.approx(.4, abs=.02)
    assert shift_prevalence(p, np.array([.1]), np.array([.4]))[:, 0] == pytest.approx(expit(logits(x, .4)), abs=1e-6)


def test_no_positive_at_all_leaves_a_small_prevalence():
    assert 0 < em_prevalence(np.full((50, 1), 1e-6), np.array([.3])).item() < .02
