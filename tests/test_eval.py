"""Evaluation: against scikit-learn and definitions, edge cases, damaged studies, full size."""
import json
import re
import time
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from cxrlg.data import DataError
from cxrlg.eval import (auc_interval, bootstrap, calibrated, calibration, cross_calibrated, delong, ensemble, equivalence, example_study, fit_temperature, holm, macro_auc,
                        operating_points, paired_bootstrap, read_study, roc_curves, runs_dir, scores, simulate, study_figures, subgroups, summarise, tta, write_report, _bins, _cumsum, _weights)


def films(n_patients=120, L=4, seed=0):
    y, z, pat = simulate(n_patients, np.linspace(.05, .5, L), 1.2, seed)
    return y, z, pat


@pytest.mark.parametrize('digits', [0, 1, 6])
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_macro_auc_equals_sklearn_with_ties_and_masks(digits, dtype):
    y, z, _ = films()
    y[np.random.default_rng(1).random(y.shape) < .2] = np.nan
    s = z.round(digits).astype(dtype)
    expect = [roc_auc_score(y[k, l], s[k, l]) for l, k in enumerate((~np.isnan(y)).T)]
    r = macro_auc(y, s)
    assert np.allclose(r.auc, expect, atol=1e-12, rtol=0) and abs(r.macro - np.mean(expect)) < 1e-12


def test_rank_invariance_and_reversal():
    y, z, _ = films()
    z = z.astype(float)
    assert np.allclose(macro_auc(y, z).auc, macro_auc(y, z**3 + 5).auc, atol=1e-12)
    assert np.allclose(macro_auc(y, z).auc, 1 - macro_auc(y, -z).auc, atol=1e-12)
    assert np.allclose(macro_auc(y, z).auc, macro_auc(1 - y, -z).auc, atol=1e-12)


@pytest.mark.parametrize('y,reason', [([[1]], 'no negative'), ([[0]], 'no positive'), ([[np.nan]], 'no known target'), ([[0], [0], [np.nan]], 'no positive')])
def test_one_film_one_class_all_nan(y, reason):
    s, pat = np.full((len(y), 1), .5), np.arange(len(y))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = macro_auc(y, s, ['Edema'])
        assert r.skipped == {'Edema': reason} and np.isnan(r.macro)
        t = auc_interval(y, s, pat, n_boot=20)
        assert t.auc.isna().all() and t.low.isna().all() and (t.lost == 1).all()
        assert paired_bootstrap(y, s, s, pat, n_boot=20).isna().all(axis=None)
        assert delong(y, s, s).isna().all(axis=None) and roc_curves(y, s) == {} and len(operating_points(y, s)) == 0
        assert fit_temperature(y, s).notna().all(axis=None)
        c = calibration(y, s, n_boot=20)
        assert c.ece.notna().all(axis=None) == (reason != 'no known target')


def test_one_positive():
    y, s, pat = np.eye(1, 40).T, np.random.default_rng(0).random((40, 1)), np.arange(40)
    t = auc_interval(y, s, pat, n_boot=400)
    assert abs(t.auc.iloc[0] - roc_auc_score(y[:, 0], s[:, 0])) < 1e-12 and .25 < t.lost.iloc[0] < .5
    assert np.isnan(delong(y, s).se.item())


def test_ties_everywhere():
    y, _, pat = films()
    s = np.full(y.shape, .3)
    t = paired_bootstrap(y, s, s, pat, n_boot=50)
    assert (t.a == .5).all() and (t[['diff', 'low', 'high']] == 0).all(axis=None) and (t.p == 1).all()
    d = delong(y, s, s, pat)
    assert (d.p == 1).all() and (d.se == 0).all()
    assert (delong(y, s).auc == .5).all()


def test_perfect_separation():
    y, _, pat = films()
    d = delong(y, y.copy(), clusters=pat)
    assert (d.auc == 1).all() and (d.low == 1).all()
    assert np.isfinite(fit_temperature(y, y * 20 - 10)).all(axis=None)


def test_macro_row_and_frames_keep_names():
    y, z, pat = films()
    names = list('abcd')
    assert list(auc_interval(pd.DataFrame(y, columns=names), z, pat, n_boot=5).index) == names + ['macro']
    with pytest.raises(DataError, match='same columns'): macro_auc(pd.DataFrame(y, columns=names), pd.DataFrame(z, columns=names[::-1]))


