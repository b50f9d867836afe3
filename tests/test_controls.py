"Controls of couplings: exactness of the zero, nesting, bad input, and defined behaviour where there is nothing to fit."
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

import cxrlg.controls as room
from cxrlg.controls import CORRECTIONS, MARGINS, Outputs, confirm, coupling_controls, coupling_power, fit_stacking, ising_graph, load_outputs, load_study, nested, permute_labels, save_outputs, save_study
from cxrlg.core import DataError
from cxrlg.eval import example_study, read_study, simulate
from cxrlg.graph import planted_logits


@pytest.fixture(scope='module')
def out():
    y, z, patients = simulate(500, [.3, .2, .1, .25], [1.5, 1.2, 1.8, 1.], seed=5)
    return Outputs(y, np.stack([z, z + .3*np.random.default_rng(0).normal(size=z.shape)]), patients, patients % 3, list('ABCD'), context=np.where(patients % 2, 'AP', 'PA'))


def test_scale_changes_no_auc_and_stays_in_its_fold(out):
    "Within a fold a temperature and a bias keep every order: the change of every AUC is exactly 0"
    new, fitted = nested(out, 'scale')
    for s in range(2):
        for k in range(3):
            here = out.folds == k
            for j in range(4): assert roc_auc_score(out.targets[here, j], new[s, here, j]) == roc_auc_score(out.targets[here, j], out.logits[s, here, j])
    assert (new != out.logits).any() and len(fitted) == 6


@pytest.mark.parametrize('name', sorted(CORRECTIONS))
def test_a_fold_is_corrected_without_its_own_targets(out, name):
    "Nesting: changing the targets of a fold changes nothing in its own corrected logits"
    small = Outputs(out.targets, out.logits[:1], out.patients, out.folds, out.labels, context=out.context)
    here, other = out.folds == 1, np.array(out.targets)
    other[here] = 1 - other[here]
    changed = Outputs(other, out.logits[:1], out.patients, out.folds, out.labels, context=out.context)
    a, b = nested(small, name)[0], nested(changed, name)[0]
    assert np.array_equal(a[:, here], b[:, here])
    if name != 'scale': assert np.isfinite(b).all()


def test_the_table_is_the_mean_over_folds_and_seeds(out):
    c = coupling_controls(out, arms=('scale', 'stacking'), n_boot=200, bar=False)
    t = c.table[c.table.metric == 'auc'].set_index('arm')
    auc = lambda z: np.mean([[np.mean([roc_auc_score(out.targets[out.folds == k, j], z[s, out.folds == k, j]) for j in range(4)]) for k in range(3)] for s in range(2)])
    assert t.before['stacking'] == pytest.approx(auc(out.logits), abs=1e-12)
    assert t.change['stacking'] == pytest.approx(auc(c.scores['stacking']) - auc(out.logits), abs=1e-12)
    assert (t.loc['scale', ['change', 'low', 'high', 'seed_sd']] == 0).all() and t.verdict['scale'] == 'equivalent'
    cells = c.folds[c.folds.arm == 'stacking']
    assert len(cells) == 6 and t.up['stacking'] == f'{(cells.change > 0).sum()} of 6'
    assert t.seed_sd['stacking'] == pytest.approx(cells.groupby('seed').change.mean().std(ddof=1))


def test_trained_arms_stand_in_the_same_table(out):
    better = out.logits + .8*(out.targets - .5)
    c = coupling_controls(Outputs(out.targets, out.logits, out.patients, out.folds, out.labels, dict(prox=better)), arms=('scale',), n_boot=200, bar=False)
    t = c.table[c.table.metric == 'auc'].set_index('arm')
    assert list(t.index) == ['prox', 'scale'] and t.verdict['prox'] == 'better' and t.low['prox'] > MARGINS['auc']


def test_placebo_destroys_the_link_and_keeps_the_label():
    z, y, A = planted_logits(8000, n_labels=6, n_edges=6, size=(6, 9), seed=1)
    y[::11, 2] = np.nan
    new = permute_labels(z, y, seed=3)
    assert np.array_equal(np.sort(new, 0), np.sort(y, 0), equal_nan=True)
    assert abs(roc_auc_score(y[:, 0], z[:, 0]) - roc_auc_score(new[:, 0], z[:, 0])) < .01
    assert CORRECTIONS['couplings'](z, y, np.arange(8000))[1].nonzero >= 5
    assert CORRECTIONS['couplings'](z, new, np.arange(8000))[1].nonzero <= 1


def test_ising_pseudo_likelihood_without_penalty_is_the_log_odds_ratio():
    rng = np.random.default_rng(0)
    a = rng.random(3000) < .4
    b = rng.random(3000) < np.where(a, .5, .2)
    W = ising_graph(np.c_[a, b].astype(float), lam=0.).A
    t = pd.crosstab(a, b).to_numpy()
    assert W[0, 1] == pytest.approx(np.log(t[0, 0]*t[1, 1]/t[0, 1]/t[1, 0]), abs=1e-5) and W[0, 1] == W[1, 0]


