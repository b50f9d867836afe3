"""A study's tables: the stated statistics, seeds averaged, locked patients, power, studies without an AUC."""
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from cxrlg.core import DataError
from cxrlg.eval import auc_interval, macro_auc, paired_bootstrap
from cxrlg.replicates import Replicates
from cxrlg.results import StudyFolder, as_study, example_study, read_study
from cxrlg.tables import counted_up, fit_calibration, locked_table, power_table, summarise


@pytest.fixture()
def study(tmp_path): return StudyFolder(example_study(tmp_path/'small', n_patients=150))


@pytest.fixture()
def closed(tmp_path): return StudyFolder(example_study(tmp_path/'closed', 300, seeds=(1, 2), locked=.4))


def rewrite(path, edit): edit(pd.read_parquet(path)).to_parquet(path, index=False)


def judged_locked(study, n_boot): return locked_table(as_study(study), Replicates(as_study(study), n_boot, 0), .005, .95)


def planned(study, n_boot): return power_table(as_study(study), Replicates(as_study(study), n_boot, 0), .005)


def by_seed_and_fold(s, arm):
    "[S, K] macro AUC of each model"
    grid = s.grid(arm)
    fold, y = s.films(grid[1]).fold.to_numpy(), s.targets(grid[1])
    return np.array([[macro_auc(y[fold == f], p[fold == f]).macro for f in grid[1]] for p in s.probs(arm, grid)])


def test_seeds_are_averaged_on_the_same_replicates(tmp_path):
    s = read_study(example_study(tmp_path/'seeds', 150, seeds=(1, 2)))
    arms, none, prox = summarise(s, 30)['arms'], by_seed_and_fold(s, 'none'), by_seed_and_fold(s, 'prox')
    assert abs(arms['mean'][0] - none.mean()) < 1e-12 and abs(arms.seed_sd[0] - none.mean(1).std(ddof=1)) < 1e-12
    assert abs(arms.change_seed_sd[1] - (prox - none).mean(1).std(ddof=1)) < 1e-12


def test_missing_folds_are_left_out_of_the_tables(study):
    study.fold('prox', 42, 1).done.unlink()
    study.fold('none', 42, 0).done.unlink()
    t = summarise(study, 40)['arms'].set_index('arm')
    assert t.folds.to_dict() == {'none': 2, 'prox': 2} and t.folds_up['prox'].endswith('of 1')


def test_every_verdict_says_how_it_was_adjusted(closed):
    t = summarise(closed, 20)
    for name in ('arms', 'frequent', 'locked'): assert t[name].adjusted[t[name].arm != 'none'].eq('not adjusted').all(), name


def test_power_table_of_a_study(study):
    t = planned(study, 60)
    assert t.arm.tolist() == ['prox', 'prox'] and t.positives.tolist() == ['all', '30 or more']
    assert np.allclose(t.detectable / t.se, norm.ppf(.975) + norm.ppf(.8), rtol=.02) and (t.df == t.patients - 1).all()
    assert len(planned(example_study(study.path.parent/'alone', 100, arms=('none',)), 20)) == 0


def idle(path):
    "Predictions of a fold whose graph does nothing: what is read before it is what is read after it"
    def edit(t): return t.assign(**{f'z{k[1:]}': t[k] for k in t if k.startswith(('r:', 'rf:'))})
    rewrite(path, edit)


def test_a_layer_that_does_nothing_is_called_inactive(closed):
    t = summarise(closed, 20)
    for name in ('arms', 'frequent', 'locked'):
        here = t[name][t[name].arm == 'prox']
        assert np.isfinite(here.own_change).all() and t[name].own_change[t[name].arm == 'none'].isna().all(), name
        assert (here.layer == np.where(here.own_change.abs() < .0005, 'layer inactive', 'layer acts')).all(), name
    for (arm, _, _), fold in closed.found().items():
        if arm == 'prox': idle(fold.oof), idle(fold.locked)
    t = summarise(closed, 20)
    for name in ('arms', 'frequent', 'locked'):
        assert t[name].layer[t[name].arm == 'prox'].eq('layer inactive').all() and t[name].layer[t[name].arm == 'none'].eq('').all(), name


