"""Folds: invariants on random tables, scikit-learn's protocol, faults, and the real label tables at full size."""
import importlib.util
import itertools
import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, check_cv, cross_val_score, cross_validate
from sklearn.multioutput import MultiOutputClassifier

from cxrlg import splits
from cxrlg.core import DataError, film_key
from cxrlg.splits import *
from cxrlg.splits import folds_hash

NAMES = ['Cardiomegaly', 'Edema', 'Mass', 'Nodule', 'Hernia', 'Effusion']


def random_table(seed, n_patients=400, unknown=0., films=None, names=NAMES):
    "Patients with 1 to 12 films, correlated findings, ids that are not sorted"
    rng = np.random.default_rng(seed)
    ids = rng.permutation(n_patients * 3)[:n_patients]
    patient = rng.permutation(np.repeat(ids, rng.geometric(.45, n_patients).clip(max=12) if films is None else films))
    rate = np.linspace(.4, .06, len(names)) * np.exp(rng.normal(0, .5, (patient.size, 1)))
    y = (rng.random((patient.size, len(names))) < rate).astype('float32')
    y[rng.random(y.shape) < unknown] = np.nan
    table = pd.DataFrame({'image': [f'{i:05}.png' for i in range(len(y))], 'patient': patient})
    table[names] = y
    table.attrs['labels'] = list(names)
    return table


def figures(table, folds, labels=NAMES):
    "Prevalence, pair and size deviation straight from their definitions, with pandas and loops"
    parts = [table[np.asarray(folds) == k] for k in range(max(folds) + 1)]
    parts = [p.astype(dict.fromkeys(labels, float)) for p in parts]
    inside = pd.concat(parts)
    prevalence = max(abs(p[c].mean() / inside[c].mean() - 1) for p in parts for c in labels if inside[c].sum())
    both = lambda t, a, b: ((t[a] == 1) & (t[b] == 1)).mean()
    pair = np.mean([abs(both(p, a, b) - both(inside, a, b)) for p in parts for a, b in itertools.combinations(labels, 2)])
    return prevalence, pair, max(abs(len(p) / (len(inside) / len(parts)) - 1) for p in parts)


def split_folds(cv, table, labels=NAMES, rows=None):
    rows = np.arange(len(table)) if rows is None else rows
    folds, y = np.full(len(table), -1), table[labels].to_numpy()[rows]
    for k, (train, test) in enumerate(cv.split(y, y, table.patient.to_numpy()[rows])):
        assert not len(np.intersect1d(train, test)) and len(train) + len(test) == len(rows)
        assert (folds[rows[test]] == -1).all()
        folds[rows[test]] = k
    return folds


# --- invariants

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('n_splits', [2, 3, 7])
def test_whole_patients_and_every_film_once(seed, n_splits):
    table = random_table(seed, n_patients=60 + 80*seed, unknown=.1 * (seed % 3))
    folds = split_folds(MultilabelStratifiedGroupKFold(n_splits, shuffle=True, random_state=seed), table)
    assert sorted(set(folds)) == list(range(n_splits))
    assert (pd.Series(folds).groupby(table.patient.to_numpy()).nunique() == 1).all()


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('shuffle', [False, True])
def test_row_order_does_not_matter(seed, shuffle):
    table = random_table(seed, unknown=.1)
    cv = MultilabelStratifiedGroupKFold(4, shuffle=shuffle, random_state=seed if shuffle else None)
    mixed = np.random.default_rng(seed).permutation(len(table))
    assert (split_folds(cv, table) == split_folds(cv, table, rows=mixed)).all()


def test_same_seed_same_folds_and_other_seed_other_folds():
    table = random_table(1)
    assert make_folds(table, seed=1).equals(make_folds(table, seed=1))
    assert not make_folds(table, seed=1).equals(make_folds(table, seed=2))
    assert make_folds(table, seed=1).attrs['hash'] != make_folds(table, seed=2).attrs['hash']


def test_known_folds_stay_what_they_are():
    "A change of these folds is a change of every study's folds; the table is arithmetic, so no generator's version matters"
    i, j = np.arange(120)[:, None], np.arange(5)
    y = ((i*i*(j + 3) + i + j) % 23 < 4 + j).astype('float32')
    table = pd.DataFrame({'image': [f'{k}.png' for k in range(120)], 'patient': (i[:, 0] ** 2) % 41})
    table[list('abcde')] = y
    table.attrs['labels'] = list('abcde')
    folds = make_folds(table, 3, seed=42)
    assert folds.groupby(table.patient).first().tolist() == [1, 1, 2, 0, 2, 0, 2, 2, 2, 0, 0, 0, 1, 1, 1, 0, 1, 2, 0, 1, 2]


