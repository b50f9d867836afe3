"""Controls of couplings: one table, bad input, planted couplings."""
import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import cxrlg.controls as room
from cxrlg import corrections
from cxrlg.controls import MARGINS, NO_COUPLING, confirm, coupling_controls, coupling_power, natural_films
from cxrlg.corrections import CORRECTIONS, Outputs, cross_fit
from cxrlg.core import DataError
from cxrlg.eval import holm, macro_auc, simulate
from cxrlg.graph import planted_logits


@pytest.fixture(scope='module')
def out(four_findings): return four_findings


def test_the_table_is_the_mean_over_folds_and_seeds(out):
    c = coupling_controls(out, arms=('scale', 'stacking'), n_boot=200, bar=False)
    t = c.table[c.table.metric == 'auc'].set_index('arm')
    def auc(z):
        cells = [(s, out.folds == k, j) for s in range(2) for k in range(3) for j in range(4)]
        return np.mean([roc_auc_score(out.targets[here, j], z[s, here, j]) for s, here, j in cells])
    assert t.before['stacking'] == pytest.approx(auc(out.logits), abs=1e-12)
    assert t.change['stacking'] == pytest.approx(auc(c.scores['stacking']) - auc(out.logits), abs=1e-12)
    assert (t.loc['scale', ['change', 'low', 'high', 'seed_sd']] == 0).all() and t.verdict['scale'] == 'equivalent'
    cells = c.folds[c.folds.arm == 'stacking']
    assert len(cells) == 6 and t.up['stacking'] == f'{(cells.change > 0).sum()} of 6'
    assert t.seed_sd['stacking'] == pytest.approx(cells.groupby('seed').change.mean().std(ddof=1))


def test_trained_arms_stand_in_the_same_table(out):
    better = out.logits + .8*(out.targets - .5)
    with_arm = Outputs(out.targets, out.logits, out.patients, out.folds, out.labels, dict(prox=better))
    c = coupling_controls(with_arm, arms=('scale',), n_boot=200, bar=False)
    t = c.table[c.table.metric == 'auc'].set_index('arm')
    assert list(t.index) == ['prox', 'scale'] and t.verdict['prox'] == 'better' and t.low['prox'] > MARGINS['auc']


def test_refusals(out):
    parts = dict(targets=out.targets, logits=out.logits, patients=out.patients, folds=out.folds, labels=out.labels)
    with pytest.raises(DataError, match='must agree'): Outputs(**parts | dict(logits=out.logits[:, :5]))
    with pytest.raises(DataError, match='one a film'): Outputs(**parts | dict(patients=out.patients[:5]))
    with pytest.raises(DataError, match='two folds'): cross_fit(Outputs(**parts | dict(folds=out.folds*0)), 'scale')
    with pytest.raises(DataError, match='no correction'): coupling_controls(out, arms=['x'])
    with pytest.raises(DataError, match='locked patients are in the folds'):
        confirm(out, out.targets, out.logits[:, None], out.patients)


def test_arms_of_other_seeds_are_refused(out):
    with pytest.raises(DataError, match='arm prox has logits of shape'):
        Outputs(out.targets, out.logits, out.patients, out.folds, out.labels, dict(prox=out.logits[:1]))


def test_lower_is_better_for_the_brier_score():
    y, z, patients = simulate(300, [.3, .2], 1.5, seed=1)
    out = Outputs(y, z, patients, patients % 3, ['A', 'B'], dict(worse=z[None] + 3))
    t = coupling_controls(out, arms=(), metrics=('brier', 'log_loss'), n_boot=100, bar=False).table
    assert (t.change > .01).all() and (t.verdict == 'worse').all() and (t.up == '0 of 3').all()
    with pytest.raises(DataError, match="no metric 'breir'; did you mean 'brier'"):
        coupling_controls(out, arms=(), metrics=('breir',), n_boot=10, bar=False)
    with pytest.raises(DataError, match="no correction 'prox'"):
        confirm(out, y, z[None, None], patients + 10**6, arms=['prox'])