def test_stacking_without_penalty_is_a_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    z, y, _ = planted_logits(3000, n_labels=3, n_edges=3, seed=2)
    apply, _ = fit_stacking(z, y, np.arange(3000), Cs=(1e8,))
    ref = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(z, y[:, 1]).decision_function(z)
    assert apply(z)[:, 1] == pytest.approx(ref, abs=1e-3)


@pytest.mark.parametrize('change', ['constant label', 'three positives', 'collinear logits', 'huge logits', 'unknown targets', 'one label'])
def test_every_correction_is_finite_on_hard_input(change):
    z, y, patients = (np.array(o) for o in (lambda t: (t[1].astype(float), t[0], t[2]))(simulate(150, [.3, .2, .25], 1.5, seed=6)))
    if change == 'constant label': y[:, 0] = 0
    if change == 'three positives': y[:, 0] = 0; y[:3, 0] = 1
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


def test_refusals(out):
    with pytest.raises(DataError, match='must agree'): Outputs(out.targets, out.logits[:, :5], out.patients, out.folds, out.labels)
    with pytest.raises(DataError, match='one a film'): Outputs(out.targets, out.logits, out.patients[:5], out.folds, out.labels)
    with pytest.raises(DataError, match='two folds'): nested(Outputs(out.targets, out.logits, out.patients, out.folds*0, out.labels), 'scale')
    with pytest.raises(DataError, match='no correction'): coupling_controls(out, arms=['x'])
    with pytest.raises(DataError, match='locked patients are in the folds'): confirm(out, out.targets, out.logits[:, None], out.patients)


def test_views_are_corrected_apart():
    "Scale by view equals the scale fitted to that view alone; an unseen or rare view gets the common one"
    y, z, patients = simulate(300, [.3, .2], 1.5, seed=4)
    view = np.where(patients < 10, 'few', np.where(patients % 2, 'AP', 'PA'))
    apply, fitted = CORRECTIONS['scale_by_view'](z, y, patients, view)
    new = apply(z, view)
    for v in ('AP', 'PA'): assert np.array_equal(new[view == v], CORRECTIONS['scale'](z[view == v], y[view == v], patients[view == v])[0](z[view == v]))
    common = CORRECTIONS['scale'](z, y, patients)[0](z)
    assert np.array_equal(new[view == 'few'], common[view == 'few']) and set(fitted) == {'AP', 'PA'}
    assert np.array_equal(apply(z, np.full(len(z), 'new')), common)


def test_saved_outputs_come_back_and_judge_alike(out, tmp_path):
    "Logits are kept to 1/1024: the AUC moves by less than its rounding matters"
    y, z, patients = simulate(80, [.3, .2, .1, .25], 1.5, seed=9)
    locked = (y, np.stack([z, z])[:, None], patients + 10_000, np.where(patients % 2, 'AP', 'PA'))
    save_outputs(out, tmp_path/'o.npz', locked, note='test')
    back, held, more = load_outputs(tmp_path/'o.npz')
    assert np.abs(back.logits - out.logits).max() <= .5/1024 + 1e-9 and np.array_equal(back.targets, out.targets, equal_nan=True)
    assert (pd.factorize(back.patients)[0] == pd.factorize(out.patients)[0]).all() and back.labels == out.labels and str(more['note']) == 'test'
    assert list(back.context) == list(out.context) and list(held[3]) == list(locked[3])
    assert held[1].shape == locked[1].shape and not set(held[2]) & set(back.patients)
    for j in range(4): assert abs(roc_auc_score(out.targets[:, j], back.logits[0, :, j]) - roc_auc_score(out.targets[:, j], out.logits[0, :, j])) < 1e-4
    (tmp_path/'bad.npz').write_bytes(b'nothing')
    with pytest.raises(DataError, match='bad.npz'): load_outputs(tmp_path/'bad.npz')


@pytest.fixture()
def study(tmp_path): return read_study(example_study(tmp_path/'real'/'demo', arms=('none', 'prox'), seeds=(42, 43), n_patients=300, locked=.2))


def test_a_kept_study_names_no_film_no_patient_and_no_folder(study, tmp_path):
    "Only rows, running numbers, and sex, age and view"
    for c in study.cells.values(): c['config'] |= dict(weights='/srv/someone/w.pth', data_args={'csv': '/srv/someone/patients.csv'}, data_dir='/films')
    save_study(study, tmp_path/'kept.npz')
    with np.load(tmp_path/'kept.npz') as f: texts = ' '.join(str(f[k]) for k in f if f[k].dtype.kind == 'U')
    names = set(study.films((0,)).image) | set(study.films((0,)).patient)
    assert not [n for n in names if n in texts] and 'someone' not in texts and '/films' not in texts
    assert 'w.pth' in texts and 'patients.csv' in texts


