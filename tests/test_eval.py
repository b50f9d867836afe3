"""Evaluation: against scikit-learn and definitions, edge cases, damaged studies, full size."""
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from cxrlg.core import DataError
from cxrlg.eval import (PairedError, auc_interval, bootstrap, calibrated, calibration, cross_calibrated, delong, detectable, ensemble, equivalence, example_study, fit_calibration, fit_temperature,
                        holm, locked_table, macro_auc, operating_points, paired_bootstrap, paired_error, patients_needed, plot_locked, power, power_table, read_study, rescaled, roc_curves, runs_dir, scores,
                        simulate, study_figures, subgroups, summarise, tta, write_report, _bins, _cumsum, _verdict, _weights)


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
    (lambda y, z, p: macro_auc(y, z, list('abba')), r"labels \['a', 'b'\] are named more than once"),
    (lambda y, z, p: paired_error(y, z, z[:5], p), r'must agree'),
    (lambda y, z, p: patients_needed(PairedError(0, 9, 1, .01, 0, np.nan), 0), r'gain=0'),
    (lambda y, z, p: patients_needed(PairedError(0, 9, 1, .01, 0, np.nan), .1, margin=.05), r'not within margin'),
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


def test_scores_equal_sklearn():
    y, z, _ = films(200)
    y[::9, 2] = np.nan
    p = expit(z.round(1).astype(float))
    t = scores(y, p)
    for l in range(4):
        k = ~np.isnan(y[:, l])
        expect = dict(auc=roc_auc_score(y[k, l], p[k, l]), ap=average_precision_score(y[k, l], p[k, l]), log_loss=log_loss(y[k, l], p[k, l]), brier=brier_score_loss(y[k, l], p[k, l]))
        assert all(abs(t[m].iloc[l] - v) < 1e-12 for m, v in expect.items())
        assert abs(t.prevalence.iloc[l] - y[k, l].mean()) < 1e-12
    assert np.allclose(t.iloc[-1, :4], t.iloc[:-1, :4].mean(), atol=1e-12)


def test_delong_has_students_t_with_the_patients_of_the_smaller_class():
    y, z, pat = films()
    t, n = delong(y, z, z.round(), pat), delong(y, z, z.round(), pat, normal=True)
    expect = [min(len(set(pat[y[:, l] == k])) for k in (0, 1)) - 1 for l in range(4)]
    assert t.df.tolist() == expect and np.isinf(n.df).all() and np.allclose(t.se, n.se)
    assert np.allclose((n.high - n.low) / 2 / n.se, norm.ppf(.975)) and ((t.high - t.low) > (n.high - n.low)).all() and (t.p > n.p).all()
    assert np.allclose(n.p, 2 * norm.sf(np.abs(n['diff']) / n.se))


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
    for n in (3000, len(y)): assert peak_of(lambda: bootstrap(y[:n], z[:n], pat[:n], n_boot=300))[1] < 1e9
    by_roc_auc_score = 2000*seconds_of(lambda: [roc_auc_score(y[:, l], z[:, l]) for l in range(14)], 5)
    assert len(y) > 24000 and by_roc_auc_score > 50*seconds_of(lambda: auc_interval(y, z, pat, n_boot=2000), 2)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='anonymous memory is read from Linux\'s /proc')
def test_full_size_stays_below_a_gigabyte():
    code = ('import numpy as np; from cxrlg.eval import auc_interval, simulate; y, z, p = simulate(7500, np.linspace(.01, .4, 14), 1.5); print(len(y), flush=True); auc_interval(y, z, p, n_boot=2000); print("done")')
    child, peak = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True), 0
    while child.poll() is None:
        try: peak = max(peak, int((re.search(r'RssAnon:\s+(\d+)', open(f'/proc/{child.pid}/status').read()) or [0, 0])[1]))
        except (FileNotFoundError, ProcessLookupError): break
        time.sleep(.003)
    said = child.communicate()[0].split()
    assert child.returncode == 0 and int(said[0]) > 24000 and said[1] == 'done' and 50_000 < peak < 1_000_000, peak