def test_planted_couplings_are_found_where_they_are_strong_and_their_gain_is_not_exceeded():
    y, z, patients = simulate(900, [.3, .2, .15, .25], 1.5, seed=4)
    out = Outputs(y, z, patients, patients % 3, list('ABCD'))
    t = coupling_power(out, sizes=(0, 6), n_edges=3, draws=2, n_boot=100, bar=False)
    assert len(t) == 12 and set(t['size']) == {0, 6} and t.found[t.arm == 'ridge'].isna().all()
    nothing, strong = t[t['size'] == 0], t[t['size'] == 6]
    assert (nothing.truth == 0).all() and not nothing.better.any() and (nothing.found.dropna() == 0).all()
    assert strong.better.all() and (strong.found.dropna() > 2).all()
    assert (strong.change < strong.truth + .01).all() and (strong.truth > .02).all()
    assert t.equals(coupling_power(out, sizes=(0, 6), n_edges=3, draws=2, n_boot=100, bar=False))
    with pytest.raises(DataError, match='13 couplings cannot be planted between 4 findings'): coupling_power(out, n_edges=13)
    with pytest.raises(DataError, match='at least one of each'): coupling_power(out, draws=0)
    with pytest.raises(DataError, match="no correction 'lasso'"): coupling_power(out, arms=('lasso',))


def test_labels_are_drawn_from_the_planted_couplings():
    y, z, patients = simulate(4000, [.3, .2, .15, .25], 1.5, seed=4)
    y[:50, 1] = np.nan
    planted, A = room._plant(Outputs(y, z, patients, patients % 3, list('ABCD')), [0, 1, 2], 5., 2, 7)
    assert (A != 0).sum() == 2 and set(np.abs(A[A != 0])) == {5.}
    assert not A[3].any() and not A[:, 3].any() and not A.diagonal().any()
    assert np.isnan(planted.targets[:50, 1]).all() and not np.isnan(planted.targets[50:]).any()
    known = planted.targets[50:]
    assert np.allclose(known.mean(0), expit(planted.arms['truth'][0][50:]).mean(0), atol=.03)


# every control can fail

