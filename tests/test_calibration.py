"""Calibration, operating points and subgroups: nested in the folds, intervals that hold the truth, small groups named."""
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression

from cxrlg.calibration import (age_bands, calibrated, calibration, calibration_line, cross_calibrated, fit_platt, operating_points,
                               rescaled, subgroups, _bins)
from cxrlg.core import DataError
from cxrlg.eval import macro_auc, patient_weights, simulate, tta


def simulated(n_patients=120, L=4, seed=0):
    return simulate(n_patients, np.linspace(.05, .5, L), 1.2, seed)


def test_scale_keeps_every_auc_within_a_fold_and_is_nested():
    y, z, pat = simulated(300)
    folds = pat % 3
    q = cross_calibrated(y, z * 3, folds)
    for f in range(3):
        k = folds == f
        assert np.allclose(macro_auc(y[k], z[k].astype(float)).auc, macro_auc(y[k], q[k]).auc, atol=1e-12)
        assert np.allclose(q[k], calibrated(z[k] * 3, fit_platt(y[~k], z[~k] * 3)), atol=1e-12)


def test_scale_refuses_to_reverse_a_label():
    y, z, _ = simulated(300)
    t = fit_platt(1 - y, z)
    assert (t.temperature > 0).all()


def test_calibration_intervals_hold_the_truth():
    rng, perfect, off = np.random.default_rng(0), [], []
    for i in range(60):
        p = rng.beta(1, 4, (800, 1))
        y = (rng.random(p.shape) < p).astype(float)
        a, b = (calibration(y, q, n_boot=200, seed=i).ece.iloc[0] for q in (p, p * .5 + .3))
        truth = np.mean(np.abs(p - (p * .5 + .3)))
        perfect.append(a.low <= .001 and a.low <= a.ece <= a.high)
        off.append(b.low <= truth <= b.high)
    assert np.mean(perfect) > .93 and np.mean(off) > .93


def test_bins_keep_ties_together():
    b = _bins(np.array([0., 0, 0, 0, .5, .5, 1]), 15)
    assert len(set(b[:4])) == 1 and b.max() == 2


def test_operating_points_use_the_other_folds():
    y, z, pat = simulated(300)
    p, folds = tta(z, z), pat % 3
    r = operating_points(y, p, folds).set_index(['label', 'rule']).loc[('label 3', 'sensitivity 0.9')]
    called = np.zeros(len(y), bool)
    for f in range(3):
        fit = np.sort(p[(folds != f) & (y[:, 3] == 1), 3])[::-1]
        called[folds == f] = p[folds == f, 3] >= fit[int(np.ceil(.9 * len(fit))) - 1]
    assert abs(r.sensitivity - called[y[:, 3] == 1].mean()) < 1e-12


def test_subgroups_name_the_small_and_compare_on_common_labels():
    y, z, pat = simulated(400)
    y[:, 0] = 0
    g = pd.DataFrame(dict(sex=np.where(pat < 10, 'X', np.where(pat % 2, 'F', 'M')), nobody=[None] * len(y)))
    t = subgroups(y, z, pat, g, n_boot=50).set_index('value')
    assert t.note['X'].startswith('too small') and (t.labels[['F', 'M']] == 3).all() and list(t.variable.unique()) == ['sex']


def test_calibration_keeps_no_table_ofpatient_weights():
    "20,000 patients and 1,024 more replicates in one table would be 82 MB more"
    p = np.random.default_rng(0).random((20_000, 1))
    peaks = [peak_of((p > .5).astype(float), p, n) for n in (512, 1536)]
    assert peaks[1] < peaks[0] + 20e6, peaks


def peak_of(y, p, n_boot):
    "Bytes that a calibration needs at its peak"
    tracemalloc.start()
    try:
        calibration(y, p, n_boot=n_boot)
        return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def test_a_bin_without_a_positive_is_not_certain():
    p = np.repeat([.01, .99], 40)
    y, pat = (p > .5).astype(float), np.arange(80) // 2
    t = calibration(y, p, bins=2, patients=pat, n_boot=50).table
    limit = beta.ppf(.975, 1, 20) # 20 patients a bin: Clopper and Pearson's for 0 of 20
    assert np.allclose(t.low, [0, 1 - limit]) and np.allclose(t.high, [limit, 1])