def test_what_a_kept_study_lacks_is_said(tmp_path):
    whole = example_study(tmp_path/'demo', arms=('none', 'prox'), seeds=(42, 43), n_patients=300, locked=.2)
    (whole/'prox'/'seed43'/'fold1'/'done.json').unlink(); (whole/'none'/'seed42'/'fold0'/'locked.parquet').unlink()
    study = read_study(whole)
    save_study(study, tmp_path/'kept.npz')
    back = load_study(tmp_path/'kept.npz')
    assert back.notes[:len(study.notes)] == study.notes and any('that all arms share' in n for n in back.notes) and not back.has_locked
    assert any('locked films are left out' in n for n in back.notes)


def test_fewer_labels_are_kept_with_their_own_couplings(study, tmp_path):
    few = study.frequent(30)
    save_study(few, tmp_path/'few.npz')
    back = load_study(tmp_path/'few.npz')
    assert back.labels == few.labels
    for k, c in back.cells.items():
        if c['couplings'] is not None: assert np.allclose(c['couplings'], study.cells[k]['couplings'].loc[few.labels, few.labels], atol=1e-6)


def test_a_damaged_kept_study_is_refused_in_one_line(study, tmp_path):
    save_study(study, tmp_path/'kept.npz')
    with np.load(tmp_path/'kept.npz') as f: parts = dict(f)
    for change in (dict(people=None), dict(rows=parts['more:rows'][:-3]), dict(people='sex,age\nF,30\n')):
        broken = {k: v for k, v in parts.items() if k[5:] not in change} | {f'more:{k}': v for k, v in change.items() if v is not None}
        np.savez_compressed(tmp_path/'broken.npz', **broken)
        with pytest.raises(DataError, match='damaged'): load_study(tmp_path/'broken.npz')
    whole = (tmp_path/'kept.npz').read_bytes()
    directory = whole.index(b'PK\x01\x02')
    for i in (*range(0, len(whole), len(whole)//40), *range(directory, directory + 46), *range(len(whole) - 22, len(whole))):
        for mask in (1, 16, 255):
            (tmp_path/'flipped.npz').write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1:])
            try: load_study(tmp_path/'flipped.npz')
            except DataError as e: assert '\n' not in str(e) and not str(e).endswith(': ')


def test_arms_of_other_seeds_are_refused(out):
    with pytest.raises(DataError, match='arm prox has logits of shape'): Outputs(out.targets, out.logits, out.patients, out.folds, out.labels, dict(prox=out.logits[:1]))


def test_lower_is_better_for_the_brier_score():
    y, z, patients = simulate(300, [.3, .2], 1.5, seed=1)
    out = Outputs(y, z, patients, patients % 3, ['A', 'B'], dict(worse=z[None] + 3))
    t = coupling_controls(out, arms=(), metrics=('brier', 'log_loss'), n_boot=100, bar=False).table
    assert (t.change > .01).all() and (t.verdict == 'worse').all() and (t.up == '0 of 3').all()
    with pytest.raises(DataError, match="no metric 'breir'; did you mean 'brier'"): coupling_controls(out, arms=(), metrics=('breir',), n_boot=10, bar=False)
    with pytest.raises(DataError, match="no correction 'prox'"): confirm(out, y, z[None, None], patients + 10**6, arms=['prox'])


def test_planted_couplings_are_found_where_they_are_strong_and_their_gain_is_not_exceeded():
    y, z, patients = simulate(900, [.3, .2, .15, .25], 1.5, seed=4)
    out = Outputs(y, z, patients, patients % 3, list('ABCD'))
    t = coupling_power(out, sizes=(0, 6), n_edges=3, draws=2, n_boot=100, bar=False)
    assert len(t) == 8 and set(t['size']) == {0, 6}
    nothing, strong = t[t['size'] == 0], t[t['size'] == 6]
    assert (nothing.truth == 0).all() and not nothing.better.any() and (nothing.found == 0).all()
    assert strong.better.all() and (strong.found > 2).all() and (strong.change < strong.truth + .01).all() and (strong.truth > .02).all()
    assert t.equals(coupling_power(out, sizes=(0, 6), n_edges=3, draws=2, n_boot=100, bar=False))
    for wrong, says in ((dict(n_edges=13), '13 couplings cannot be planted between 4 findings'), (dict(draws=0), 'at least one of each'), (dict(arms=('stacking',)), "'stacking' fits no matrix")):
        with pytest.raises(DataError, match=says): coupling_power(out, **dict(bar=False) | wrong)


def test_labels_are_drawn_from_the_planted_couplings():
    y, z, patients = simulate(4000, [.3, .2, .15, .25], 1.5, seed=4)
    y[:50, 1] = np.nan
    planted, A = room._plant(Outputs(y, z, patients, patients % 3, list('ABCD')), [0, 1, 2], 5., 2, 7)
    assert (A != 0).sum() == 2 and set(np.abs(A[A != 0])) == {5.} and not A[3].any() and not A[:, 3].any() and not A.diagonal().any()
    assert np.isnan(planted.targets[:50, 1]).all() and not np.isnan(planted.targets[50:]).any()
    known = planted.targets[50:]
    assert np.allclose(known.mean(0), expit(planted.arms['truth'][0][50:]).mean(0), atol=.03)
