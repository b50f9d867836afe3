"What couplings can give: ceilings against closed forms and integrals, unknown labels, odd tables, and the time of a full-size one."
import importlib.util
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr, ndtri
from sklearn.metrics import roc_auc_score

from cxrlg.core import DataError
from cxrlg.corrections import Outputs, cross_fit
from cxrlg.data import labels_of, read_table
from cxrlg.headroom import (_weighted_auc, coupling_clause, dependence, draw_evidence, headroom, headroom_curve,
                            hierarchy, label_rows, phase_diagram, study_ceiling)

LISTS = Path(importlib.util.find_spec('torchxrayvision').origin).parent/'data'


def separation(auc): return np.sqrt(2) * ndtri(auc)


def films(shares, n=1000):
    "A table whose label vectors have these shares, in the order of the axes"
    vectors = np.argwhere(np.ones(shares.shape))
    return np.repeat(vectors, np.round(n * shares.ravel()).astype(int), axis=0)


def integrated(shares, auc, points, reach=7.):
    "Ceiling and own AUC of the first finding, by a sum over a grid of all evidence"
    x = np.linspace(-reach, reach, points)
    f = [np.exp(-(x[:, None] - d * np.array([0, 1]))**2 / 2) for d in separation(auc)]
    axes = 'ab,xa,yb->axy' if len(auc) == 2 else 'abc,xa,yb,zc->axyz'
    absent, present = np.einsum(axes, shares, *f).reshape(2, -1)
    own = np.repeat(x, points**(len(auc) - 1))
    return [_weighted_auc(s, present, absent) for s in (present / (present + absent), own)]


def coupled(n=400, L=4, seed=0, cut=1.):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 1)) + rng.normal(size=(n, L)) > cut).astype(float)


@pytest.mark.parametrize('auc', [.5, .6, .8, .99, 1.])
def test_independent_findings_add_nothing(auc):
    y = films(np.multiply.outer(np.multiply.outer([.9, .1], [.6, .4]), [.75, .25]), 2000)
    h = headroom(y, auc, n_sim=50_000, n_boot=0)
    assert h.gain.abs().max() < 1e-6
    np.testing.assert_allclose(h.own, auc, atol=.004)


@pytest.mark.parametrize('first, second', [(.6, .6), (.7, .9), (.5, .8), (.95, .55)])
def test_two_copies_of_a_finding_add_their_evidence(first, second):
    h = headroom(np.repeat([[0, 0], [1, 1]], [97, 3], axis=0), [first, second], n_boot=0)
    both = ndtr(np.hypot(separation(first), separation(second)) / np.sqrt(2))
    np.testing.assert_allclose(h.ceiling.iloc[:2], both, atol=.002)
    np.testing.assert_allclose(h.gain.iloc[:2], [both - first, both - second], atol=.003)
    assert abs(h.gain['macro'] - h.gain.iloc[:2].mean()) < 1e-12


@pytest.mark.parametrize('auc', [(.6, .8), (.8, .6), (.9, .9)])
def test_two_findings_agree_with_an_integral(auc):
    shares = np.array([[.70, .06], [.10, .14]])
    ceiling, own = integrated(shares, np.array(auc), 601)
    h = headroom(films(shares), auc, n_boot=0).iloc[0]
    assert abs(own - auc[0]) < 1e-4
    assert abs(h.gain - (ceiling - own)) < 4 * h.mc_error + 1e-4


@pytest.mark.parametrize('auc', [(.65, .75, .85), (.8, .8, .8)])
def test_three_findings_agree_with_an_integral(auc):
    shares = np.array([[[.52, .08], [.09, .04]], [[.07, .03], [.05, .12]]])
    ceiling, own = integrated(shares, np.array(auc), 121)
    h = headroom(films(shares), auc, n_boot=0).iloc[0]
    assert abs(h.gain - (ceiling - own)) < 4 * h.mc_error + 3e-4


def test_own_evidence_of_auc_one_half_says_nothing_and_of_one_says_all():
    y = coupled()
    assert headroom(y, .5, n_boot=0).gain.abs().max() < 1e-6
    assert headroom(y, 1., n_boot=0).gain.abs().max() < 1e-6
    shares = np.array([[.70, .06], [.10, .14]])
    h = headroom(films(shares), [.5, 1.], n_boot=0)
    seen = .14 / .24 - .06 / .76 # share of those with the first finding who have the second, less that of those without
    np.testing.assert_allclose(h.gain.iloc[:2], [seen / 2, 0], atol=.004)
    silent = headroom(films(shares), [.8, .5], n_boot=0)
    assert abs(silent.gain.iloc[0]) < 1e-6 and silent.gain.iloc[1] > .05