def test_ages_and_groups_of_any_type():
    age = pd.Series([0, 17, 59.5, None], dtype='Float64')
    assert age_bands(age).tolist()[:3] == ['0-17', '0-17', '40-59'] and pd.isna(age_bands(age)[3])
    with pytest.raises(DataError, match='ages hold text'): age_bands(['old'])
    y, z, pat = simulated(400)
    sex = pd.Series(np.where(pat % 2, 'F', 'M')).where(pat > 3)
    want = subgroups(y, z, pat, pd.DataFrame(dict(sex=sex)), n_boot=20)
    for kind in ('string', 'string[pyarrow]', 'category'):
        pd.testing.assert_frame_equal(subgroups(y, z, pat, pd.DataFrame(dict(sex=sex.astype(kind))), n_boot=20), want)


def test_logits_and_single_folds_are_refused():
    y, z, _ = simulated()
    with pytest.raises(DataError, match='through the sigmoid first'): calibration(y, z * 5)
    with pytest.raises(DataError, match='two folds or more'): cross_calibrated(y, z, np.zeros(len(y)))


# slope and intercept

def refitted(y, p, patients, n_boot, seed=0):
    "Slopes of logistic regressions fitted anew on each replicate's films"
    z, codes = logit(p)[:, None], pd.factorize(patients)[0]
    w = np.concatenate(list(patient_weights(codes.max() + 1, n_boot, seed, n_films=len(y))), axis=1)[codes]
    fits = [LogisticRegression(C=1e10, tol=1e-9).fit(z, y, sample_weight=c) for c in w.T]
    return np.array([f.coef_.item() for f in fits])


@pytest.fixture(scope='module')
def drawn():
    y, z, patients = simulate(500, [.3, .08], [1.5, 1.8], seed=2)
    return y, expit(1.3 * z.astype(float) - .4), patients


def test_slope_and_intercept_are_those_of_a_logistic_regression(drawn):
    y, p, patients = drawn
    line = calibration_line(y, p, patients, ['a', 'b'], n_boot=20)
    for l, name in enumerate(['a', 'b']):
        fit = LogisticRegression(C=1e10, tol=1e-12, max_iter=1000).fit(logit(p[:, [l]]), y[:, l])
        assert line.slope[name] == pytest.approx(fit.coef_.item(), abs=1e-5)
        found = brentq(lambda a: (expit(logit(p[:, l]) + a) - y[:, l]).sum(), -9, 9)
        assert line.intercept[name] == pytest.approx(found, abs=1e-8)
    assert np.allclose(line.loc['macro', ['slope', 'intercept']], line.iloc[:2][['slope', 'intercept']].mean())


def test_a_label_of_nearly_constant_probabilities_does_not_move_the_macro(drawn):
    y, p, patients = drawn
    flat = .2 + 1e-6 * np.random.default_rng(0).normal(size=len(y))
    three = calibration_line(np.c_[y, y[:, 0], y[:, 0]], np.c_[p, p[:, 0], flat], patients, n_boot=0)
    assert abs(three.slope.iloc[3]) > 100
    assert three.slope['macro'] == pytest.approx(three.slope.iloc[:3].mean(), abs=.2)


def test_intervals_are_those_of_models_fitted_anew_on_resampled_patients(drawn):
    y, p, patients = drawn
    line = calibration_line(y, p, patients, n_boot=300)
    for l in range(2):
        low, high = np.quantile(refitted(y[:, l], p[:, l], patients, 300)[1:], [.025, .975])
        width = high - low
        assert abs(line.slope_low.iloc[l] - low) < .03 * width and abs(line.slope_high.iloc[l] - high) < .03 * width