@pytest.mark.parametrize('call,text', [
    (lambda y, z, p: macro_auc(y, np.where(np.arange(len(z))[:, None] == 7, np.nan, z)), r'rows have NaN or infinite scores, first rows \[7\]'),
    (lambda y, z, p: macro_auc(y * 2, z), r'only 0, 1 and NaN'),
    (lambda y, z, p: macro_auc(y[:5], z), r'must agree'),
    (lambda y, z, p: macro_auc(y, z, ['a']), r'1 label names for 4 columns'),
    (lambda y, z, p: macro_auc(y, np.stack([z, z])), r'average the seeds first'),
    (lambda y, z, p: auc_interval(y, z, p[:-1]), r'patients for \d+ films'),
    (lambda y, z, p: auc_interval(y, z, np.where(p == 0, np.nan, p)), r'have no patients, first row 0'),
    (lambda y, z, p: auc_interval(y, z, p, folds=p[:3]), r'3 folds for'),
    (lambda y, z, p: auc_interval(y[:0], z[:0], p[:0]), r'no film to evaluate'),
    (lambda y, z, p: bootstrap(y, z, p, metric='f1'), r"'f1' is unknown"),
    (lambda y, z, p: calibration(y, z * 5), r'through the sigmoid first'),
    (lambda y, z, p: cross_calibrated(y, z, np.zeros(len(y))), r'two folds or more'),
    (lambda y, z, p: ensemble([]), r'at least one'),
    (lambda y, z, p: ensemble([np.array([np.nan])]), r'model 0 has 1 values'),
    (lambda y, z, p: equivalence(0, (0, 0), -1), r'must be above 0'),
    (lambda y, z, p: summarise('/nowhere/at/all'), r'there is no study'),
])
def test_bad_input_is_one_line(call, text):
    with pytest.raises(DataError, match=text) as e: call(*films())
    assert '\n' not in str(e.value)


def test_bootstrap_equals_weighted_sklearn_by_fold_and_model():
    y, z, pat = films()
    y[::7, 1] = np.nan
    folds, z2 = pat % 3, z.round(1)
    reps = bootstrap(y, np.stack([z, z2]), pat, folds, n_boot=4, seed=5)
    w = np.concatenate(list(_weights(len(set(pat)), 4, 5)), 1)[pat]
    for b in range(5):
        for m, s in enumerate((z, z2)):
            for f in range(3):
                for l in range(4):
                    k = (folds == f) & ~np.isnan(y[:, l]) & (w[:, b] > 0)
                    expect = roc_auc_score(y[k, l], s[k, l], sample_weight=w[k, b]) if len(set(y[k, l])) == 2 else np.nan
                    assert np.isclose(reps[b, m, f, l], expect, atol=1e-12, rtol=0, equal_nan=True)


def test_replicates_do_not_depend_on_the_chunk():
    a, b = (np.concatenate(list(_weights(37, 100, 3, chunk)), 1) for chunk in (7, 256))
    assert (a == b).all() and (a.sum(0) == 37).all()


def test_same_seed_same_bytes_and_rows_without_fold_left_out():
    y, z, pat = films()
    folds = np.where(pat % 4 == 3, -1, pat % 4)
    a, b = (bootstrap(y, z, pat, folds, n_boot=30) for _ in range(2))
    assert a.tobytes() == b.tobytes() and a.shape == (31, 1, 3, 4)


def test_cumsum_is_exact():
    x = np.random.default_rng(0).integers(0, 9, (1001, 5)).astype(np.float32) / 2
    for k in (1, 2, 31, 32, 33, 1000, 1001): assert (_cumsum(x[:k]) == np.cumsum(x[:k], 0, dtype=float)).all()


def test_average_precision_and_losses_under_weights():
    y, z, pat = films()
    p = tta(z, z)
    w = np.concatenate(list(_weights(len(set(pat)), 3, 0)), 1)[pat]
    ap, brier = (bootstrap(y, p, pat, metric=m, n_boot=3)[:, 0, 0] for m in ('ap', 'brier'))
    for b in range(4):
        assert np.allclose(ap[b], [average_precision_score(y[:, l], p[:, l], sample_weight=w[:, b]) for l in range(4)], atol=1e-9)
        assert np.allclose(brier[b], np.average((p - y)**2, 0, w[:, b]), atol=1e-9)
    assert set(scores(y, p).columns) == {'auc', 'ap', 'log_loss', 'brier', 'prevalence'}