def test_rare_labels_of_a_verdict_are_counted(study):
    t = summarise(study, 20)
    y = read_study(study.path).targets((0, 1, 2))
    few = int((np.minimum((y == 1).sum(), (y == 0).sum()) < 30).sum())
    assert few > 0 and (t['arms'].rare == few).all() and (t['frequent'].rare == 0).all()


def test_a_gain_in_the_last_digits_is_no_gain():
    assert counted_up([1e-6, 2e-5, -1, 0]) == '1 of 4'


def test_no_replicates_and_no_study_are_refused(study):
    with pytest.raises(DataError, match='must be 1 or more'): summarise(study, 0)
    with pytest.raises(DataError, match='there is no study'): summarise('/nowhere/at/all')


# locked patients

def frequent(s):
    "Labels with 30 positives and negatives in both sets"
    n = np.min([np.minimum(y.sum(), (1 - y).sum()) for y in (s.targets(s.folds), s.targets('locked'))], 0)
    return np.flatnonzero(n >= 30).tolist()


def ensemble_by_hand(s, arm, seed):
    "[n, L] mean over folds of the mean over flips of the sigmoid"
    models = []
    for f in s.folds:
        t = s.cells[arm, seed, f]['locked']
        r, rf = (t[[f'{k}:{l}' for l in s.labels]].to_numpy() for k in ('r', 'rf'))
        models.append((expit(r) + expit(rf)) / 2)
    return np.mean(models, 0)


def test_locked_ensemble_is_in_the_stated_order(closed):
    s = read_study(closed)
    grid, locked = s.grid('prox', locked=True), s.films('locked')
    assert grid == ((1, 2), (0, 1, 2)) and (locked.fold == -1).all()
    by_hand = np.stack([ensemble_by_hand(s, 'prox', seed) for seed in (1, 2)])
    assert np.allclose(s.locked_probs('prox', grid), by_hand, atol=1e-6)
    t, y, use = judged_locked(s, 60).set_index(['positives', 'arm']).loc[('30 or more', 'prox')], s.targets('locked'), frequent(s)
    def auc(p): return np.mean([roc_auc_score(y.iloc[:, i], p[:, i]) for i in use])
    assert t.labels == len(use) and abs(t.locked - np.mean([auc(p) for p in by_hand.astype(np.float32)])) < 1e-6
    assert abs(t.all_seeds - auc(by_hand.mean(0))) < 1e-5
    assert (t.films, t.patients) == (len(locked), locked.patient.nunique()) == (len(locked), 120)


def test_locked_intervals_are_those_of_independent_patients(closed):
    t = judged_locked(closed, 2000).set_index(['positives', 'arm']).loc[('30 or more', 'none')]
    locked, oof, less = (t[hi] - t[lo] for lo, hi in (('low', 'high'), ('oof_low', 'oof_high'), ('difference_low', 'difference_high')))
    assert np.isclose(less, np.hypot(locked, oof), rtol=.08)
    s = read_study(closed)
    p = s.locked_probs('none', s.grid('none', locked=True))
    own = auc_interval(s.targets('locked'), p, s.films('locked').patient, n_boot=2000, seed=[0, 1], labels=s.labels)
    assert np.isclose(own.auc.iloc[frequent(s)].mean(), t.locked, atol=1e-12)


def test_locked_arms_are_paired(closed):
    t, s = judged_locked(closed, 300).set_index(['positives', 'arm']), read_study(closed)
    grid = s.grid('none', 'prox', locked=True)
    both = (s.locked_probs(a, grid) for a in ('none', 'prox'))
    expect = paired_bootstrap(s.targets('locked'), *both, s.films('locked').patient, n_boot=300, seed=[0, 1]).loc['macro']
    row = t.loc[('all', 'prox')]
    assert np.allclose(list(row[['change', 'change_low', 'change_high', 'p']]), list(expect[['change', 'low', 'high', 'p']]), atol=1e-12)
    assert row.verdict in ('equivalent', 'better', 'worse', 'undecided') and pd.isna(t.loc[('all', 'none')].change)


