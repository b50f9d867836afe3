"""Exact couplings after the model: optimality beside a general solver, faulty input, full size."""
import warnings

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from cxrlg.couplings import coupling_path, cv_couplings, fit_chosen, fit_couplings
from cxrlg.core import DataError
from cxrlg.eval import macro_auc
from cxrlg.graph import planted_logits
from cxrlg.stability import stable_edges


def assert_sound(fit_):
    for o in (fit_.A, fit_.bias, fit_.scale): assert np.isfinite(o).all()
    assert not fit_.A.diagonal().any() and np.isfinite(fit_.kkt)


def objective(f, z, y):
    "Penalised objective of a fit, from scratch"
    eta, known = f.refine(z), ~np.isnan(y)
    return (np.logaddexp(0, eta) - np.nan_to_num(y) * eta)[known].sum() / known.sum() + f.lam * np.abs(f.A).sum()


def reference(z, y, lam, alpha, bias, scale):
    "The same objective by L-BFGS-B on A = A+ - A-, label by label"
    M, N, total = alpha / (1 + np.exp(-z)), (~np.isnan(y)).sum(), 0.
    for j in range(z.shape[1]):
        rows = ~np.isnan(y[:, j])
        free = np.c_[np.ones((rows.sum(), int(bias))), z[rows][:, [j] * scale]]
        X, o, t = np.delete(M, j, 1)[rows], z[rows, j], y[rows, j]
        k = X.shape[1]
        def f(v):
            eta = o + X @ (v[:k] - v[k:2 * k]) + free @ v[2 * k:]
            r = 1 / (1 + np.exp(-eta)) - t
            g = X.T @ r / N
            loss = (np.logaddexp(0, eta) - t * eta).sum() / N + lam * v[:2 * k].sum()
            return loss, np.r_[g + lam, lam - g, free.T @ r / N]
        bounds = [(0, None)] * 2 * k + [(None, None)] * free.shape[1]
        options = dict(maxiter=50000, maxfun=100000, ftol=1e-17, gtol=1e-13, maxcor=50)
        total += minimize(f, np.zeros(len(bounds)), jac=True, method='L-BFGS-B', bounds=bounds, options=options).fun
    return total