def test_delong_pair_is_the_two_singles_when_independent_of_order():
    y, z, pat = films()
    ab, ba = delong(y, z, z.round(), pat), delong(y, z.round(), z, pat)
    assert np.allclose(ab['diff'], -ba['diff']) and np.allclose(ab.se, ba.se) and np.allclose(ab.p, ba.p)
    assert np.allclose(ab.p_holm, holm(ab.p)) and (ab.p_holm >= ab.p).all()


def test_repeating_every_film_does_not_shrink_a_clustered_interval():
    y, z, _ = films()
    one, two = delong(y, z, clusters=np.arange(len(y))), delong(np.repeat(y, 2, 0), np.repeat(z, 2, 0), clusters=np.repeat(np.arange(len(y)), 2))
    assert np.allclose(one.se, two.se, rtol=1e-9)


def test_holm_against_definition():
    p = np.array([.04, .001, np.nan, .03, .5])
    assert np.allclose(holm(p), [.09, .004, np.nan, .09, .5], equal_nan=True)


def test_tta_then_ensemble_is_the_stated_order():
    z, zf = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    s = lambda x: 1 / (1 + np.exp(-x))
    assert np.allclose(ensemble([tta(a, b) for a, b in zip(z, zf)]), ((s(z) + s(zf)) / 2).mean(0), atol=1e-12)
    f = pd.DataFrame(z[0], columns=list('abcd'))
    assert list(ensemble([tta(f, f), tta(f, f)]).columns) == list('abcd')
    assert tta(np.array([[1e4, -1e4]]), np.array([[1e4, -1e4]])).tolist() == [[1., 0.]]


def test_scale_keeps_every_auc_within_a_fold_and_is_nested():
    y, z, pat = films(300)
    folds = pat % 3
    q = cross_calibrated(y, z * 3, folds)
    for f in range(3):
        k = folds == f
        assert np.allclose(macro_auc(y[k], z[k].astype(float)).auc, macro_auc(y[k], q[k]).auc, atol=1e-12)
        assert np.allclose(q[k], calibrated(z[k] * 3, fit_temperature(y[~k], z[~k] * 3)), atol=1e-12)


def test_scale_refuses_to_reverse_a_label():
    y, z, _ = films(300)
    t = fit_temperature(1 - y, z)
    assert (t.temperature > 0).all()


def test_calibration_intervals_hold_the_truth():
    rng, perfect, off = np.random.default_rng(0), [], []
    for i in range(60):
        p = rng.beta(1, 4, (800, 1))
        y = (rng.random(p.shape) < p).astype(float)
        a, b = (calibration(y, q, n_boot=200, seed=i).ece.iloc[0] for q in (p, p * .5 + .3))
        truth = np.mean(np.abs(p - (p * .5 + .3)))
        perfect.append(a.low <= .001 and a.low <= a.ece <= a.high); off.append(b.low <= truth <= b.high)
    assert np.mean(perfect) > .93 and np.mean(off) > .93


def test_bins_keep_ties_together():
    b = _bins(np.array([0., 0, 0, 0, .5, .5, 1]), 15)
    assert len(set(b[:4])) == 1 and b.max() == 2


def test_operating_points_use_the_other_folds():
    y, z, pat = films(300)
    p, folds = tta(z, z), pat % 3
    r = operating_points(y, p, folds).set_index(['label', 'rule']).loc[('label 3', 'sensitivity 0.9')]
    called = np.zeros(len(y), bool)
    for f in range(3):
        fit = np.sort(p[(folds != f) & (y[:, 3] == 1), 3])[::-1]
        called[folds == f] = p[folds == f, 3] >= fit[int(np.ceil(.9 * len(fit))) - 1]
    assert abs(r.sensitivity - called[y[:, 3] == 1].mean()) < 1e-12