def test_random_state_instance_goes_on():
    table, cv = random_table(2), MultilabelStratifiedGroupKFold(3, shuffle=True, random_state=np.random.RandomState(0))
    assert (split_folds(cv, table) != split_folds(cv, table)).any()


def test_greedy_places_each_patient_where_the_sum_of_squares_is_least():
    "Against the objective itself, evaluated for every fold at every step"
    table = random_table(3, 80)
    code = pd.factorize(table.patient, sort=True)[0]
    counts = splits._group_counts(table[NAMES].to_numpy(float), code)
    total = np.asarray(counts.sum(0)).ravel()
    w, V, K = splits._weights(total, len(NAMES), 1/4), counts.toarray(), 4
    order = np.argsort(-(V @ w), kind='stable')
    S, slow = np.zeros((K, len(total))), np.empty(len(order), int)
    for i in order:
        cost = [(w * (S + np.eye(K)[k][:, None] * V[i] - total / K) ** 2).sum() for k in range(K)]
        slow[i] = int(np.flatnonzero(np.isclose(cost, min(cost), rtol=1e-12, atol=0))[0])
        S[slow[i]] += V[i]
    assert (splits._greedy(counts, w, K, order) == slow).all()


@pytest.mark.parametrize('unknown', [0., .2])
def test_counts_against_two_loops(unknown):
    table = random_table(4, 50, unknown)
    y, code, L = table[NAMES].to_numpy(float), pd.factorize(table.patient, sort=True)[0], len(NAMES)
    counts = splits._group_counts(y, code).toarray()
    for g in range(50):
        own = y[code == g]
        assert counts[g, 0] == len(own)
        assert (counts[g, 1+L:1+2*L] == (own == 1).sum(0)).all()
        assert (counts[g, 1:1+L] == ((~np.isnan(own)).sum(0) if unknown else 0)).all()
        for a, b in itertools.product(range(L), range(L)):
            assert counts[g, 1 + 2*L + a*L + b] == (((own[:, a] == 1) & (own[:, b] == 1)).sum() if a < b else 0)


def test_ends_are_exact_in_double_precision():
    "Weights are powers of two and the scaled deviations integers, whatever the totals"
    w = splits._weights(np.array([1., 3, 227, 112120, 0]), 2, 1/16)
    assert (np.frexp(w)[0] == .5).all()


# --- balance

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('n_splits', [2, 5, 10])
def test_one_film_a_patient_is_as_good_as_iterative_stratification(seed, n_splits):
    table = random_table(seed, 1500, films=1)
    ours, theirs = make_folds(table, n_splits, seed=seed), make_folds(table, n_splits, group='image', seed=seed)
    (p, q, s), (p_, q_, s_) = figures(table, ours), figures(table, theirs)
    assert p <= 1.02 * p_ + n_splits / len(table) and q < .6 * q_ and s <= s_ + 1e-12


@pytest.mark.parametrize('seed', range(3))
def test_patients_are_balanced_far_better_than_by_chance(seed):
    table = random_table(seed, 1500)
    chance = table.patient.map(dict(zip(table.patient.unique(), np.random.default_rng(seed).integers(0, 5, 1500)))).to_numpy()
    ours, image, luck = (figures(table, f) for f in (make_folds(table, 5), make_folds(table, 5, group='image'), chance))
    assert ours[0] <= 1.1 * image[0] + 5 / len(table) and ours[1] < image[1]
    assert all(o < l / 4 for o, l in zip(ours, luck))


@pytest.mark.parametrize('seed', range(4))
def test_unknown_labels_are_balanced_among_the_known(seed):
    table = random_table(seed, 1500)
    rng = np.random.default_rng(seed)
    y = table[NAMES].to_numpy()
    y[:, 1][np.isin(table.patient, rng.choice(table.patient.unique(), 700, replace=False))] = np.nan
    table['Edema'] = y[:, 1]
    report = balance_report(table, make_folds(table, 5))
    as_zero = table.assign(Edema=np.nan_to_num(y[:, 1]))
    as_zero.attrs['labels'] = NAMES
    naive = balance_report(table, make_folds(as_zero, 5))
    assert report.deviation['Edema'] < .02 and report.deviation['Edema'] < naive.deviation['Edema']


def test_patient_with_many_films_bounds_what_can_be_reached():
    table = random_table(5, 200, films=1)
    many = pd.DataFrame({'image': [f'm{i}' for i in range(30)], 'patient': -7, **{c: np.float32(c == 'Hernia') for c in NAMES}})
    both = pd.concat([table, many], ignore_index=True)
    both.attrs['labels'] = NAMES
    folds = make_folds(both, 5)
    hernia = both.Hernia.groupby(folds.to_numpy()).sum()
    assert 30 <= hernia.max() <= 32 and len(set(folds[-30:])) == 1
    assert balance_report(both, folds).attrs['size_deviation'] < .25