def peak_of(call):
    tracemalloc.start()
    try: return call(), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()


def seconds_of(call, n):
    "The least processor time of `n` calls, which other processes do not lengthen"
    spent = []
    for _ in range(n):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return min(spent)


@pytest.mark.parametrize('n_patients', [200, 250_000])
def test_a_million_rows(n_patients):
    rng = np.random.default_rng(0)
    y = (rng.random((1_000_000, 1)) < .3).astype(float)
    s, pat = (y + rng.normal(size=y.shape)).astype(np.float32), np.arange(len(y)) % n_patients
    expect = roc_auc_score(y[:, 0], s[:, 0])
    assert abs(macro_auc(y, s).macro - expect) < 1e-12
    (t, peak) = peak_of(lambda: auc_interval(y, s, pat, n_boot=24))
    assert t.low.iloc[0] < t.auc.iloc[0] < t.high.iloc[0] and abs(t.auc.iloc[0] - expect) < 1e-12 and peak < 1e9, peak
    assert delong(y, s, clusters=pat).se.item() < .001
    c, peak = peak_of(lambda: calibration(y, expit(s), patients=pat, n_boot=24))
    assert np.isfinite(c.ece).all(axis=None) and c.table.n.sum() == len(y) and peak < 1e9, peak


def test_calibration_keeps_no_table_of_weights():
    "20,000 patients and 1,024 more replicates in one table would be 82 MB more"
    p = np.random.default_rng(0).random((20_000, 1))
    peaks = [peak_of(lambda: calibration((p > .5).astype(float), p, n_boot=n))[1] for n in (512, 1536)]
    assert peaks[1] < peaks[0] + 20e6, peaks


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
    arms, grid = summarise(s, 30)['arms'], s.grid('none')
    row = arms.iloc[0]
    fold = s.films(grid[1]).fold.to_numpy()
    each = [[macro_auc(s.targets(grid[1])[fold == f], p[fold == f]).macro for f in grid[1]] for p in s.probs('none', grid)]
    assert grid[0] == (1, 2) and abs(row['mean'] - np.mean(each)) < 1e-12 and abs(row.seed_sd - np.std(np.mean(each, 1), ddof=1)) < 1e-12
    other = [[macro_auc(s.targets(grid[1])[fold == f], p[fold == f]).macro for f in grid[1]] for p in s.probs('prox', grid)]
    assert abs(arms.change_seed_sd[1] - np.std(np.subtract(other, each).mean(1), ddof=1)) < 1e-12
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


def test_verdict_needs_the_right_interval_for_each_claim():
    t = lambda d, lo, hi: pd.Series(dict(diff=d, low=lo, high=hi))
    assert _verdict(t(.002, -.001, .0051), t(.002, 0, .004), .005) == 'equivalent'
    assert _verdict(t(.010, -.001, .021), t(.010, .001, .019), .005) == 'undecided'
    assert _verdict(t(.010, .001, .019), t(.010, .002, .018), .005) == 'better'
    assert _verdict(t(-.010, -.019, -.001), t(-.010, -.018, -.002), .005) == 'worse'


# power

def test_parts_of_the_error_are_found():
    "Known parts: a patient's own chance, a seed's own chance, and training runs that differ"
    rng, P, S, got = np.random.default_rng(0), 400, 4, []
    for i in range(30):
        y = (rng.random((P, 1)) < .4).astype(float)
        loss = lambda x: (x - y)**2
        base = np.full((S, P, 1), .5)
        shift = .02 * rng.normal(size=(1, P, 1)) + .03 * rng.normal(size=(S, P, 1)) + .004 * rng.normal(size=(S, 1, 1))
        e = paired_error(y, base, .5 - np.where(y == 1, -1, 1) * shift, np.arange(P), n_boot=200, metric='brier', seed=i)
        got.append([e.shared**2, e.own**2, e.training**2])
        assert np.isfinite([e.shared, e.own, e.training, e.se()]).all()
    found = np.sqrt(np.mean(got, 0))
    assert np.allclose(found, [.02 / 20, .03 / 20, .004], rtol=.25), found