def planted(n=3000):
    z, y, truth = planted_logits(n, n_labels=5, n_edges=4, size=(6, 9), seed=3)
    return Outputs(y, z, np.arange(n) // 4, np.arange(n) // 4 % 3, list('ABCDE'))


def row(out, arm, **how):
    t = coupling_controls(out, arms=(arm,), metrics=('auc',), n_boot=200, bar=False, **how).table
    return t.set_index('arm').loc[arm]


def test_the_placebo_fails_when_its_labels_still_know_the_other_logits(monkeypatch):
    "A permutation that moves nothing is a leak: the placebo then says 'better', as it says of nothing else"
    calm, out = row(planted(), 'placebo', n_placebo=2), planted()
    assert calm.verdict != 'better' and calm.change < .003
    monkeypatch.setattr(corrections, 'permute_labels', lambda z, y, seed: y)
    leak = row(out, 'placebo', n_placebo=2)
    assert leak.verdict == 'better' and leak.change > .005 and leak.edges > 2


def test_the_zero_of_scale_fails_when_films_are_ordered_anew(monkeypatch):
    "A 'scale' that adds another finding's logit is seen at once"
    out = planted()
    assert row(out, 'scale').change == 0
    fit = CORRECTIONS['scale']
    def mixed(z, y, groups, seed=42):
        apply, fitted = fit(z, y, groups)
        return lambda new: apply(new) + .5 * np.roll(new, 1, -1), fitted
    monkeypatch.setitem(CORRECTIONS, 'scale', mixed)
    assert row(out, 'scale').verdict == 'worse'


@pytest.mark.parametrize('arm', ['couplings', 'couplings_min', 'logit', 'symmetric', 'chosen', 'stacking', 'ridge', 'ising'])
def test_each_rival_gains_where_findings_go_together_and_nothing_where_they_do_not(arm):
    "Labels of two shared causes, evidence of each finding its own; then each label drawn by itself"
    rng = np.random.default_rng(0)
    cause = rng.random((9000, 2)) < .3
    linked = (rng.random((9000, 4)) < np.where(cause[:, [0, 0, 1, 1]], .6, .08)).astype(float)
    alone, whose = np.column_stack([rng.permutation(c) for c in linked.T]), np.arange(9000) // 3
    there, nothing = (natural_films(y, whose, [.75] * 4, list('ABCD'), 3000, seed=1) for y in (linked, alone))
    assert row(there, arm).verdict == 'better' and row(nothing, arm).verdict != 'better'


def test_natural_films_reach_what_their_own_evidence_allows():
    "The ceiling is that of the exact posterior: above the own evidence, and below it nothing is drawn"
    rng = np.random.default_rng(0)
    first = rng.random(6000) < .3
    y = np.c_[first, rng.random(6000) < np.where(first, .7, .1)].astype(float)
    out = natural_films(y, np.arange(6000) // 2, [.6, .8], ['a', 'b'], 20_000, seed=2)
    own, every = macro_auc(out.targets, out.logits[0]).auc, macro_auc(out.targets, out.arms['truth'][0]).auc
    assert np.allclose(own, [.6, .8], atol=.01)
    odds = y.mean(0) / (1 - y.mean(0))
    likely = np.exp(out.logits[0]) / odds # likelihood ratio of each finding's evidence
    p = np.array([[((y == (i, j)).all(1)).mean() for j in (0, 1)] for i in (0, 1)])
    a, b = (np.c_[np.ones(len(likely)), likely[:, j]] for j in (0, 1))
    joint = p * a[:, :, None] * b[:, None, :]
    exact = joint[:, 1].sum(1) / joint.sum((1, 2))
    assert np.allclose(exact, expit(out.arms['truth'][0][:, 0]), atol=1e-6) and every.iloc[0] > own.iloc[0] + .05


def test_an_empty_graph_is_no_finding_and_outside_the_family():
    rng = np.random.default_rng(0)
    z = rng.normal(-1, 1.5, (1500, 3))
    out = Outputs((rng.random(z.shape) < expit(z)).astype(float), z, np.arange(1500), np.arange(1500) % 3, list('ABC'))
    t = coupling_controls(out, arms=('scale', 'couplings', 'ridge'), metrics=('auc', 'log_loss'), n_boot=200, bar=False).table
    empty = t[t.arm == 'couplings']
    assert (empty.edges == 0).all() and (empty.verdict == NO_COUPLING).all() and empty[['p_holm', 'p_equal_holm']].isna().all(axis=None)
    others = t[(t.metric == 'auc') & (t.arm != 'couplings')]
    assert np.array_equal(others.p_holm, holm(others.p)) # a family of two


def test_the_layers_own_change_is_after_minus_before(out):
    before = dict(prox=out.logits, idle=out.logits)
    arms = dict(prox=out.logits + .8 * (out.targets - .5), idle=out.logits + 1e-6)
    both = Outputs(out.targets, out.logits, out.patients, out.folds, out.labels, arms, before=before)
    t = coupling_controls(both, arms=('scale',), n_boot=50, bar=False).table.set_index(['metric', 'arm'])
    assert t.own_change['auc', 'prox'] == pytest.approx(t.change['auc', 'prox'], abs=1e-12) and t.layer['auc', 'prox'] == 'layer acts'
    assert t.layer['auc', 'idle'] == 'layer inactive' and abs(t.own_change['auc', 'idle']) < 1e-5 and t.up['auc', 'idle'] == '0 of 6'
    assert t.layer['auc', 'scale'] == '' and np.isnan(t.own_change['ap', 'prox'])