def test_report_against_the_definitions():
    for seed, unknown in ((0, 0.), (1, .3)):
        table = random_table(seed, 300, unknown)
        for folds in (make_folds(table, 4), make_folds(table, 4, group='image'), make_folds(table, 4, locked=.3)):
            report = balance_report(table, folds)
            assert np.allclose(
                [report.attrs[f'{k}_deviation'] for k in ('prevalence', 'pair', 'size')],
                figures(table, folds),
                rtol=1e-9,
                atol=1e-12,
            )
            assert report.attrs['out'] == (folds == -1).sum()
            assert report.films.tolist() == (table[folds >= 0][NAMES] == 1).sum().tolist()
            assert report.patients['Mass'] == table[(folds >= 0) & (table.Mass == 1)].patient.nunique()


def test_internal_judge_agrees_with_the_report():
    table = random_table(6, 300, .2)
    folds, code = make_folds(table, 4), pd.factorize(table.patient, sort=True)[0]
    counts = splits._group_counts(table[NAMES].to_numpy(float), code)
    by_group = pd.Series(folds.to_numpy()).groupby(code).first().to_numpy()
    attrs = balance_report(table, folds).attrs
    assert np.allclose(splits._judge(counts, by_group, 4, len(NAMES)), (attrs['prevalence_deviation'], attrs['pair_deviation']))


def test_report_flags_folds_with_one_class():
    table = random_table(0, 100)
    table['Hernia'] = np.float32(0)
    table['Mass'] = np.float32(1)
    table.loc[table.patient == table.patient[0], 'Edema'] = np.float32(1)
    table.loc[table.patient != table.patient[0], 'Edema'] = np.float32(0)
    with pytest.warns(UserWarning, match='Edema 1, Hernia 0'): folds = make_folds(table, 3)
    report = balance_report(table, folds)
    home = folds[table.patient == table.patient[0]].iloc[0]
    assert report.one_class['Hernia'] == report.one_class['Mass'] == '0 1 2'
    assert report.one_class['Edema'] == ' '.join(str(k) for k in range(3) if k != home)
    assert np.isnan(report.deviation['Hernia']) and report.deviation['Mass'] == 0
    assert np.isfinite(report.attrs['prevalence_deviation'])


def test_a_fold_where_a_label_is_unknown_throughout_is_infinitely_off():
    table = random_table(0, 60)
    folds = make_folds(table, 3)
    table.loc[folds == 1, 'Mass'] = np.nan
    report = balance_report(table, folds)
    assert report.deviation['Mass'] == np.inf and report.one_class['Mass'] == '1'


def test_many_labels_need_little_memory():
    "193 labels have 18,528 pairs; the patients' rows are sparse"
    rng = np.random.default_rng(0)
    y = rng.random((20_000, 193)) < .01
    patient = rng.integers(0, 8000, 20_000)
    folds = np.empty(len(y), int)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for k, (_, test) in enumerate(MultilabelStratifiedGroupKFold(3).split(y, y, patient)): folds[test] = k
    rate = np.stack([y[folds == k].mean(0) for k in range(3)])
    assert abs(rate / y.mean(0) - 1).max() < .05


def test_plot_has_every_finding():
    import matplotlib
    matplotlib.use('Agg')
    table = random_table(0)
    report = balance_report(table, make_folds(table))
    ax = plot_balance({'a': report, 'b': report})
    assert [t.get_text() for t in ax.get_yticklabels()] == NAMES and len(ax.collections) == 2
    assert len(plot_balance(report).collections) == 1


# --- scikit-learn's protocol

def test_protocol():
    cv = MultilabelStratifiedGroupKFold(4, shuffle=True, random_state=3)
    assert cv.get_n_splits() == 4 and check_cv(cv) is cv
    assert repr(cv) == 'MultilabelStratifiedGroupKFold(n_splits=4, random_state=3, shuffle=True)'
    assert repr(MultilabelStratifiedGroupKFold()) == 'MultilabelStratifiedGroupKFold(n_splits=5, random_state=None, shuffle=False)'
    table = random_table(0)
    assert (split_folds(cv, table) == split_folds(clone(cv, safe=False), table)).all()


def test_pandas_lists_sparse_and_text_ids_give_the_same_folds():
    from scipy import sparse
    table = random_table(0, 100)
    y, cv = table[NAMES].to_numpy(), MultilabelStratifiedGroupKFold(3)
    first = lambda y, g: next(cv.split(np.zeros((len(table), 1)), y, g))[1].tolist()
    want = first(y, table.patient)
    text = [f'p{p:06}' for p in table.patient]
    for other in (
        first(table[NAMES], table.patient),
        first(y.tolist(), table.patient.tolist()),
        first(sparse.csr_matrix(y), table.patient.to_numpy()),
        first(y.astype(bool), text),
        first(y.astype(int), pd.Series(text, dtype='string')),
        first(y, pd.Categorical(text)),
    ):
        assert other == want