@pytest.mark.parametrize('bias,scale', [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize('share', [0.5, 0.05])
def test_objective_equals_a_general_solver(bias, scale, share):
    z, y, _ = planted_logits(1500, 5, 6, size=(2, 6), seed=3)
    y[np.random.default_rng(0).random(y.shape) < 0.1] = np.nan
    top = coupling_path(z, y, lams=1., bias=bias, scale=scale)[0].lam_max
    f = coupling_path(z, y, lams=share * top, bias=bias, scale=scale)[0]
    assert f.kkt <= 1e-6 * top and f.nonzero > 0
    assert objective(f, z, y) == pytest.approx(reference(z, y, f.lam, 0.3, bias, scale), rel=1e-9)


def test_kkt_residual_from_scratch():
    z, y, _ = planted_logits(3000, seed=1)
    f = coupling_path(z, y, lams=2e-4)[0]
    r = 1 / (1 + np.exp(-f.refine(z))) - y
    g = (0.3 / (1 + np.exp(-z))).T @ r / y.size
    off = ~np.eye(14, dtype=bool)
    violation = np.where(f.A != 0, np.abs(g + f.lam * np.sign(f.A)), np.maximum(np.abs(g) - f.lam, 0))[off]
    assert violation.max() <= 1e-6 * f.lam_max and abs(r.mean(0)).max() / 14 <= 1e-9


def test_lam_max_is_where_the_first_coupling_enters():
    z, y, _ = planted_logits(2000, 6, 6, seed=2)
    top = coupling_path(z, y, lams=1.)[0].lam_max
    above, below = (coupling_path(z, y, lams=top * s)[0].nonzero for s in (1.0001, 0.99))
    assert above == 0 and below >= 1


def test_warm_path_equals_cold_fits():
    z, y, _ = planted_logits(2000, 6, 6, seed=4)
    for f in coupling_path(z, y, n_lams=8)[1::3]: assert np.allclose(f.A, coupling_path(z, y, lams=f.lam)[0].A, atol=1e-5)


def test_masked_targets_equal_dropped_rows():
    z, y, _ = planted_logits(2000, 4, 4, seed=6)
    masked = y.copy()
    masked[1500:] = np.nan
    dropped = coupling_path(z[:1500], y[:1500], lams=1e-3)[0]
    assert np.allclose(coupling_path(z, masked, lams=1e-3)[0].A, dropped.A, atol=1e-6)


def test_planted_couplings_and_placebo():
    z, y, truth = planted_logits(50_000, seed=11)
    f = fit_couplings(z, y, '1se_level', groups=np.arange(50_000) // 5)
    assert f.nonzero <= 22 and (np.sign(f.A) == np.sign(truth))[truth != 0].all()
    assert fit_couplings(z, np.random.default_rng(1).permutation(y)).nonzero <= 1


def test_constant_label_and_rare_label_receive_nothing():
    z, y, _ = planted_logits(1000, 5, 6, seed=7)
    y[:, 1], y[:, 2] = 0, 0
    y[:4, 2] = 1
    y[:, 3] = np.nan
    f = fit_couplings(z, y, labels=list('abcde'))
    assert_sound(f)
    assert f.skipped == ['b', 'c', 'd'] and not f.A[:, 1:4].any() and not f.bias[1:4].any()
    assert np.array_equal(f.refine(z)[:, 1:4], z[:, 1:4])


def test_all_labels_constant():
    z = np.random.default_rng(0).normal(size=(100, 3))
    f = fit_couplings(z, np.zeros((100, 3)))
    assert_sound(f)
    assert f.nonzero == 0 and f.skipped == [0, 1, 2]


def test_collinear_labels():
    z, y, _ = planted_logits(3000, 5, 6, seed=8)
    z[:, 4] = z[:, 3]
    y[:, 4] = y[:, 3]
    for lam in (1e-3, 1e-6):
        f = coupling_path(z, y, lams=lam)[0]
        assert_sound(f)
        assert f.kkt <= 1e-6


def test_constant_logits():
    z, y, _ = planted_logits(1000, 4, 4, seed=9)
    z[:, 2] = 0.7
    f = coupling_path(z, y, lams=1e-5)[0]
    assert_sound(f)
    assert not f.A[2].any()


@pytest.mark.parametrize('share', [0.01, 1.])
@pytest.mark.parametrize('message', ['prob', 'logit'])
def test_extreme_logits(share, message):
    z, y, _ = planted_logits(1000, 4, 4, seed=10)
    hit = np.random.default_rng(0).random(z.shape) < share
    z = np.where(hit, np.sign(z) * 1e4, z)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for f in (coupling_path(z, y, lams=1e-3, message=message)[0], fit_couplings(z, y, message=message, n_lams=8)):
            assert_sound(f)
            assert np.isfinite(f.refine(z)).all()


def test_rows_with_nan_logits_are_left_out():
    z, y, _ = planted_logits(1000, 4, 4, seed=12)
    holed = z.copy()
    holed[::10, 1] = np.nan
    rows = ~np.isnan(holed).any(1)
    assert np.array_equal(fit_couplings(holed, y, lam=1e-3).A, fit_couplings(z[rows], y[rows], lam=1e-3).A)
    assert_sound(fit_couplings(holed, y, groups=np.arange(1000) // 3))
    with pytest.raises(DataError, match='nothing to fit'): fit_couplings(np.full_like(z, np.nan), y)


def test_one_label():
    z, y, _ = planted_logits(500, 3, 2, seed=13)
    f = fit_couplings(z[:, :1], y[:, :1])
    assert_sound(f)
    assert f.A.shape == (1, 1) and f.nonzero == 0
    assert len(stable_edges(z[:, :1], y[:, :1], n_pairs=2)) == 0


def test_two_hundred_labels():
    z, y, truth = planted_logits(1000, 200, 20, seed=14)
    f = coupling_path(z, y, lams=1e-5)[0]
    assert_sound(f)
    assert f.A.shape == (200, 200) and f.kkt <= 1e-6 and 0 < f.nonzero < 10_000


def test_fewer_patients_than_folds():
    z, y, _ = planted_logits(40, 3, 2, seed=15)
    with pytest.raises(DataError, match='n_splits=5 is more than the 4 patients: use n_splits=4'):
        fit_couplings(z, y, groups=np.arange(40) // 10)
    with pytest.raises(DataError, match='one patient cannot'): fit_couplings(z, y, groups=np.zeros(40))


@pytest.mark.parametrize('bad,match', [
    (dict(logits=np.zeros((4, 2))), 'one shape'),
    (dict(targets=np.full((40, 3), -1.)), 'other than 0, 1'),
    (dict(lam='best'), 'min'),
    (dict(lam=-1.), 'not negative'),
    (dict(lam=float('nan')), 'not negative'),
    (dict(message='x'), 'message'),
    (dict(labels=['a']), 'names'),
    (dict(groups=[1, 2]), 'groups'),
    (dict(groups=[None] * 40), 'no group'),
])
def test_bad_arguments_are_refused(bad, match):
    z, y, _ = planted_logits(40, 3, 2, seed=16)
    with pytest.raises(DataError, match=match): fit_couplings(**{**dict(logits=z, targets=y), **bad})


def test_patients_stay_together_and_the_rule_is_the_definition():
    z, y, _ = planted_logits(3000, 5, 5, seed=17)
    cv = cv_couplings(z, y, groups=np.arange(3000) // 6)
    best = cv.loss.idxmin()
    assert cv.attrs['1se'] == cv.lam[cv.loss <= cv.loss[best] + cv.se_change].max()
    assert cv.attrs['1se_level'] == cv.lam[cv.loss <= cv.loss[best] + cv.se[best]].max()
    assert cv.attrs['min'] == cv.lam[best] and cv.se_change[best] == 0
    twice = cv_couplings(np.tile(z, (2, 1)), np.tile(y, (2, 1)), groups=np.tile(np.arange(3000) // 6, 2))
    assert np.allclose(twice.se[:len(cv)], cv.se[:len(twice)], rtol=0.05)


def sparse_findings(n, dependence, seed):
    "Fourteen findings as rare as NIH's, of two shared causes, each with evidence of its own at an AUC of 0.75: logits, targets, patients"
    rng = np.random.default_rng(seed)
    share = np.array([.103, .025, .119, .177, .052, .057, .013, .047, .042, .021, .022, .015, .030, .002])
    weights = np.zeros((14, 2))
    weights[:7, 0] = weights[4:, 1] = dependence
    own = np.sqrt(1 - (weights**2).sum(1))
    x = rng.normal(size=(n, 2)) @ weights.T + rng.normal(size=(n, 14)) * own
    y = (x < norm.ppf(share)).astype(float)
    d = np.sqrt(2) * norm.ppf(.75)
    z = d * (d * y + rng.normal(size=y.shape)) - d**2 / 2 + np.log(share / (1 - share))
    return z, y, np.arange(n) // 3


def gains(dependence, seed, n=8000):
    "By rule: couplings, and what they add to the macro AUC of as many new films again, twice"
    z, y, patients = sparse_findings(3 * n, dependence, seed)
    old, new = slice(n), slice(n, None)
    cv, before = cv_couplings(z[old], y[old], patients[old], scale=True), macro_auc(y[new], z[new]).macro
    fits = {rule: fit_chosen(z[old], y[old], cv, rule, scale=True) for rule in ('1se', 'min', '1se_level')}
    return {rule: (f.nonzero, macro_auc(y[new], f.refine(z[new])).macro - before) for rule, f in fits.items()}


def test_the_paired_rule_keeps_the_gain_of_the_minimum_and_nothing_where_there_is_nothing():
    there = [gains(.5, seed) for seed in range(3)]
    gain = {rule: np.mean([g[rule][1] for g in there]) for rule in there[0]}
    assert gain['min'] > .002 and gain['1se'] > .7 * gain['min'] and gain['1se_level'] < .2 * gain['min'], gain
    none = [gains(0, seed, 4000) for seed in range(4)]
    assert np.mean([g['1se'][0] for g in none]) <= 1 and max(abs(g['1se'][1]) for g in none) < 5e-4, none


def test_same_seed_same_answer():
    z, y, _ = planted_logits(1000, 5, 5, seed=18)
    assert np.array_equal(fit_couplings(z, y).A, fit_couplings(z, y).A)


@pytest.mark.parametrize('bias,scale', [(True, False), (False, True)])
def test_symmetric_objective_equals_a_general_solver(bias, scale):
    "One value a pair: scipy's L-BFGS-B on W+ and W- of the upper triangle"
    z, y, _ = planted_logits(600, n_labels=4, n_edges=5, size=(2., 5.), seed=3)
    lam = 0.1 * coupling_path(z, y, bias=bias, scale=scale, symmetric=True, n_lams=1)[0].lam_max
    fit = coupling_path(z, y, lams=lam, bias=bias, scale=scale, symmetric=True)[0]
    i, j = np.triu_indices(4, 1)
    M, P = 0.3 / (1 + np.exp(-z)), len(i)

    def f(v):
        W = np.zeros((4, 4))
        W[i, j] = v[:P] - v[P:2*P]
        b, s = v[2*P:2*P + 4], v[2*P + 4:]
        eta = z * s + b + M @ (W + W.T)
        r = (1 / (1 + np.exp(-eta)) - y) / y.size
        G = M.T @ r
        G = (G + G.T)[i, j]
        loss = (np.logaddexp(0, eta) - y * eta).mean() + 2 * lam * v[:2*P].sum()
        return loss, np.r_[G + 2 * lam, 2 * lam - G, r.sum(0), (r * z).sum(0)]
    bounds = [(0, None)] * 2 * P + [(None, None) if bias else (0, 0)] * 4 + [(None, None) if scale else (1, 1)] * 4
    options = dict(maxiter=20000, maxfun=50000, ftol=1e-16, gtol=1e-12)
    best = minimize(f, np.r_[np.zeros(2*P + 4), np.ones(4)], jac=True, method='L-BFGS-B', bounds=bounds, options=options).fun
    assert (fit.A == fit.A.T).all() and 0 < fit.nonzero < 12
    assert fit.loss + lam * np.abs(fit.A).sum() == pytest.approx(best, rel=1e-9)


def test_symmetric_fit_with_a_rare_label_and_masked_targets():
    z, y, _ = planted_logits(800, n_labels=4, n_edges=5, size=(2., 5.), seed=4)
    y[:, 3] = 0
    y[:2, 3] = 1
    y[::7, 1] = np.nan
    fit = fit_couplings(z, y, symmetric=True, groups=np.arange(800) // 2)
    assert np.isfinite(fit.A).all() and (fit.A[:, 3] == 0).all() and fit.skipped == [3] and fit.kkt <= 1e-6 * fit.lam_max