def test_standard_error_scales_and_one_seed_knows_no_training():
    e = PairedError(.01, 100, 2, .01, .02, .003)
    assert np.isclose(e.se(), np.sqrt(.01**2 + .02**2 / 2 + .003**2 / 2)) and np.isclose(e.se(400, 4), np.sqrt((.01**2 + .02**2 / 4) / 4 + .003**2 / 4))
    assert np.isclose(e.se(1e12, 1), .003, atol=1e-6) and np.isclose(PairedError(0, 100, 1, .01, 0, np.nan).se(400), .005)
    y, z, pat = films()
    one = paired_error(y, z, z.round(), pat, n_boot=100)
    t = bootstrap(y, z.round(), pat, n_boot=100).mean((1, 2, 3)) - bootstrap(y, z, pat, n_boot=100).mean((1, 2, 3))
    assert np.isnan(one.training) and one.own == 0 and np.isclose(one.se(), t[1:].std(ddof=1)) and one.patients == 120


@pytest.mark.parametrize('gain,margin', [(.01, None), (0, .01), (.004, .01), (-.004, .01), (.03, None)])
def test_power_is_what_normal_draws_give(gain, margin):
    e = PairedError(0, 100, 1, .004, 0, np.nan)
    d = gain + e.se() * np.random.default_rng(0).normal(size=200_000)
    found = np.abs(d) > norm.ppf(.975) * e.se() if margin is None else np.abs(d) < margin - norm.ppf(.95) * e.se()
    assert abs(power(e, gain, margin=margin) - found.mean()) < .004
    n = patients_needed(e, gain, margin=margin)
    assert power(e, gain, n, margin=margin) >= .8 > power(e, gain, n - 1, margin=margin)


def test_detectable_is_the_inverse_of_power():
    e = PairedError(0, 100, 3, .004, .002, .001)
    assert abs(power(e, detectable(e, 300, 2), 300, 2) - .8) < 1e-6
    assert abs(power(e, 0, 300, 2, margin=detectable(e, 300, 2, equivalence=True)) - .8) < 1e-6
    assert patients_needed(e, .0005, seeds=1) == np.inf and np.isfinite(patients_needed(e, .0005, seeds=100))


def test_power_table_of_a_study(study):
    t = power_table(study, 60)
    assert t.arm.tolist() == ['prox', 'prox'] and t.positives.tolist() == ['all', '30 or more'] and np.allclose(t.detectable / t.se, norm.ppf(.975) + norm.ppf(.8))
    assert len(power_table(example_study(study.parent / 'alone', 100, arms=('none',)), 20)) == 0


# locked patients

@pytest.fixture()
def closed(tmp_path): return example_study(tmp_path / 'closed', 300, seeds=(1, 2), locked=.4)


def test_locked_ensemble_is_in_the_stated_order(closed):
    s = read_study(closed)
    grid, locked = s.grid('prox', locked=True), s.films('locked')
    assert grid == ((1, 2), (0, 1, 2)) and (locked.fold == -1).all()
    by_hand = np.stack([np.mean([(expit(c[[f'r:{l}' for l in s.labels]].to_numpy()) + expit(c[[f'rf:{l}' for l in s.labels]].to_numpy())) / 2 for f in range(3) for c in [s.cells['prox', seed, f]['locked']]], 0) for seed in (1, 2)])
    assert np.allclose(s.locked_probs('prox', grid), by_hand, atol=1e-6)
    t = locked_table(s, 60).set_index(['positives', 'arm']).loc[('30 or more', 'prox')]
    y, use = s.targets('locked'), [i for i, l in enumerate(s.labels) if all(30 <= s.targets(f)[l].sum() <= len(s.films(f)) - 30 for f in (s.folds, 'locked'))]
    auc = lambda p: np.mean([roc_auc_score(y.iloc[:, i], p[:, i]) for i in use])
    assert t.labels == len(use) and abs(t.locked - np.mean([auc(p) for p in by_hand.astype(np.float32)])) < 1e-6 and abs(t.all_seeds - auc(by_hand.mean(0))) < 1e-5
    assert (t.films, t.patients) == (len(locked), locked.patient.nunique()) == (len(locked), 120)