def test_cross_validation_and_grid_search():
    table = random_table(0, 200)
    X, y = table[NAMES[2:]].to_numpy(), table[NAMES[:2]].to_numpy()
    model, cv = MultiOutputClassifier(LogisticRegression()), MultilabelStratifiedGroupKFold(3, shuffle=True, random_state=0)
    assert len(cross_val_score(model, X, y, groups=table.patient, cv=cv)) == 3
    search = GridSearchCV(model, {'estimator__C': [.1, 1]}, cv=cv).fit(X, y, groups=table.patient)
    assert search.n_splits_ == 3
    clone(search).fit(X, y, groups=table.patient)


def test_metadata_routing_asks_for_groups():
    table = random_table(0, 200)
    X, y = table[NAMES[2:]].to_numpy(), table[NAMES[:2]].to_numpy()
    model, cv = MultiOutputClassifier(LogisticRegression()), MultilabelStratifiedGroupKFold(3)
    with sklearn.config_context(enable_metadata_routing=True):
        assert cv.get_metadata_routing().split.requests == {'groups': True}
        got = cross_validate(model, X, y, params={'groups': table.patient}, cv=cv, return_indices=True)
    assert (got['indices']['test'][0] == next(cv.split(X, y, table.patient))[1]).all()


def test_a_single_column_of_labels():
    table = random_table(0, 100)
    folds = split_folds(MultilabelStratifiedGroupKFold(3), table, ['Edema'])
    assert figures(table, folds, ['Edema', 'Edema'])[0] < .05


# --- faults in the splitter's input

def split(y, groups, n_splits=3, **kw): return list(MultilabelStratifiedGroupKFold(n_splits, **kw).split(np.zeros(len(y)), y, groups))


Y = np.tile(np.eye(2), (6, 1))
G = np.arange(12)


@pytest.mark.parametrize('y, groups, message', [
    (Y, None, "'groups' parameter should not be None"),
    (Y, G[:7], 'inconsistent numbers of samples'),
    (Y, G % 2, 'n_splits=3 is more than the 2 groups'),
    (Y, np.c_[G, G], r'groups has shape \(12, 2\)'),
    (Y, np.where(G == 4, np.nan, G), r'group is missing \(NaN\) in 1 rows, the first is row 4'),
    (Y, [None if i in (2, 5) else str(i) for i in G], 'in 2 rows, the first is row 2'),
    (Y[:, 0], G, r'y has shape \(12,\)'),
    (Y[:, :0], G, r'y has shape \(12, 0\)'),
    (Y[:, :, None], G, 'two dimensions'),
    (np.where(np.arange(24).reshape(12, 2) == 9, -1, Y), G, '1 values other than 1, 0 or NaN, the first is -1 in row 4, label 1'),
    (Y * 2, G, '12 values other than 1, 0 or NaN, the first is 2 in row 0, label 0'),
    (Y * .5, G, 'the first is 0.5 in row 0'),
    (Y / np.where(Y == 0, 1, 0).clip(1e-300), G, 'values other than'),
    (np.where(Y, 'yes', 'no'), G, "'yes' in row 0, label 0"),
    (pd.DataFrame({'Edema': [1, 0, 'no'] * 4, 'Mass': 1}), G, "'no' in row 2, Edema"),
    ([[1, 0]] * 11 + [[1]], G, 'y must hold 1, 0 or NaN'),
])
def test_faulty_input(y, groups, message):
    with pytest.raises(ValueError, match=message): split(y, groups)


def test_missing_labels_and_odd_parameters():
    with pytest.raises(ValueError, match="'y' parameter should not be None"): next(MultilabelStratifiedGroupKFold(3).split(Y, None, G))
    with pytest.raises(ValueError, match='n_splits=1'): MultilabelStratifiedGroupKFold(1)
    with pytest.raises(ValueError, match='Integral'): MultilabelStratifiedGroupKFold(2.5)
    with pytest.raises(ValueError, match='random_state'): MultilabelStratifiedGroupKFold(3, random_state=0)
    with pytest.raises(ValueError, match='n_splits=13'): split(Y, G, 13)


def test_rare_label_warns_with_its_name_and_number():
    y = pd.DataFrame(Y, columns=['Edema', 'Hernia'])
    y.loc[2:, 'Hernia'] = 0
    with pytest.warns(UserWarning, match='groups with a positive: Hernia 1$'): split(y, G)


