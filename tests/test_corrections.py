"""Corrections: exactness of the zero, nesting, and defined behaviour where there is nothing to fit."""
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cxrlg.corrections import CORRECTIONS, Outputs, cross_fit, fit_ridge, fit_stacking, ising_graph, permute_labels
from cxrlg.eval import simulate
from cxrlg.graph import planted_logits


@pytest.fixture(scope='module')
def out(four_findings): return four_findings


def test_scale_changes_no_auc_and_stays_in_its_fold(out):
    "Within a fold a temperature and a bias keep every order: the change of every AUC is exactly 0"
    new, fitted = cross_fit(out, 'scale')
    for s in range(2):
        for k in range(3):
            here = out.folds == k
            for j in range(4):
                y, before, after = out.targets[here, j], out.logits[s, here, j], new[s, here, j]
                assert roc_auc_score(y, after) == roc_auc_score(y, before)
    assert (new != out.logits).any() and len(fitted) == 6


@pytest.mark.parametrize('name', sorted(CORRECTIONS))
def test_a_fold_is_corrected_without_its_own_targets(out, name):
    "Nesting: changing the targets of a fold changes nothing in its own corrected logits"
    small = Outputs(out.targets, out.logits[:1], out.patients, out.folds, out.labels, context=out.context)
    here, other = out.folds == 1, np.array(out.targets)
    other[here] = 1 - other[here]
    changed = Outputs(other, out.logits[:1], out.patients, out.folds, out.labels, context=out.context)
    a, b = cross_fit(small, name)[0], cross_fit(changed, name)[0]
    assert np.array_equal(a[:, here], b[:, here])
    if name != 'scale': assert np.isfinite(b).all()


def test_placebo_destroys_the_link_and_keeps_the_label():
    z, y, A = planted_logits(8000, n_labels=6, n_edges=6, size=(6, 9), seed=1)
    y[::11, 2] = np.nan
    new = permute_labels(z, y, seed=3)
    assert np.array_equal(np.sort(new, 0), np.sort(y, 0), equal_nan=True)
    assert abs(roc_auc_score(y[:, 0], z[:, 0]) - roc_auc_score(new[:, 0], z[:, 0])) < .01
    assert CORRECTIONS['couplings'](z, y, np.arange(8000))[1].nonzero >= 5
    few = [CORRECTIONS['couplings'](z, permute_labels(z, y, seed), np.arange(8000))[1].nonzero for seed in range(3, 7)]
    assert np.mean(few) <= 2.5, few


def test_ising_pseudo_likelihood_without_penalty_is_the_log_odds_ratio():
    rng = np.random.default_rng(0)
    a = rng.random(3000) < .4
    b = rng.random(3000) < np.where(a, .5, .2)
    W = ising_graph(np.c_[a, b].astype(float), lam=0.).A
    t = pd.crosstab(a, b).to_numpy()
    assert W[0, 1] == pytest.approx(np.log(t[0, 0]*t[1, 1]/t[0, 1]/t[1, 0]), abs=1e-5) and W[0, 1] == W[1, 0]


def test_stacking_without_penalty_is_a_logistic_regression():
    z, y, _ = planted_logits(3000, n_labels=3, n_edges=3, seed=2)
    apply, _ = fit_stacking(z, y, np.arange(3000), Cs=(1e8,))
    ref = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(z, y[:, 1]).decision_function(z)
    assert apply(z)[:, 1] == pytest.approx(ref, abs=1e-3)


def test_ridge_beside_its_offset_is_the_penalised_optimum_and_nothing_without_it():
    "Beside scipy's BFGS on the same objective; with an infinite penalty the own logit is only rescaled"
    z, y, _ = planted_logits(1200, n_labels=3, n_edges=3, size=(4, 6), seed=2)
    apply, coef = fit_ridge(z, y, np.arange(1200), Cs=(.01,))
    own, X = CORRECTIONS['scale'](z, y, np.arange(1200))[0](z), (z - z.mean(0)) / z.std(0)
    def cost(b):
        eta = own[:, 1] + X[:, [0, 2]] @ b[:2] + b[2]
        return (np.logaddexp(0, eta) - y[:, 1] * eta).sum() + b[:2] @ b[:2] / .02
    best = minimize(cost, np.zeros(3), method='BFGS', options=dict(gtol=1e-8)).x
    assert np.allclose(coef[1], [best[0], 0, best[1]], atol=1e-4)
    assert np.allclose(apply(z)[:, 1], own[:, 1] + X[:, [0, 2]] @ best[:2] + best[2], atol=1e-3)
    assert np.array_equal(fit_ridge(z, y, np.arange(1200), Cs=(0.,))[0](z), own)


def test_ridge_loses_little_where_there_is_nothing():
    "The own logit is not learned again: what is lost by trying is small"
    y, z, patients = simulate(900, [.1, .05, .04, .08, .06], 1., seed=2)
    half = patients % 2 == 0
    before, lost = np.mean([roc_auc_score(a, b) for a, b in zip(y[~half].T, z[~half].T)]), {}
    for name in ('ridge', 'stacking'):
        new = CORRECTIONS[name](z[half].astype(float), y[half], patients[half])[0](z[~half])
        lost[name] = before - np.mean([roc_auc_score(a, b) for a, b in zip(y[~half].T, new.T)])
    assert abs(lost['ridge']) < .005 and lost['ridge'] <= lost['stacking'] + .001, lost


@pytest.mark.parametrize('change', ['constant label', 'three positives', 'collinear logits', 'huge logits', 'unknown targets', 'one label'])
def test_every_correction_is_finite_on_hard_input(change):
    y, z, patients = simulate(150, [.3, .2, .25], 1.5, seed=6)
    z = z.astype(float)
    if change == 'constant label': y[:, 0] = 0
    if change == 'three positives': y[:, 0] = np.arange(len(y)) < 3
    if change == 'collinear logits': z[:, 1] = z[:, 0]
    if change == 'huge logits': z = z*1e4
    if change == 'unknown targets': y[::3, 1] = np.nan
    if change == 'one label': z, y = z[:, :1], y[:, :1]
    view = np.where(patients < 10, 'few', np.where(patients % 2, 'AP', 'PA'))
    for name, how in CORRECTIONS.items():
        seen = (view,) if getattr(how, 'needs_context', False) else ()
        apply, what = how(z, y, patients, *seen)
        assert np.isfinite(apply(z, *seen)).all(), name
        assert np.isfinite(getattr(what, 'A', np.zeros(1))).all(), name


def test_views_are_corrected_apart():
    "Scale by view equals the scale fitted to that view alone; an unseen or rare view gets the common one"
    y, z, patients = simulate(300, [.3, .2], 1.5, seed=4)
    view = np.where(patients < 10, 'few', np.where(patients % 2, 'AP', 'PA'))
    apply, fitted = CORRECTIONS['scale_by_view'](z, y, patients, view)
    new = apply(z, view)
    for v in ('AP', 'PA'):
        here = view == v
        alone = CORRECTIONS['scale'](z[here], y[here], patients[here])[0]
        assert np.array_equal(new[here], alone(z[here]))
    common = CORRECTIONS['scale'](z, y, patients)[0](z)
    assert np.array_equal(new[view == 'few'], common[view == 'few']) and set(fitted) == {'AP', 'PA'}
    assert np.array_equal(apply(z, np.full(len(z), 'new')), common)