def test_intervals_hold_the_truth():
    inside = []
    for i in range(60):
        rng = np.random.default_rng(i)
        z = np.repeat(rng.normal(-1, 1.5, 250), 2)
        y = (rng.random(500) < expit(z)).astype(float)
        line = calibration_line(y, expit(z), np.arange(500) // 2, n_boot=200).iloc[0]
        inside.append([line.slope_low <= 1 <= line.slope_high, line.intercept_low <= 0 <= line.intercept_high])
    assert (np.mean(inside, 0) > .87).all(), np.mean(inside, 0)


def test_labels_without_a_line():
    y, z, patients = simulate(100, [.3, .3, .3, .3], [1, 1, 1, 1])
    p = expit(z.astype(float))
    y[:, 1], y[:, 2], p[:, 3] = 0, np.nan, np.where(y[:, 3] == 1, .9, .1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        line = calibration_line(y, p, patients, list('abcd'), n_boot=30)
    assert line.loc['a'].notna().all() and line.loc[['b', 'c']].isna().all(axis=None) and np.isnan(line.slope['d'])
    known = np.random.default_rng(0).random(len(y)) < .6
    part = y[:, :1].copy()
    part[~known] = np.nan
    found = calibration_line(part, p[:, :1], patients, n_boot=0).iloc[0]
    assert found.slope == pytest.approx(calibration_line(y[known, :1], p[known, :1], n_boot=0).slope.iloc[0])
    with pytest.raises(DataError, match='through the sigmoid first'): calibration_line(y, z)


def test_a_scale_for_other_labels_is_refused():
    y, z, _ = simulated()
    names = list('abcd')
    scale = fit_platt(pd.DataFrame(y, columns=names), z)
    Z = pd.DataFrame(z, columns=names)
    assert np.array_equal(calibrated(Z, scale), calibrated(z, scale))
    for call in (lambda: calibrated(Z[names[::-1]], scale), lambda: rescaled(expit(Z[names[::-1]]), scale)):
        with pytest.raises(DataError, match='the same labels in the same order'): call()
    with pytest.raises(DataError, match='the scale has 4 labels: give a column a label'): calibrated(z[:, :1], scale)


def test_one_patient_has_no_calibration_interval():
    y, z, _ = simulated()
    c = calibration(y, expit(z), patients=np.zeros(len(y)), n_boot=20)
    line = calibration_line(y, expit(z), np.zeros(len(y)), n_boot=20)
    assert c.ece[['low', 'high']].isna().all(axis=None) and c.ece.ece.notna().all()
    inside = c.table.observed.between(0, 1, inclusive='neither')
    assert inside.any() and c.table[inside][['low', 'high']].isna().all(axis=None)
    assert line[['slope_low', 'slope_high', 'intercept_low', 'intercept_high']].isna().all(axis=None) and line.slope.notna().all()


@pytest.mark.parametrize('change,text', [
    (dict(bins=0), 'bins=0: give a whole number, 1 or more'), (dict(bins=2.5), 'bins=2.5'), (dict(level=95), 'level=95'),
    (dict(n_boot=1), 'n_boot=1'), (dict(n_boot=-1), 'n_boot=-1')])
def test_arguments_of_calibration_that_cannot_be_used(change, text):
    y, z, pat = simulated()
    with pytest.raises(DataError, match=text): calibration(y, expit(z), **change)


def test_arguments_of_operating_points_and_subgroups_that_cannot_be_used():
    y, z, pat = simulated()
    for change, text in ((dict(sensitivity=90), 'sensitivity=90: give a share'), (dict(specificity=-1), 'specificity=-1'),
                         (dict(folds=[1, 2]), '2 folds for')):
        with pytest.raises(DataError, match=text): operating_points(y, z, **change)
    with pytest.raises(DataError, match='2 folds for'): cross_calibrated(y, z, [1, 2])
    for groups, text in ((pd.DataFrame(dict(sex=['F'])), 'groups have 1 rows for'), (pd.Series(pat), 'groups are a Series: give a table')):
        with pytest.raises(DataError, match=text): subgroups(y, z, pat, groups)


def test_subgroups_average_the_seeds():
    y, z, pat = simulated(300)
    groups = pd.DataFrame(dict(sex=np.where(pat % 2, 'F', 'M')))
    a, b, both = (subgroups(y, s, pat, groups, n_boot=20).auc for s in (z, z.round(), np.stack([z, z.round()])))
    assert np.allclose(both, (a + b) / 2) and both.notna().all()


def test_films_of_which_no_variable_is_known_are_in_no_group():
    y, p = np.tile([[0.], [1.]], (40, 1)), np.linspace(0, 1, 80)[:, None]
    assert len(subgroups(y, p, np.arange(80), pd.DataFrame(), n_boot=5)) == 0