def test_all_labels_absent_or_unknown_still_balances_sizes():
    for y in (np.zeros((30, 2)), np.full((30, 2), np.nan)):
        with pytest.warns(UserWarning, match='label 0 0, label 1 0'): folds = split(y, np.arange(30) // 2)
        assert [len(test) for _, test in folds] == [10, 10, 10]


# --- make_folds

def test_image_folds_are_iterative_stratification_itself():
    table = random_table(0)
    want = np.empty(len(table), int)
    for k, (_, test) in enumerate(
        MultilabelStratifiedKFold(3, shuffle=True, random_state=5).split(table, table[NAMES].to_numpy())
    ):
        want[test] = k
    got = make_folds(table, 3, group='image', seed=5)
    assert (got == want).all() and got.name == 'fold' and got.index.equals(table.index)
    with pytest.raises(ValueError, match='values of patient are in more than one fold'): assert_disjoint(table, got)


def test_image_folds_take_unknown_as_absent():
    table = random_table(0, unknown=.2)
    zero = table.fillna(0.)
    assert (make_folds(table, 3, group='image') == make_folds(zero, 3, group='image')).all()


def test_image_folds_without_patients():
    table = random_table(0).drop(columns='patient')
    table.attrs['labels'] = NAMES
    folds = make_folds(table, 3, group='image')
    assert sorted(folds.unique()) == [0, 1, 2] and balance_report(table, folds).patients.isna().all()


def test_locked_patients_stay_locked():
    table = random_table(0, 1000)
    out = lambda t, **kw: set(t.patient[make_folds(t, 3, **kw) == -1])
    fifth = out(table, locked=.2)
    assert .15 < len(fifth) / 1000 < .25
    assert fifth == out(table, locked=.2, seed=1) == out(table, locked=.2, group='image') == out(table[::-1], locked=.2)
    assert fifth < out(table, locked=.4)
    more = random_table(0, 1000).assign(image=lambda t: 'b' + t.image)
    more = pd.concat([table, more.assign(patient=more.patient + 1)], ignore_index=True)
    assert fifth == out(more, locked=.2) & set(table.patient)
    assert fifth == {int(p) for p in out(table.assign(patient=table.patient.astype(str)), locked=.2)}
    assert_disjoint(table, make_folds(table, 3, locked=.2))


def test_locked_hash_is_the_documented_one():
    import hashlib
    table = random_table(0, 300)
    for p, k in zip(table.patient, make_folds(table, 3, locked=.3)):
        part = int(hashlib.sha256(f'cxrlg-locked:{p}'.encode()).hexdigest()[:16], 16) / 2**64
        assert (k == -1) == (part < .3)


def test_official_test_rows_are_in_no_fold():
    table = random_table(0).assign(split=lambda t: np.where(t.patient % 5 == 0, 'test', 'train'))
    table.attrs['labels'] = NAMES
    folds = make_folds(table, 3, official=True)
    assert ((folds == -1) == (table.split == 'test')).all()
    both = make_folds(table, 3, official=True, locked=.3)
    assert (both[table.split == 'test'] == -1).all() and (both == -1).sum() > (folds == -1).sum()
    assert (make_folds(table, 3) >= 0).all()
    assert_disjoint(table, both)


def test_index_of_the_table_is_kept():
    table = random_table(0)[::2]
    folds = make_folds(table, 3)
    assert folds.index.equals(table.index) and folds.dtype == 'int64' and balance_report(table, folds).attrs['out'] == 0


def test_a_table_without_its_findings_is_refused():
    table = random_table(0).merge(pd.DataFrame({'image': ['00000.png'], 'portable': [1.]}), how='left', on='image')
    for call in (lambda: make_folds(table), lambda: balance_report(table, np.zeros(len(table), int))):
        with pytest.raises(ValueError, match=r"set table.attrs\['labels'\].*Effusion, portable"): call()


@pytest.mark.parametrize('backend', ['numpy_nullable', 'pyarrow'])
def test_nullable_and_arrow_columns_give_the_same_folds(backend):
    table = with_(random_table(3, unknown=.2), split=None)
    table.loc[table.patient.isin(table.patient.unique()[:40]), 'split'] = 'test'
    other = table.convert_dtypes(dtype_backend=backend)
    other.attrs = table.attrs
    for options in ({}, {'locked': .2}, {'official': True}, {'group': 'image'}):
        assert make_folds(other, 3, **options).tolist() == make_folds(table, 3, **options).tolist()
    folds = make_folds(table, 3)
    assert_disjoint(other, folds)
    pd.testing.assert_frame_equal(balance_report(other, folds), balance_report(table, folds))


def test_a_film_under_two_spellings_is_one():
    table = random_table(0, 40)
    table.loc[3, 'image'] = './00001.png '
    with pytest.raises(ValueError, match='1 images are in the table twice'): make_folds(table)


def with_(table, **columns):
    table = table.assign(**columns)
    table.attrs['labels'] = NAMES
    return table


@pytest.mark.parametrize(
    'change, options, message',
    [
        (
            lambda t: t.drop(columns='patient'),
            {},
            "no patient column, so patients cannot be kept whole: use group='image'",
        ),
        (lambda t: t.drop(columns='patient'), {'group': 'image', 'locked': 0.2}, 'no patient column: use locked=0'),
        (
            lambda t: with_(t, patient=t.patient.where(t.index != 3)),
            {},
            r'patient is missing \(NaN\) in 1 rows, the first is row 3 \(00003.png\)',
        ),
        (lambda t: with_(t, patient=t.patient.where(t.index != 3)), {'group': 'image', 'locked': 0.1}, 'missing'),
        (
            lambda t: with_(t, patient=t.index % 2),
            {'n_splits': 5},
            'n_splits=5 is more than the 2 patients: use fewer folds',
        ),
        (lambda t: t[:4], {'group': 'image', 'n_splits': 5}, 'n_splits=5 is more than the 4 films'),
        (lambda t: with_(t, image='a.png'), {}, 'images are in the table twice, the first is a.png'),
        (lambda t: with_(t, Mass=t.Mass * 2), {}, 'values other than 1, 0 or NaN, the first is 2 in row'),
        (lambda t: with_(t, Mass='yes'), {}, "'yes' in row 0, Mass"),
        (lambda t: t.drop(columns='Mass'), {}, 'lacks finding columns: Mass'),
        (lambda t: t, {'official': True}, 'no such column'),
        (lambda t: with_(t, split='train'), {'official': True}, r"only \['train'\]"),
        (
            lambda t: with_(t, split=np.where(t.index < 200, 'test', 'train')),
            {'official': True},
            'patients have films in the official test part and outside it',
        ),
        (lambda t: t, {'locked': 1.0}, 'locked=1.0: use a share'),
        (lambda t: t, {'locked': -0.1}, 'locked=-0.1'),
        (lambda t: t, {'locked': 0.99999}, 'are locked or of the official test part: none is left for the folds'),
        (lambda t: t, {'locked': 1e-6}, 'locked=1e-06 of 100 patients sets none aside'),
        (lambda t: t, {'group': 'study'}, "group='study'"),
        (lambda t: t, {'n_splits': 1}, 'n_splits=1: use'),
        (lambda t: t, {'n_splits': 2.5}, 'n_splits=2.5'),
    ],
)
def test_faulty_tables(change, options, message):
    table = random_table(0, 100)
    with pytest.raises(ValueError, match=message): make_folds(change(table), **options)


def test_nothing_is_written_when_the_input_is_faulty(tmp_path):
    with pytest.raises(ValueError): make_folds(random_table(0).drop(columns='patient'), path=tmp_path/'folds.csv')
    assert not list(tmp_path.iterdir())


def test_assert_disjoint_names_patients_and_folds():
    table = pd.DataFrame({'image': list('abcdef'), 'patient': [7, 7, 8, 8, 9, 9], 'study': [1, 1, 1, 2, 2, 2]})
    assert_disjoint(table, [0, 0, 1, 1, -1, -1])
    with pytest.raises(
        ValueError, match=r'^2 values of patient are in more than one fold: 7 \(folds 0, 1\); 9 \(folds -1, 2\)$'
    ):
        assert_disjoint(table, [1, 0, 1, 1, 2, -1])
    with pytest.raises(ValueError, match='1 values of study'): assert_disjoint(table, [0, 0, 0, 1, 1, 0], column='study')
    with pytest.raises(ValueError, match="no column 'ward'"): assert_disjoint(table, [0] * 6, column='ward')
    with pytest.raises(ValueError, match='folds has 5 entries, the table 6 rows'): assert_disjoint(table, [0] * 5)
    with pytest.raises(ValueError, match='must be integers'): assert_disjoint(table, [.5] * 6)
    with pytest.raises(ValueError, match='must be integers'): assert_disjoint(table, [-2] * 6)
    with pytest.raises(ValueError, match='different indexes'): assert_disjoint(table, pd.Series([0] * 6, index=range(1, 7)))
    with pytest.raises(ValueError, match='missing'): assert_disjoint(table.assign(patient=[7, 7, 8, None, 9, 9]), [0] * 6)
    with pytest.raises(ValueError, match='no film is in a fold'): balance_report(table.assign(Edema=1.), [-1] * 6)


# --- folds.csv

def test_round_trip_with_odd_names(tmp_path):
    table = random_table(0, 40)
    table['image'] = [('NA', 'a,b.png', 'q"q.png', 'ä ü/1.png', 'null')[i] if i < 5 else n for i, n in enumerate(table.image)]
    folds = make_folds(table, 3, locked=.2, path=tmp_path/'deep'/'folds.csv')
    back = read_folds(tmp_path/'deep'/'folds.csv', table)
    assert back.equals(folds) and back.name == 'fold' and back.attrs == folds.attrs and back.attrs['hash'] == folds_hash(table, folds)
    assert read_folds(tmp_path/'deep'/'folds.csv', table[::-1]).equals(folds[::-1])
    assert [p.name for p in (tmp_path/'deep').iterdir()] == ['folds.csv']
    assert list(pd.read_csv(tmp_path/'deep'/'folds.csv').columns) == ['image', 'patient', 'fold']


def test_same_folds_same_bytes(tmp_path):
    for name in 'ab': make_folds(random_table(0), 3, path=tmp_path/name)
    assert (tmp_path/'a').read_bytes() == (tmp_path/'b').read_bytes()


@pytest.mark.parametrize('text, message', [
    ('', 'is not a folds table'),
    ('image,patient\na,1\n', 'lacks the column fold'),
    ('image;patient;fold\na;1;0\n', 'lacks the column image and fold'),
    ('image,patient,fold\na,1,0\nb,1,x\nc,2,1\n', "line 3: fold 'x' is not an integer"),
    ('image,patient,fold\na,1,0\nb,1,1.5\nc,2,1\n', "line 3: fold '1.5'"),
    ('image,patient,fold\na,1,0\nb,1,\nc,2,1\n', "line 3: fold ''"),
    ('image,patient,fold\na,1,0\nb,1,-2\nc,2,1\n', "line 3: fold '-2'"),
    ('image,patient,fold\na,1,0\nb,1\nc,2,1\n', 'line 3: fold'),
    ('image,patient,fold\na,1,0\nb,1,0\n', '1 images are not listed, the first is c'),
    ('image,patient,fold\na,1,0\nb,1,0\nc,2,1\nd,2,1\ne,2,1\n', '2 images are not in the table, the first is d'),
    ('image,patient,fold\na,1,0\na,1,0\nb,1,0\nc,2,1\n', '1 images are listed twice, the first is a'),
    ('image,patient,fold\na,1,0,9,9\n', 'belongs to another table'),
])
def test_faulty_folds_files(tmp_path, text, message):
    (tmp_path/'folds.csv').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_folds(tmp_path / 'folds.csv', pd.DataFrame({'image': list('abc'), 'patient': [1, 1, 2]}))


def test_folds_file_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path/'nowhere.csv'):
        with pytest.raises(DataError, match='cannot be read .*: give the folds.csv that make_folds wrote'):
            read_folds(path, random_table(0, 10))


