"""Controls of couplings: one table, bad input, planted couplings."""
import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import cxrlg.controls as room
from cxrlg.controls import MARGINS, confirm, coupling_controls, coupling_power
from cxrlg.corrections import Outputs, cross_fit
from cxrlg.core import DataError
from cxrlg.eval import simulate


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
    assert len(t) == 8 and set(t['size']) == {0, 6}
    nothing, strong = t[t['size'] == 0], t[t['size'] == 6]
    assert (nothing.truth == 0).all() and not nothing.better.any() and (nothing.found == 0).all()
    assert strong.better.all() and (strong.found > 2).all()
    assert (strong.change < strong.truth + .01).all() and (strong.truth > .02).all()
    assert t.equals(coupling_power(out, sizes=(0, 6), n_edges=3, draws=2, n_boot=100, bar=False))
    with pytest.raises(DataError, match='13 couplings cannot be planted between 4 findings'): coupling_power(out, n_edges=13)
    with pytest.raises(DataError, match='at least one of each'): coupling_power(out, draws=0)
    with pytest.raises(DataError, match="'stacking' fits no matrix"): coupling_power(out, arms=('stacking',))


def test_labels_are_drawn_from_the_planted_couplings():
    y, z, patients = simulate(4000, [.3, .2, .15, .25], 1.5, seed=4)
    y[:50, 1] = np.nan
    planted, A = room._plant(Outputs(y, z, patients, patients % 3, list('ABCD')), [0, 1, 2], 5., 2, 7)
    assert (A != 0).sum() == 2 and set(np.abs(A[A != 0])) == {5.}
    assert not A[3].any() and not A[:, 3].any() and not A.diagonal().any()
    assert np.isnan(planted.targets[:50, 1]).all() and not np.isnan(planted.targets[50:]).any()
    known = planted.targets[50:]
    assert np.allclose(known.mean(0), expit(planted.arms['truth'][0][50:]).mean(0), atol=.03)