def test_excluding_findings_help_too():
    "A finding that is present only where another is absent hears of it all the same"
    y = np.repeat([[0, 0], [0, 1], [1, 0]], [20, 40, 40], axis=0)
    assert headroom(y, .7, n_boot=0).gain.min() > .03


def test_the_monte_carlo_error_is_what_seeds_differ_by():
    y = coupled()
    runs = [headroom(y, .8, n_sim=50_000, n_boot=0, seed=s).loc['macro'] for s in range(12)]
    seen, said = np.std([r.gain for r in runs], ddof=1), np.mean([r.mc_error for r in runs])
    assert said / 2.5 < seen < 2.5 * said
    assert headroom(y, .8, n_sim=50_000, n_boot=0, seed=3).equals(headroom(y, .8, n_sim=50_000, n_boot=0, seed=3))


def test_the_interval_covers_the_films_that_were_not_drawn():
    "Tables of 1,000 films: the interval holds the ceiling of all films in nearly all of them"
    everyone = headroom(coupled(200_000, 2), .8, n_boot=0).gain['macro']
    tables = [headroom(coupled(1000, 2, seed=s), .8, n_sim=5000, n_boot=60).loc['macro'] for s in range(1, 31)]
    assert np.mean([t.low <= everyone <= t.high for t in tables]) > .8
    assert np.mean([t.chance for t in tables]) > 0


def test_the_interval_of_independent_findings_reaches_zero():
    rng = np.random.default_rng(0)
    tables = [headroom((rng.random((300, 2)) < .3).astype(float), .8, n_sim=5000, n_boot=60).loc['macro'] for _ in range(20)]
    assert np.mean([t.low < 1e-4 for t in tables]) > .8


def test_patients_are_drawn_and_not_films():
    y = coupled(200)
    thrice, patients = np.repeat(y, 6, axis=0), np.repeat(np.arange(200), 6)
    by_film, by_patient = (headroom(thrice, .8, p, n_sim=15_000, n_boot=60).loc['macro'] for p in (None, patients))
    assert by_patient.high - by_patient.low > 1.5 * (by_film.high - by_film.low)
    assert abs(by_patient.gain - by_film.gain) < 1e-12


def test_unknown_labels_at_random_change_little():
    y = coupled(20_000)
    masked = np.where(np.random.default_rng(1).random(y.shape) < .3, np.nan, y)
    whole, part = (headroom(t, .8, n_sim=50_000, n_boot=0).gain['macro'] for t in (y, masked))
    assert abs(whole - part) < .004


def test_unknown_labels_without_a_complete_row_count_as_absent():
    y = np.array([[1, np.nan], [0, np.nan], [np.nan, np.nan]])
    known = label_rows(y)
    assert known.rows.tolist() == [[0, 0], [1, 0]] and np.allclose(known.weights.sum(), 1)
    h = headroom(y, .8, n_sim=5000, n_boot=0)
    assert np.isnan(h.gain.iloc[1]) and abs(h.gain['macro'] - h.gain.iloc[0]) < 1e-12


def test_a_finding_that_nobody_or_everybody_has_is_no_number_and_changes_nothing():
    y = coupled()
    more = np.column_stack([y, np.zeros(len(y)), np.ones(len(y))])
    a, b = headroom(y, .8, n_sim=50_000, n_boot=20), headroom(more, .8, n_sim=50_000, n_boot=20)
    assert b.iloc[4:6][['own', 'ceiling', 'gain', 'low', 'high']].isna().to_numpy().all()
    assert abs(a.gain['macro'] - b.gain['macro']) < .002 and np.isfinite(b.loc['macro']).all()


def test_the_macro_is_over_the_findings_asked_for():
    y = pd.DataFrame(coupled(), columns=list('abcd'))
    h = headroom(y, .8, judged=['a', 'd'], n_sim=15_000, n_boot=0)
    assert abs(h.gain['macro'] - (h.gain['a'] + h.gain['d']) / 2) < 1e-12