def test_locked_intervals_are_those_of_independent_patients(closed):
    t = locked_table(closed, 2000).set_index(['positives', 'arm']).loc[('30 or more', 'none')]
    width = lambda lo, hi: t[hi] - t[lo]
    assert np.isclose(width('difference_low', 'difference_high'), np.hypot(width('low', 'high'), width('oof_low', 'oof_high')), rtol=.08)
    s = read_study(closed)
    p = s.locked_probs('none', s.grid('none', locked=True))
    own = auc_interval(s.targets('locked'), p, s.films('locked').patient, n_boot=2000, seed=[0, 1], labels=s.labels)
    use = [i for i, l in enumerate(s.labels) if all(30 <= s.targets(f)[l].sum() <= len(s.films(f)) - 30 for f in (s.folds, 'locked'))]
    assert np.isclose(own.auc.iloc[use].mean(), t.locked, atol=1e-12)


def test_locked_arms_are_paired(closed):
    t = locked_table(closed, 300).set_index(['positives', 'arm'])
    s = read_study(closed)
    grid = s.grid('none', 'prox', locked=True)
    expect = paired_bootstrap(s.targets('locked'), *(s.locked_probs(a, grid) for a in ('none', 'prox')), s.films('locked').patient, n_boot=300, seed=[0, 1]).loc['macro']
    row = t.loc[('all', 'prox')]
    assert np.allclose([row.change, row.change_low, row.change_high, row.p], [expect['diff'], expect.low, expect.high, expect.p], atol=1e-12)
    assert row.verdict in ('equivalent', 'better', 'worse', 'undecided') and pd.isna(t.loc[('all', 'none')].change)


def test_locked_section_of_the_report(closed, study):
    s = read_study(closed)
    t = summarise(s, 40)
    f = study_figures(s, t)
    html = write_report(s, t, f, n_boot=40).read_text()
    js, csv = json.loads((closed / 'results.json').read_text()), pd.read_csv(closed / 'results.csv')
    assert 'Locked patients (simulated)</h2>' in html and 'an ensemble, which tends to be better' in html and html.count('<img') == 7 and 'scored once' in html
    assert [r['arm'] for r in js['locked']] == ['none', 'prox'] * 2 and np.allclose(csv.locked, [r['locked'] for r in js['locked'][:2]], atol=1e-6)
    assert t['prevalence'].locked.sum() == (s.targets('locked') == 1).sum().sum() and 'locked, scored by the ensembles' in t['flow'].part.tolist()
    assert set(t['locked_calibration'].probabilities) == {'as predicted', 'scaled'} and set(t['locked_labels'].arm) == {'none', 'prox'}
    assert plot_locked(t['locked']).axes
    html = write_report(study, n_boot=20, figures={}).read_text()
    assert 'Locked patients' not in html and json.loads((study / 'results.json').read_text())['locked'] == [] and 'locked' not in pd.read_csv(study / 'results.csv')


def test_locked_films_that_some_folds_have_not_scored(closed):
    (closed / 'prox/seed2/fold1/locked.parquet').unlink()
    s = read_study(closed)
    assert s.notes == ['prox/seed2/fold1 has not scored the locked films: run the study again'] and s.grid('prox', locked=True) == ((1, 2), (0, 2)) and s.grid('prox') == ((1, 2), (0, 1, 2))
    t = locked_table(s, 20).set_index(['positives', 'arm'])
    assert t.folds['all', 'none'] == 3 and t.folds['all', 'prox'] == 2 and np.isfinite(t.change['all', 'prox'])
    for f in closed.glob('prox/seed*/fold*/locked.parquet'): f.unlink()
    t = locked_table(closed, 20).set_index(['positives', 'arm'])
    assert np.isfinite(t.locked['all', 'none']) and np.isnan(t.locked['all', 'prox'])
    assert write_report(closed, n_boot=20, figures={}).exists()


