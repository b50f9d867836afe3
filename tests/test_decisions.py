"""Net benefit and gaps: figures by hand, intervals that hold the truth, patients in both groups, small groups left out."""
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from cxrlg.calibration import operating_points
from cxrlg.core import DataError
from cxrlg.decisions import decision_curves, group_gaps
from cxrlg.eval import delong, simulate


@pytest.fixture(scope='module')
def films():
    y, z, patients = simulate(500, [.05, .3], [1.5, 1.5], seed=2)
    return y, expit(z).astype(float), patients


def benefit(y, p, t): return ((p >= t) & (y == 1)).mean() - ((p >= t) & (y == 0)).mean() * t / (1 - t)


def test_net_benefit_of_films_whose_label_is_known(films):
    y, p, patients = films
    y = y.copy()
    y[:50, 1] = np.nan
    t = decision_curves(y, p, patients, [.3, .1], labels=['a', 'b'], n_boot=20).set_index(['label', 'threshold'])
    for at in (.1, .3):
        assert t.net_benefit['a', at] == pytest.approx(benefit(y[:, 0], p[:, 0], at), abs=1e-12)
        assert t.net_benefit['b', at] == pytest.approx(benefit(y[50:, 1], p[50:, 1], at), abs=1e-12)
        every = benefit(y[:, 0], np.ones(len(y)), at)
        assert t.treat_all['a', at] == pytest.approx(every) and t.gain['a', at] == pytest.approx(t.net_benefit['a', at] - max(every, 0))


def test_the_band_is_that_of_resampled_patients(films):
    y, p, patients = films
    t = decision_curves(y, p, patients, [.2], n_boot=300).iloc[1]
    rng, drawn = np.random.default_rng(5), []
    rows = [np.flatnonzero(patients == k) for k in range(500)]
    for _ in range(300):
        k = np.concatenate([rows[i] for i in rng.integers(500, size=500)])
        drawn.append(benefit(y[k, 1], p[k, 1], .2))
    assert np.quantile(drawn, [.025, .975]) == pytest.approx([t.low, t.high], abs=.006)


def test_a_label_with_one_class_has_no_curve(films):
    y, p, patients = films
    y = np.column_stack([y[:, 0], np.zeros(len(y))])
    assert set(decision_curves(y, p, patients, labels=['a', 'b'], n_boot=5).label) == {'a'}
    assert (
        len(decision_curves(y * 0, p, patients, n_boot=5)) == 0
        and len(group_gaps(y * 0, p, patients, pd.DataFrame(dict(g=patients % 2)))) == 0
    )


@pytest.mark.parametrize('thresholds', [[0], [1.], []])
def test_thresholds_lie_within(films, thresholds):
    with pytest.raises(DataError, match='between 0 and 1'): decision_curves(*films, thresholds)


def test_logits_are_refused(films):
    y, p, patients = films
    with pytest.raises(DataError, match='through the sigmoid first'): decision_curves(y, p * 9 - 4, patients)


def test_gaps_hold_the_truth():
    "Two groups with the same model: the interval of the gap holds 0 as often as it says, with films of one patient in both"
    held = []
    for seed in range(60):
        y, z, patients = simulate(200, [.3], [1.2], seed)
        view = np.random.default_rng(seed).choice(['AP', 'PA'], len(y))
        t = group_gaps(y, z, patients, pd.DataFrame(dict(view=view)), patients % 2)
        held += ((t.low <= 0) & (0 <= t.high)).tolist()
    assert len(held) == 120 and .9 <= np.mean(held) <= .99


def test_groups_without_common_patients_are_delongs(films):
    y, p, patients = films
    sex = np.where(patients % 3, 'F', 'M')
    t = group_gaps(y, p, patients, pd.DataFrame(dict(sex=sex)), labels=['a', 'b']).set_index(['measure', 'label']).loc['AUC']
    f, m = (delong(y[sex == s], p[sex == s], clusters=patients[sex == s], labels=['a', 'b']) for s in 'FM')
    np.testing.assert_allclose(t.gap, m.auc - f.auc, atol=1e-12)
    np.testing.assert_allclose(t.high - t.gap, (t.high - t.low) / 2)
    assert (t.against == 'F').all() and (t.p_holm >= t.p).all()


def test_small_groups_and_rare_labels_are_left_out(films):
    y, p, patients = films
    group = np.where(patients < 20, 'few', np.where(patients % 2, 'a', 'b'))
    t = group_gaps(y, p, patients, pd.DataFrame(dict(group=group, alone='x')), labels=['rare', 'often'], min_pos=40)
    assert set(t.variable) == {'group'} and set(t.value) | set(t.against) == {'a', 'b'} and 'often' in set(t.label)


def test_operating_points_have_intervals_of_patients(films):
    y, p, patients = films
    t = operating_points(y, p, patients % 3, patients=patients, n_boot=300).set_index(['label', 'rule'])
    alone = operating_points(y, p, patients % 3).set_index(['label', 'rule'])
    pd.testing.assert_frame_equal(t[list(alone)], alone)
    for share in ('sensitivity', 'specificity', 'ppv', 'npv'):
        assert (t[f'{share}_low'] <= t[share]).all() and (t[share] <= t[f'{share}_high']).all()
    wide = operating_points(y[:200], p[:200], patients=patients[:200], n_boot=300).set_index(['label', 'rule'])
    row = ('label 1', 'specificity 0.9')
    assert wide.sensitivity_high[row] - wide.sensitivity_low[row] > t.sensitivity_high[row] - t.sensitivity_low[row]


def test_a_sensitivity_of_one_is_not_certain():
    y, p = np.repeat([0., 1], 40), np.repeat([.1, .9], 40)
    t = operating_points(y, p, patients=np.arange(80), n_boot=50)
    assert (t.sensitivity == 1).all() and t.sensitivity_low.between(.9, .95).all() and (t.sensitivity_high == 1).all()


def test_one_patient_says_nothing_about_net_benefit(films):
    y, p, patients = films
    t = decision_curves(y, p, np.zeros(len(y)), n_boot=20)
    assert t.net_benefit.notna().all() and t[['low', 'high', 'gain_low', 'gain_high']].isna().all(axis=None)


def test_arguments_that_cannot_be_used(films):
    y, p, patients = films
    groups = pd.DataFrame(dict(sex=np.where(patients % 2, 'F', 'M')))
    cases = {'groups have 300 rows for': dict(groups=groups[:300]), 'groups are a Series': dict(groups=groups.sex),
             'in another order': dict(targets=pd.DataFrame(y), groups=groups[::-1]), '3 folds for': dict(folds=[0, 1, 2]),
             'level=95': dict(level=95), 'sensitivity=90': dict(sensitivity=90), 'average the seeds first': dict(probs=np.stack([p, p]))}
    for text, change in cases.items():
        with pytest.raises(DataError, match=text): group_gaps(**dict(targets=y, probs=p, patients=patients, groups=groups) | change)
    cases = {'average the seeds': dict(probs=np.stack([p, p])), 'n_boot=1:': dict(n_boot=1), 'level=95': dict(level=95)}
    for text, change in cases.items():
        with pytest.raises(DataError, match=text): decision_curves(**dict(targets=y, probs=p, patients=patients) | change)