@pytest.mark.parametrize('labels, options, says', [
    (np.zeros((0, 3)), {}, 'no rows'),
    (np.zeros((5, 3)), {}, 'nothing to tell apart'),
    (np.full((5, 3), np.nan), {}, 'nothing to tell apart'),
    (np.array([1., 0, 1]), {}, 'two dimensions'),
    (np.array([[1., 2], [0, 1]]), {}, '2 in row 0'),
    (coupled(), dict(auc=.4), 'from 0.5'),
    (coupled(), dict(auc=1.2), '1.2'),
    (coupled(), dict(auc=np.nan), 'auc=nan'),
    (coupled(), dict(auc='good'), 'is no AUC'),
    (coupled(), dict(auc=[.8, .8]), 'each of the 4 findings'),
    (coupled(), dict(judged=['Hernia']), "no finding 'Hernia'"),
    (coupled(), dict(patients=[1, 2]), '2 patients for 400 films'),
])
def test_what_cannot_be_used_is_refused_in_one_line(labels, options, says):
    with pytest.raises(DataError, match=says) as e: headroom(labels, **options)
    assert '\n' not in str(e.value)


def test_the_curve_is_the_macro_at_each_auc():
    y = coupled()
    c = headroom_curve(y, (.6, .8), n_sim=15_000, n_boot=0)
    assert c.index.tolist() == [.6, .8]
    assert c.gain[.8] == headroom(y, .8, n_sim=15_000, n_boot=0).gain['macro']


def test_dependence_of_odd_tables():
    d = dependence(np.array([[1, 0, 0.], [0, 1, 0], [1, np.nan, 0], [0, 1, 0]]))
    assert d['median_phi'] == 1 and d['findings'] == 3 and abs(d['a_film'] - 7/6) < 1e-12
    assert np.isnan(dependence(np.zeros((4, 2)))['median_phi'])


def test_evidence_has_the_auc_asked_for():
    y = np.repeat([[0] * 3, [1] * 3], 20_000, axis=0)
    e = draw_evidence(y, [.5, .75, 1], np.random.default_rng(0))
    np.testing.assert_allclose([roc_auc_score(y[:, j], e[:, j]) for j in range(3)], [.5, .75, 1], atol=.01)
    assert np.isfinite(e).all()


def test_a_table_of_the_size_of_nih_takes_less_than_a_minute():
    table = read_table('nih', LISTS, exists=False, verbose=False)
    start = time.process_time()
    h = headroom(table[labels_of(table)], .8, table.patient)
    assert time.process_time() - start < 120 # on two cores this is a minute
    assert len(table) == 112_120 and h.loc['macro', 'low'] < .0061 < h.loc['macro', 'high'] + .0005
    assert abs(h.gain['macro'] - .0061) < .0004 and h.mc_error['macro'] < .0002


# ---- the phase diagram
def test_the_phase_diagram_falls_with_what_is_used_and_rises_with_films():
    y = coupled(20_000)
    found = phase_diagram({'a': y}, aucs=[.75], films=[500, 4000], used=[.5, 1.], at=4000, n_test=6000)
    assert found.columns.tolist() == ['table', 'auc', 'films', 'used', 'ceiling', 'left', 'gain', 'couplings']
    few, many, half, all_ = found.itertuples()
    assert few.gain < many.gain < many.ceiling + .002 and abs(many.left - many.ceiling) < 1e-9
    assert many.left > half.left > all_.left - 1e-9 and many.gain > half.gain and abs(all_.gain) < .001


def test_the_phase_diagram_is_the_same_whatever_the_number_of_processes():
    tables = dict(a=coupled(500), b=np.column_stack([coupled(500), np.zeros(500)]))
    one, two = (phase_diagram(tables, aucs=[.8], films=[400], used=[], n_test=2000, n_jobs=n) for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)
    assert one.gain.notna().all()


# ---- hierarchy
NAMES = ['No Finding', 'Lung Opacity', 'Edema', 'Consolidation', 'Pneumonia']


def tied_labels(n=4000, seed=0):
    "Labels as the tree has them: no child without its parent, nothing beside No Finding"
    rng = np.random.default_rng(seed)
    u = rng.random((n, 4))
    opacity = u[:, 0] < .4
    edema, consolidation = opacity & (u[:, 1] < .3), opacity & (u[:, 2] < .3)
    return np.column_stack([~opacity, opacity, edema, consolidation, consolidation & (u[:, 3] < .5)]).astype(float)