def test_subgroups_name_the_small_and_compare_on_common_labels():
    y, z, pat = films(400)
    y[:, 0] = 0
    g = pd.DataFrame(dict(sex=np.where(pat < 10, 'X', np.where(pat % 2, 'F', 'M')), nobody=[None] * len(y)))
    t = subgroups(y, z, pat, g, n_boot=50).set_index('value')
    assert t.note['X'].startswith('too small') and (t.labels[['F', 'M']] == 3).all() and list(t.variable.unique()) == ['sex']


def test_full_size_is_fast_and_small():
    y, z, pat = simulate(7500, np.linspace(.01, .4, 14), 1.5)
    start = time.perf_counter()
    for l in range(14): roc_auc_score(y[:, l], z[:, l])
    one = time.perf_counter() - start
    tracemalloc.start()
    bootstrap(y[:3000], z[:3000], pat[:3000], n_boot=300)
    small = tracemalloc.get_traced_memory()[1]; tracemalloc.reset_peak()
    bootstrap(y, z, pat, n_boot=300)
    assert tracemalloc.get_traced_memory()[1] < 1e9 and small < 1e9
    tracemalloc.stop()
    start = time.perf_counter()
    auc_interval(y, z, pat, n_boot=2000)
    assert len(y) > 24000 and 2000 * one > 50 * (time.perf_counter() - start)