def test_locked_films_that_some_folds_have_not_scored(closed):
    closed.fold('prox', 2, 1).locked.unlink()
    s = read_study(closed)
    assert s.notes == ['prox/seed2/fold1 has not scored the locked films: run the study again']
    assert s.grid('prox', locked=True) == ((1, 2), (0, 2)) and s.grid('prox') == ((1, 2), (0, 1, 2))
    t = judged_locked(s, 20).set_index(['positives', 'arm'])
    assert t.folds['all', 'none'] == 3 and t.folds['all', 'prox'] == 2 and np.isfinite(t.change['all', 'prox'])
    for f in closed.path.glob('prox/seed*/fold*/locked.parquet'): f.unlink()
    t = judged_locked(closed, 20).set_index(['positives', 'arm'])
    assert np.isfinite(t.locked['all', 'none']) and np.isnan(t.locked['all', 'prox'])


def test_scale_of_a_study_is_fitted_on_the_mean_probability(closed):
    from scipy.special import logit

    from cxrlg.calibration import fit_platt, rescaled
    s, scale = read_study(closed), fit_calibration(closed)
    p = s.probs('prox', s.grid('prox')).astype(float).mean(0)
    expect, here = fit_platt(s.targets(s.folds), logit(p), s.labels), scale[scale.arm == 'prox']
    assert np.allclose(here[['temperature', 'bias']], expect, rtol=1e-4, atol=1e-4)
    by_hand = expit(logit(p) / expect.temperature.to_numpy() + expect.bias.to_numpy())
    assert np.allclose(rescaled(p, here), by_hand, atol=1e-4)


# little to go by

def only(labels, value):
    "Targets of some labels are all `value`"
    def edit(t): return t.assign(**{f'y:{l}': np.float32(value) for l in labels})
    return edit


LABELS = ['No Finding', 'Cardiomegaly', 'Edema', 'Pneumonia', 'Pleural Effusion', 'Hernia']


@pytest.mark.parametrize('value,why', [(0, 'no positive'), (1, 'no negative'), (np.nan, 'no known target')])
def test_a_study_without_any_auc_ends_with_the_reason_in_its_tables(closed, value, why):
    for fold in closed.found().values():
        for f in (fold.oof, fold.locked): rewrite(f, only(LABELS, value))
    t = summarise(closed, 20)
    assert t['arms']['mean'].isna().all() and t['arms'].note.eq('no macro AUC: ' + '; '.join(f'{l}: {why}' for l in LABELS)).all()
    assert t['labels'].note[t['labels'].label != 'macro'].eq(why).all() and t['labels'].low.isna().all()
    assert t['arms'].verdict[1] == 'undecided' and len(t['locked']) == len(t['power']) == 0


def test_a_label_that_no_fold_can_score_says_why(study):
    positive = study.fold('none', 42, 1)
    for (_, _, f), fold in study.found().items(): rewrite(fold.oof, only(['Edema'], f == positive.fold))
    t = summarise(study, 20)['labels'].set_index(['arm', 'label'])
    assert t.note['none', 'Edema'] == 'no fold has both classes' and t.note['none', 'Cardiomegaly'] == ''
    assert np.isfinite(t.auc['none', 'macro'])


def test_an_interval_of_no_width_is_no_interval(closed):
    def perfect(t): return t.assign(**{f'{k}:Edema': 40 * t['y:Edema'] - 20 for k in ('z', 'r', 'zf', 'rf')})
    for fold in closed.found().values():
        for f in (fold.oof, fold.locked): rewrite(f, perfect)
    t = summarise(closed, 30)
    for name in ('labels', 'locked_labels'):
        here = t[name][t[name].label == 'Edema']
        assert (here.auc == 1).all() and here[['low', 'high']].isna().all(axis=None), name
    assert t['delong'].set_index('label').loc['Edema', ['change', 'se', 'p']].tolist() == [0, 0, 1]
    assert t['changes'].set_index('label').loc['Edema', ['low', 'high', 'p']].isna().all()