def test_the_tree_of_chexpert_names_its_findings():
    from cxrlg.readers import CHEXPERT, CHEXPERT_PARENTS
    assert {*CHEXPERT_PARENTS, *CHEXPERT_PARENTS.values()} | {'Support Devices'} == set(CHEXPERT)


def test_hierarchy_helps_the_children_and_leaves_the_root():
    y = tied_labels()
    z = draw_evidence(y, .75, np.random.default_rng(1)) - 1.
    out = Outputs(y, z, np.arange(len(y)) // 2, np.arange(len(y)) // 2 % 3, NAMES)
    new, fitted = cross_fit(out, hierarchy(NAMES))
    before, after = (np.array([roc_auc_score(y[:, j], s[:, j]) for j in range(5)]) for s in (z, new[0]))
    assert abs(after[0] - before[0]) < .002 and (after[1:] - before[1:]).min() > .005
    most = headroom(y, .75, n_boot=0).gain.to_numpy()[:5]
    assert (after - before < most + .02).all()
    assert len(fitted) == 3 and set(fitted[0, 0].index) == set(NAMES[1:])


def test_hierarchy_is_the_law_of_total_probability():
    y = tied_labels(1000)
    z = draw_evidence(y, .75, np.random.default_rng(1))
    apply, scales = hierarchy(NAMES, {'Edema': 'Lung Opacity'})(z, y)
    def p(j, row, kind): return 1 / (1 + np.exp(-(z[:, j] / row[f'temperature{kind}'] + row[f'bias{kind}'])))
    from cxrlg.calibration import fit_platt
    parent = p(1, fit_platt(y, z).iloc[1], '')
    child = parent * p(2, scales.loc['Edema'], '_with') + (1 - parent) * p(2, scales.loc['Edema'], '_without')
    np.testing.assert_allclose(1 / (1 + np.exp(-apply(z)[:, 2])), child, atol=1e-9)


def test_hierarchy_with_unknown_labels_and_a_parent_that_nobody_has():
    y = tied_labels(600)
    z = draw_evidence(y, .75, np.random.default_rng(1))
    y[::3, 2], y[:, 1] = np.nan, 0
    apply, _ = hierarchy(NAMES)(z, y)
    assert np.isfinite(apply(z)).all()


@pytest.mark.parametrize('parents, says', [
    ({'Edema': 'Edema'}, 'no circle'),
    ({'Edema': 'Lung Opacity', 'Lung Opacity': 'Edema'}, 'no circle'),
    ({'Oedema': 'Lung Opacity'}, "did you mean 'Edema'"),
    ({}, 'give parents'),
])
def test_a_hierarchy_that_is_none_is_refused(parents, says):
    with pytest.raises(DataError, match=says): hierarchy(NAMES, parents)


# ---- the clause
def test_the_ceiling_of_a_study_is_over_the_findings_that_have_an_auc():
    y = pd.DataFrame(coupled(), columns=list('abcd'))
    c = study_ceiling(pd.Series(dict(a=.8, b=.7, c=np.nan)), y, n_sim=20_000)
    assert abs(c.own - .75) < .005 and c.gain > .01
    worse = study_ceiling(dict(a=.8, b=.4, c=.8, d=.8), y, n_sim=20_000)
    assert abs(worse.own - .725) < .005
    assert {'low', 'high'} <= set(study_ceiling(dict(a=.8), y, n_sim=5000, n_boot=20).index)
    with pytest.raises(DataError, match='no finding of a, b, c, d has an AUC'): study_ceiling(dict(e=.8), y)


@pytest.mark.parametrize('ceiling, high, margin, says', [
    (.008, .002, None, 'at most 0.0080 here; this study excludes more than 0.0020, 25% of it'),
    (.008, .002, .004, 'the margin of 0.004 is 50% of it'),
    (.008, .01, None, 'does not exclude that'),
    (.008, -.001, None, 'excludes any gain'),
    (0., .01, .005, 'nothing here'),
    (np.nan, .01, .005, 'not known'),
    (.008, np.nan, .005, 'not known'),
])
def test_the_clause_says_what_was_possible_and_what_is_excluded(ceiling, high, margin, says):
    text = coupling_clause(ceiling, high, margin)
    assert says in text and '\n' not in text and 'nan' not in text