def test_a_million_rows():
    rng = np.random.default_rng(0)
    y = (rng.random((1_000_000, 1)) < .3).astype(float)
    s = (y + rng.normal(size=y.shape)).astype(np.float32)
    assert abs(macro_auc(y, s).macro - roc_auc_score(y[:, 0], s[:, 0])) < 1e-12
    t = auc_interval(y, s, np.arange(len(y)) // 4, n_boot=8)
    assert t.low.iloc[0] < t.auc.iloc[0] < t.high.iloc[0] and abs(t.auc.iloc[0] - roc_auc_score(y[:, 0], s[:, 0])) < 1e-12
    assert delong(y, s).se.item() < .001


@pytest.fixture()
def study(tmp_path): return example_study(tmp_path / 'small', n_patients=150)


def test_study_with_missing_folds_is_evaluated_and_says_so(study):
    (study / 'prox/seed42/fold1/done.json').unlink()
    for f in (study / 'none/seed42/fold0').iterdir(): f.unlink()
    (study / 'none/seed42/fold0').rmdir()
    s = read_study(study)
    assert s.notes == ['none/seed42/fold0 is missing: left out', 'prox/seed42/fold1 is not finished: left out']
    t = summarise(s, 40)
    assert t['arms'].set_index('arm').folds.to_dict() == {'none': 2, 'prox': 2}
    assert t['arms'].set_index('arm').folds_up['prox'].endswith('of 1')
    html = write_report(s, t, {}).read_text()
    assert all(n in html for n in s.notes)


def test_study_of_one_fold_one_arm_or_without_none(tmp_path):
    one = example_study(tmp_path / 'one', 200, arms=('none',), n_splits=2)
    (one / 'none/seed42/fold1/done.json').unlink()
    assert write_report(one, figures={}, n_boot=30).exists() and len(summarise(one, 30)['changes']) == 0
    html = write_report(example_study(tmp_path / 'without', 150, arms=('l1',), n_splits=2), figures={}, n_boot=30).read_text()
    assert 'There is no arm none to compare with.' in html


def test_seeds_are_averaged_on_the_same_replicates(tmp_path):
    s = read_study(example_study(tmp_path / 'seeds', 150, seeds=(1, 2)))
    row, grid = summarise(s, 30)['arms'].iloc[0], s.grid('none')
    fold = s.films(grid[1]).fold.to_numpy()
    each = [[macro_auc(s.targets(grid[1])[fold == f], p[fold == f]).macro for f in grid[1]] for p in s.probs('none', grid)]
    assert grid[0] == (1, 2) and abs(row['mean'] - np.mean(each)) < 1e-12 and abs(row.seed_sd - np.std(np.mean(each, 1), ddof=1)) < 1e-12
    (s.path / 'none/seed2/fold1/done.json').unlink()
    s = read_study(s.path)
    assert s.grid('none') == ((1, 2), (0, 2)) and 'none/seed1/fold1 is finished but left out: not every seed of none has this fold' in s.notes


def change(path, edit):
    oof = pd.read_parquet(path)
    edit(oof).to_parquet(path, index=False)


@pytest.mark.parametrize('damage,text', [
    (lambda d: change(d / 'oof.parquet', lambda t: t.assign(**{'y:Edema': 1 - t['y:Edema']})), 'different films or targets'),
    (lambda d: change(d / 'oof.parquet', lambda t: t.iloc[1:]), 'different films or targets'),
    (lambda d: change(d / 'oof.parquet', lambda t: t.assign(**{'r:Edema': np.nan})), 'NaN or infinite logits'),
    (lambda d: change(d / 'oof.parquet', lambda t: t.drop(columns='zf:Edema')), 'has no column zf:Edema'),
    (lambda d: change(d / 'oof.parquet', lambda t: t.drop(columns=[c for c in t if c.endswith(':Edema')])), 'same labels in every arm'),
    (lambda d: (d / 'oof.parquet').write_bytes(b'PAR1 cut off'), 'cannot be read'),
    (lambda d: (d / 'oof.parquet').unlink(), 'cannot be read'),
    (lambda d: (d / 'history.csv').write_text(''), 'cannot be read'),
    (lambda d: (d / 'config.json').write_text('{'), 'cannot be read'),
    (lambda d: (d / 'config.json').write_text(json.dumps(dict(n_splits=3, hashes=dict(table='other', folds='simulated')))), 'another table'),
])
def test_damaged_fold_is_named_in_one_line(study, damage, text):
    damage(study / 'prox/seed42/fold1')
    with pytest.raises(DataError, match=text) as e: read_study(study)
    assert 'fold1' in str(e.value) and '\n' not in str(e.value)


def test_no_done_fold(tmp_path):
    (tmp_path / 'none/seed42/fold0').mkdir(parents=True)
    with pytest.raises(DataError, match='no finished fold'): read_study(tmp_path)


def test_report_is_self_contained_safe_and_the_same_twice(study, tmp_path):
    evil = example_study(tmp_path / 'a<b>&c', 150)
    html = write_report(evil, n_boot=30).read_text()
    assert '<b>&c' not in html and 'a&lt;b&gt;&amp;c' in html
    assert not re.search(r'(src|href)="(?!data:|#)', html) and '<script' not in html and 'viewport' in html and '@media print' in html
    assert html.count('<img') == len(re.findall(r'<img [^>]*alt="[^"]+"', html)) == 6
    assert 'nan' not in re.sub(r'base64,[^"]*', '', html).lower().replace('finan', '')
    first = {f.name: f.read_bytes() for f in evil.rglob('*') if f.is_file()}
    write_report(evil, n_boot=30)
    assert first == {f.name: f.read_bytes() for f in evil.rglob('*') if f.is_file()}
    assert not list(evil.glob('*.tmp-*'))


def test_phantom_is_said_in_every_heading_and_figure(tmp_path):
    s = read_study(example_study(tmp_path / 'p', 150, data='phantom'))
    t = summarise(s, 30)
    f = study_figures(s, t)
    html = write_report(s, t, f).read_text()
    assert all('(phantom)' in h for h in re.findall(r'<h\d[^>]*>(.*?)</h\d>', html)) and all('(phantom)' in c for c in re.findall(r'<figcaption>(.*?)</figcaption>', html))
    assert all('phantom' in [x.get_text() for x in g.texts] for g, _, _ in f.values())


def test_results_files_say_the_same(study):
    t = summarise(study, 50)
    write_report(study, t, {})
    csv, js = pd.read_csv(study / 'results.csv'), json.loads((study / 'results.json').read_text())
    assert np.allclose(csv['mean'], [r['mean'] for r in js['arms']], atol=1e-6) and {'arm', 'mean', 'low', 'high', 'pooled', 'change', 'verdict'} <= set(csv)
    assert js['study'] == 'small' and set(t) < set(js)


def test_runs_dir(tmp_path, monkeypatch):
    monkeypatch.delenv('CXRLG_RUNS', raising=False)
    (tmp_path / 'nbs').mkdir(); (tmp_path / 'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path / 'nbs')
    assert runs_dir() == tmp_path / 'runs' and str(runs_dir('x')) == 'x'
    monkeypatch.setenv('CXRLG_RUNS', '/elsewhere')
    assert str(runs_dir()) == '/elsewhere'
