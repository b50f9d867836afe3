"What adding the other findings' evidence does: heads that share nothing, evidence or noise, and input that cannot be used."
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxrlg.core import DataError
from cxrlg.evidence import _own_evidence, _strength, evidence_test, separated
from cxrlg.headroom import draw_evidence, headroom, label_rows

FAST = dict(draws=2, n_boot=100)


def coupled(n, seed):
    rng = np.random.default_rng(seed)
    return (1.5 * rng.normal(size=(n, 1)) + rng.normal(size=(n, 4)) > 1.2).astype(float)


@pytest.fixture(scope='module')
def films():
    y = coupled(2400, 1)
    return y, draw_evidence(y, .8, np.random.default_rng(2)), np.arange(2400) // 2, np.arange(2400) // 2 % 3


@pytest.mark.parametrize('degree', [1, 2])
def test_heads_that_share_nothing_gain_what_the_ceiling_says(films, degree):
    y, e, patients, folds = films
    t = evidence_test(y, 2 * e - 1, patients, folds, coupled(20_000, 3), degree, **FAST)
    assert abs(t.value['added'] - headroom(coupled(50_000, 4), .8, n_boot=0).gain['macro']) < .015
    assert t.low['added'] > 0 and t.low['shortfall'] < 0 < t.high['shortfall']
    assert t.low['strength'] < 1.05 and t.value['strength'] > .75 and t.low['strength_shortfall'] < 0 < t.high['strength_shortfall']


@pytest.mark.parametrize('how', ['evidence', 'noise'])
def test_heads_that_share_something_fall_short_whatever_it_is(films, how):
    y, e, patients, folds = films
    known = label_rows(coupled(50_000, 3))
    z = known.posterior(e) if how == 'evidence' else e + 1.5 * np.random.default_rng(4).normal(size=(len(y), 1))
    t = evidence_test(y, z, patients, folds, coupled(20_000, 3), **FAST)
    assert t.low['shortfall'] > 0 and t.low['strength_shortfall'] > 0 and t.value['added'] < t.value['separate']


def test_the_prior_is_the_other_folds_where_none_is_given(films):
    y, e, patients, folds = films
    t = evidence_test(y, e, patients, folds, **FAST)
    assert t.low['added'] > 0 and t.attrs['judged'] == [0, 1, 2, 3]


def test_seeds_are_averaged(films):
    y, e, patients, folds = films
    one, two = (evidence_test(y, z, patients, folds, **FAST) for z in (e, np.array([e, e])))
    rows = ['own', 'added', 'strength']
    pd.testing.assert_frame_equal(one.loc[rows], two.loc[rows])


def test_calibration_is_of_the_other_folds_and_says_nothing_of_rare_findings(films):
    y, e, _, folds = films
    rare = np.column_stack([y, np.arange(len(y)) < 3]).astype(float)
    own = _own_evidence(rare, np.column_stack([e, e[:, 0]]), folds, 1)
    assert (own[:, 4] == 0).all()
    changed = rare.copy()
    changed[folds == 0] = 1 - changed[folds == 0]
    assert np.allclose(_own_evidence(changed, np.column_stack([e, e[:, 0]]), folds, 1)[folds == 0, :4], own[folds == 0, :4])
    assert abs(np.polyfit(e[:, 0], own[:, 0], 1)[0] - 1) < .15


def test_exchanged_logits_keep_every_auc_of_every_fold(films):
    y, e, _, folds = films
    y = np.where(np.random.default_rng(5).random(y.shape) < .1, np.nan, y)
    apart = separated(e, y, folds, np.random.default_rng(6))
    for j in range(4):
        for k in range(3):
            ok = (folds == k) & ~np.isnan(y[:, j])
            assert roc_auc_score(y[ok, j], e[ok, j]) == roc_auc_score(y[ok, j], apart[ok, j])
    assert not np.array_equal(e, apart)


def test_the_strength_counts_patients():
    rng = np.random.default_rng(0)
    e, m = rng.normal(size=(2, 1500, 3))
    y = (rng.random(e.shape) < 1 / (1 + np.exp(1 - e - .5 * m))).astype(float)
    t, by = _strength(y, e, m, np.arange(1500))
    same, patients = _strength(*(np.repeat(x, 4, axis=0) for x in (y, e, m)), np.repeat(np.arange(1500), 4))
    assert abs(t - .5) < 4 * np.sqrt(by @ by) and abs(t - same) < 1e-4
    assert abs(np.sqrt(patients @ patients) / np.sqrt(by @ by) - 1) < 1e-3


@pytest.mark.parametrize('change, says', [
    (lambda y, z, p, f: dict(logits=z[:-1]), 'must agree'),
    (lambda y, z, p, f: dict(folds=f[:-1]), 'must agree'),
    (lambda y, z, p, f: dict(patients=p[:-1]), 'give one a film'),
    (lambda y, z, p, f: dict(folds=0 * f), 'two folds'),
    (lambda y, z, p, f: dict(logits=np.where(z > 3, np.nan, z)), 'no finite numbers'),
    (lambda y, z, p, f: dict(prior=y[:, :2]), 'prior has 2 findings'),
    (lambda y, z, p, f: dict(degree=3), 'linear'),
    (lambda y, z, p, f: dict(min_pos=2000), 'lower min_pos'),
    (lambda y, z, p, f: dict(targets=y + 1), 'other than 1, 0 or NaN'),
])
def test_what_cannot_be_used_is_refused_in_one_line(films, change, says):
    given = dict(zip(('targets', 'logits', 'patients', 'folds'), films))
    with pytest.raises(DataError, match=says) as e: evidence_test(**given | change(*films), **FAST)
    assert '\n' not in str(e.value)