def test_locked_patient_in_a_fold_is_said_and_not_scored(closed):
    patient = pd.read_parquet(closed / 'none/seed1/fold0/oof.parquet').patient[0]
    for f in closed.glob('*/seed*/fold*/locked.parquet'): change(f, lambda t: t.assign(patient=[patient, *t.patient[1:]]))
    s = read_study(closed)
    assert not s.has_locked and s.notes == ['1 patients of the locked films have films in the folds too: the locked films are left out'] and len(locked_table(s, 10)) == 0


@pytest.mark.parametrize('damage,text', [
    (lambda f: change(f, lambda t: t.iloc[1:]), 'different locked films'),
    (lambda f: change(f, lambda t: t.assign(**{'rf:Edema': np.inf})), 'NaN or infinite logits'),
    (lambda f: change(f, lambda t: t.drop(columns='z:Edema')), 'has no column z:Edema'),
    (lambda f: change(f, lambda t: t.drop(columns=[c for c in t if c.endswith(':Edema')])), 'has labels'),
    (lambda f: f.write_bytes(b'PAR1'), 'cannot be read'),
])
def test_damaged_locked_file_is_named_in_one_line(closed, damage, text):
    damage(closed / 'prox/seed2/fold1/locked.parquet')
    with pytest.raises(DataError, match=text) as e: read_study(closed)
    assert 'fold1' in str(e.value) and '\n' not in str(e.value)


def test_locked_without_a_film_counts_as_none(closed):
    for f in closed.glob('*/seed*/fold*/locked.parquet'): change(f, lambda t: t.iloc[:0])
    assert not read_study(closed).has_locked


# calibration for prediction, flow, audit

def test_calibration_file(closed):
    write_report(closed, n_boot=10, figures={})
    js, s = json.loads((closed / 'calibration.json').read_text()), read_study(closed)
    assert list(js) == ['none', 'prox'] and all(list(v) == s.labels and all(set(x) == {'temperature', 'bias'} for x in v.values()) for v in js.values())
    p = s.probs('prox', s.grid('prox')).astype(float).mean(0)
    expect = fit_temperature(s.targets(s.folds), logit(p), s.labels)
    assert np.allclose(pd.DataFrame(js['prox']).T[['temperature', 'bias']], expect, rtol=1e-4, atol=1e-4)
    assert not list(closed.glob('*.tmp-*'))
    scale = fit_calibration(s)
    q = rescaled(p, scale[scale.arm == 'prox'])
    assert np.allclose(q, expit(logit(p) / expect.temperature.to_numpy() + expect.bias.to_numpy()), atol=1e-4) and np.isfinite(rescaled(np.array([[0.] * 6, [1.] * 6]), expect)).all()


def test_flow_and_audit_are_told(study):
    (study / 'flow.json').write_text(json.dumps(dict(left_out=7)))
    (study / 'problems.csv').write_text('severity,check,rows,n,what,do\nwarning,near black,"[3, 4]",2,2 films are near black,look at them\n')
    t = summarise(study, 10)
    flow = t['flow'].set_index('part').films
    assert flow['listed'] == flow['all'] + 7 and flow['left out when read: no file'] == 7 and t['flow'].part.tolist()[:3] == ['listed', 'left out when read: no file', 'all']
    html = write_report(study, t, {}).read_text()
    assert '2 films are near black' in html
    (study / 'problems.csv').write_text('severity,check,rows,n,what,do\n')
    assert 'found nothing to report' in write_report(study, t, {}).read_text()
    (study / 'problems.csv').write_text('')
    with pytest.raises(DataError, match='problems.csv cannot be read'): write_report(study, t, {})


def test_results_json_holds_every_table_of_the_page(study):
    html, js = write_report(study, n_boot=20, figures={}).read_text(), json.loads((study / 'results.json').read_text())
    assert {'parameters', 'environment', 'headline', 'delong', 'power', 'scale'} <= set(js) and all(line.replace("'", '&#39;') in html for line in js['headline'])
    assert all(p['parameter'] in html for p in js['parameters'])
    assert re.search(r'viewport', html) and html.count('<h2') >= 10