NAMES_OF_FILMS = st.lists(
    st.text(st.characters(codec='utf-8', exclude_characters='\0'), min_size=1, max_size=8),
    min_size=4,
    max_size=8,
    unique_by=film_key,
)


@settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES_OF_FILMS, st.sampled_from(['NFC', 'NFD']), st.booleans())
def test_folds_of_any_names_come_back(tmp_path, names, form, spreadsheet):
    table = pd.DataFrame({'image': names, 'patient': names, 'A': [0., 1.]*(len(names)//2) + [1.]*(len(names) % 2)})
    table.attrs['labels'] = ['A']
    folds = make_folds(table, 2, path=tmp_path/'folds.csv')
    if spreadsheet: (tmp_path/'folds.csv').write_bytes(b'\xef\xbb\xbf' + (tmp_path/'folds.csv').read_bytes())
    other = table.assign(image=[unicodedata.normalize(form, n) for n in names])
    assert read_folds(tmp_path/'folds.csv', other[::-1]).tolist() == folds[::-1].tolist()


def test_binary_folds_file(tmp_path):
    (tmp_path/'folds.csv').write_bytes(b'image,fold\n\xff\xfe,0\n')
    with pytest.raises(ValueError, match='is not a folds table'): read_folds(tmp_path/'folds.csv', pd.DataFrame({'image': ['a']}))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    table, path = random_table(0), tmp_path/'folds.csv'
    make_folds(table, 3, path=path)
    before = path.read_bytes()
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(DataError, match='No space'): make_folds(table, 4, path=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['folds.csv']


def test_one_patient_written_as_number_and_as_text_is_in_one_fold():
    "5, '5' and ' 5' are one patient; '05' is another"
    table = random_table(0).iloc[:200].assign(patient=np.repeat(np.arange(50), 4))
    mixed = table.assign(patient=[(p, str(p), f' {p}', f'{p} ')[i % 4] for i, p in enumerate(table.patient)])
    folds = make_folds(mixed, 4)
    assert folds.groupby(table.patient.to_numpy()).nunique().eq(1).all()
    assert folds.tolist() == make_folds(table.assign(patient=table.patient.astype(str)), 4).tolist()
    assert_disjoint(mixed, folds)
    with pytest.raises(DataError, match='in more than one fold: 0 '): assert_disjoint(mixed, np.arange(len(mixed)) % 4)
    assert splits._as_ids(pd.Series(['05', '5'])).nunique() == 2
    official = mixed.assign(split=['test' if i % 4 else 'train' for i in range(len(mixed))])
    with pytest.raises(DataError, match='50 patients have films in the official test part and outside it'):
        make_folds(official, 4, official=True)


@pytest.mark.parametrize('kind', ['category', 'string', 'object', 'Int64'])
def test_ids_of_any_kind_lock_the_same_patients(kind):
    table = random_table(0).iloc[:300].assign(patient=np.repeat(np.arange(100), 3))
    locked = make_folds(table, 3, locked=.3) == -1
    assert (make_folds(table.assign(patient=table.patient.astype(kind)), 3, locked=.3) == -1).tolist() == locked.tolist()


@pytest.mark.parametrize('options, said', [
    (dict(seed=-1), 'seed=-1: use a whole number'),
    (dict(seed='a'), "seed='a': use a whole number"),
    (dict(seed=2**40), 'use a whole number, at least 0 and below'),
    (dict(locked=None), 'locked=None: use a share'),
    (dict(locked='0.1'), "locked='0.1': use a share"),
])
def test_options_that_cannot_be_meant_are_one_line(options, said):
    with pytest.raises(DataError, match=said) as e: make_folds(random_table(0), 3, **options)
    assert '\n' not in str(e.value)


def test_a_row_without_an_image_a_finding_twice_and_a_folder_for_a_file(tmp_path):
    table = random_table(0)
    with pytest.raises(DataError, match='is a folder, no file: name another file'): make_folds(table, 3, path=tmp_path)
    with pytest.raises(DataError, match='the image is missing'): make_folds(table.assign(image=[None, *table.image[1:]]), 3)
    twice = table[[*table, table.attrs['labels'][0]]]
    with pytest.raises(DataError, match='more than one column called'): make_folds(twice, 3)


# --- the real label tables, complete

@pytest.fixture(scope='module')
def shipped():
    found = importlib.util.find_spec('torchxrayvision')
    if found is None: pytest.skip('the label tables ship in torchxrayvision: pip install torchxrayvision')
    return Path(found.origin).parent/'data'


def real(image, patient, y):
    table = pd.concat([pd.DataFrame({'image': image, 'patient': patient}), y.astype('float32')], axis=1)
    table.attrs['labels'] = list(y)
    return table


@pytest.fixture(scope='module')
def nih(shipped):
    t = pd.read_csv(shipped/'Data_Entry_2017_v2020.csv.gz')
    return real(t['Image Index'], t['Patient ID'], t['Finding Labels'].str.get_dummies('|').drop(columns='No Finding'))


@pytest.fixture(scope='module')
def chexpert(shipped):
    t = pd.read_csv(shipped/'chexpert_train.csv.gz')
    return real(t.Path, t.Path.str.extract(r'(patient\d+)')[0], (t.iloc[:, -14:] == 1))


def test_nih_complete(nih):
    assert nih.shape == (112_120, 16) and nih.patient.nunique() == 30_805
    ours = make_folds(nih, 5)
    assert_disjoint(nih, ours)
    a, b = balance_report(nih, ours).attrs, balance_report(nih, make_folds(nih, 5, group='image')).attrs
    assert a['prevalence_deviation'] <= .014 and a['pair_deviation'] <= 2e-5 and a['pair_deviation'] <= b['pair_deviation'] / 10
    assert a['prevalence_deviation'] <= 1.1 * b['prevalence_deviation'] and a['size_deviation'] == 0
    assert make_folds(nih.sample(frac=1, random_state=0), 5).sort_index().equals(ours)


@pytest.mark.parametrize('n_splits', [2, 3, 10, 20])
def test_nih_other_numbers_of_folds(nih, n_splits):
    a = balance_report(nih, make_folds(nih, n_splits, seed=n_splits)).attrs
    ideal = 227 / n_splits
    assert a['prevalence_deviation'] <= 1.01 * max(np.ceil(ideal) / ideal - 1, 1 - np.floor(ideal) / ideal)
    assert a['pair_deviation'] < 8e-5


def test_chexpert_complete(chexpert):
    assert chexpert.shape == (223_414, 16) and chexpert.patient.nunique() == 64_540
    folds = make_folds(chexpert, 5)
    assert_disjoint(chexpert, folds)
    a = balance_report(chexpert, folds).attrs
    assert a['prevalence_deviation'] <= .001 and a['pair_deviation'] <= 1e-5 and a['size_deviation'] < 1e-4


def test_official_nih_lists_are_honoured(nih, films):
    test = set((films/'nih128'/'test_list.txt').read_text().split())
    table = nih.assign(split=np.where(nih.image.isin(test), 'test', 'train'))
    table.attrs['labels'] = nih.attrs['labels']
    folds = make_folds(table, 5, official=True)
    assert (folds == -1).sum() == len(test) == 25_596
    assert_disjoint(table, folds)
