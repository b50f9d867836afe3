"""Metrics and intervals: against scikit-learn and definitions, edge cases, odd types, full size."""
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
from scipy.special import expit
from scipy.stats import norm
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from cxrlg.calibration import calibration, fit_platt, operating_points, roc_curves
from cxrlg.core import DataError
from cxrlg.eval import (auc_interval, bootstrap, delong, ensemble, holm, macro_auc, numbers, paired_bootstrap, patient_weights, scores,
                        simulate, tta, verdict, _cumsum)


def simulated(n_patients=120, L=4, seed=0):
    return simulate(n_patients, np.linspace(.05, .5, L), 1.2, seed)


@pytest.mark.parametrize('digits', [0, 1, 6])
@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
def test_macro_auc_equals_sklearn_with_ties_and_masks(digits, dtype):
    y, z, _ = simulated()
    y[np.random.default_rng(1).random(y.shape) < .2] = np.nan
    s = z.round(digits).astype(dtype)
    expect = [roc_auc_score(y[k, l], s[k, l]) for l, k in enumerate((~np.isnan(y)).T)]
    r = macro_auc(y, s)
    assert np.allclose(r.auc, expect, atol=1e-12, rtol=0) and abs(r.macro - np.mean(expect)) < 1e-12


def test_rank_invariance_and_reversal():
    y, z, _ = simulated()
    z = z.astype(float)
    assert np.allclose(macro_auc(y, z).auc, macro_auc(y, z**3 + 5).auc, atol=1e-12)
    assert np.allclose(macro_auc(y, z).auc, 1 - macro_auc(y, -z).auc, atol=1e-12)
    assert np.allclose(macro_auc(y, z).auc, macro_auc(1 - y, -z).auc, atol=1e-12)


@pytest.mark.parametrize('y,reason', [([[1]], 'no negative'), ([[0]], 'no positive'), ([[np.nan]], 'no known target'),
                                      ([[0], [0], [np.nan]], 'no positive')])
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
        assert fit_platt(y, s).notna().all(axis=None)
        c = calibration(y, s, n_boot=20)
        assert c.ece[['ece', 'noise']].notna().all(axis=None) == (reason != 'no known target')
        assert c.ece[['low', 'high']].notna().all(axis=None) == (np.isfinite(y).sum() > 1) # one patient has no interval


def test_one_positive():
    y, s, pat = np.eye(1, 40).T, np.random.default_rng(0).random((40, 1)), np.arange(40)
    t = auc_interval(y, s, pat, n_boot=400)
    assert abs(t.auc.iloc[0] - roc_auc_score(y[:, 0], s[:, 0])) < 1e-12 and .25 < t.lost.iloc[0] < .5
    assert t[['low', 'high']].isna().all(axis=None) and delong(y, s)[['se', 'low', 'high']].isna().all(axis=None)


def test_two_positive_films_of_one_patient_are_one_patient():
    y, s, pat = np.r_[1, 1, np.zeros(40)], np.random.default_rng(0).random(42), np.r_[0, 0, 1:41]
    assert auc_interval(y, s, pat, n_boot=50)[['low', 'high']].isna().all(axis=None)
    assert auc_interval(y, s, np.arange(42), n_boot=50)[['low', 'high']].notna().all(axis=None)
    assert auc_interval(y, s, pat, n_boot=50, metric='brier')[['low', 'high']].notna().all(axis=None)


def test_ties_everywhere():
    y, _, pat = simulated()
    s = np.full(y.shape, .3)
    t = paired_bootstrap(y, s, s, pat, n_boot=50)
    assert (t.a == .5).all() and (t[['change', 'low', 'high']] == 0).all(axis=None) and (t.p == 1).all()
    d = delong(y, s, s, pat)
    assert (d.p == 1).all() and (d.se == 0).all()
    assert (delong(y, s).auc == .5).all()


@pytest.mark.parametrize('sign', [1, -1])
def test_perfect_separation_is_not_certain(sign):
    y, z, pat = simulated()
    s = sign * y
    d, t = delong(y, s, clusters=pat), auc_interval(y, s, pat, n_boot=50)
    assert (d.auc == (sign > 0)).all() and d[['se', 'low', 'high']].isna().all(axis=None)
    assert (t.auc == (sign > 0)).all() and t[['low', 'high']].isna().all(axis=None)
    assert paired_bootstrap(y, s, 2 * s, pat, n_boot=50)[['low', 'high', 'p']].isna().all(axis=None)
    against = paired_bootstrap(y, z, s, pat, n_boot=50)
    assert against[['low', 'high', 'p']].notna().all(axis=None) and (delong(y, z, s, pat).se > 0).all()
    assert np.isfinite(fit_platt(y, y * 20 - 10)).all(axis=None)


def test_models_that_rank_all_films_alike_differ_by_nothing():
    y, z, pat = simulated()
    d = delong(y, z, z * 2 + 1, pat)
    assert (d[['change', 'se', 'low', 'high']] == 0).all(axis=None) and (d.p == 1).all()


# odd types

TYPES = {
    'nullable': lambda t: t.convert_dtypes(),
    'arrow': lambda t: t.convert_dtypes(dtype_backend='pyarrow'),
    'object': lambda t: t.astype(object),
}


@pytest.mark.parametrize('kind', TYPES)
def test_tables_of_any_pandas_type_give_the_same_numbers(kind):
    y, z, pat = simulated()
    y[::7, 1] = np.nan
    t, s = pd.DataFrame(y, columns=list('abcd')), pd.DataFrame(z.astype(float), columns=list('abcd'))
    as_kind, ids, folds = TYPES[kind], pd.Series(pat.astype(str)), pd.Series(pat % 3)
    want = auc_interval(t, s, ids, folds, n_boot=20)
    got = auc_interval(as_kind(t), as_kind(s), as_kind(ids.to_frame())[0], as_kind(folds.to_frame())[0], n_boot=20)
    pd.testing.assert_frame_equal(got, want)
    pd.testing.assert_frame_equal(delong(as_kind(t), as_kind(s), clusters=as_kind(ids.to_frame())[0]), delong(t, s, clusters=ids))


def test_booleans_lists_and_texts():
    assert macro_auc([[True], [False]], [[1], [0]]).macro == 1 and numbers([1, None]).tolist()[0] == 1
    with pytest.raises(DataError, match='targets hold text'): macro_auc(np.array([['yes'], ['no']]), [[1], [0]])
    with pytest.raises(DataError, match='scores hold text'): macro_auc([[1], [0]], [['a'], ['b']])
    with pytest.raises(DataError, match='1 films have no fold, first row 1'):
        bootstrap([[1], [0]], [[1], [0]], [0, 1], pd.Series([0, None]))


# input that cannot be used

def nan_at_seven(z): return np.where(np.arange(len(z))[:, None] == 7, np.nan, z)


@pytest.mark.parametrize('call,text', [
    (lambda y, z: macro_auc(y, nan_at_seven(z)), r'rows have NaN or infinite scores, first rows \[7\]'),
    (lambda y, z: macro_auc(y * 2, z), 'only 0, 1 and NaN'),
    (lambda y, z: macro_auc(y[:5], z), 'must agree'),
    (lambda y, z: macro_auc(y, z, ['a']), '1 label names for 4 columns'),
    (lambda y, z: macro_auc(y, z, list('abba')), r"labels \['a', 'b'\] are named more than once"),
    (lambda y, z: macro_auc(y, np.stack([z, z])), 'average the seeds first'),
    (lambda y, z: ensemble([]), 'at least one'),
    (lambda y, z: ensemble([np.array([np.nan])]), 'model 0 has 1 values'),
    (lambda y, z: verdict(0, (0, 0), (0, 0), -1), 'must be above 0'),
    (lambda y, z: verdict([0.], [1.], [1.], adjusted='hom'), "did you mean 'holm'")])
def test_scores_that_cannot_be_used(call, text):
    y, z, _ = simulated()
    refused(lambda: call(y, z), text)


@pytest.mark.parametrize(
    'change,text',
    [
        (dict(patients=[1, 2]), r'2 patients for \d+ films'),
        (dict(patients=None), 'have no patients, first row 0'),
        (dict(folds=[1, 2, 3]), '3 folds for'),
        (dict(metric='f1'), "there is no metric 'f1'"),
        (dict(targets=np.zeros((0, 4)), probs=np.zeros((0, 4)), patients=[]), 'no film to evaluate'),
    ],
    ids=lambda x: '' if isinstance(x, str) else next(iter(x)),
)
def test_arguments_of_the_bootstrap_that_cannot_be_used(change, text):
    y, z, pat = simulated()
    if 'patients' in change and change['patients'] is None: change = dict(patients=np.where(pat == 0, np.nan, pat))
    refused(lambda: bootstrap(**(dict(targets=y, probs=z, patients=pat) | change)), text)


def refused(call, text):
    with pytest.raises(DataError, match=text) as e: call()
    assert '\n' not in str(e.value)


# one verdict


@pytest.mark.parametrize(
    'change,wide,narrow,said',
    [
        (0.002, (-0.001, 0.0051), (0, 0.004), 'equivalent'),
        (0.010, (-0.001, 0.021), (0.001, 0.019), 'undecided'),
        (0.010, (0.001, 0.019), (0.002, 0.018), 'better'),
        (-0.010, (-0.019, -0.001), (-0.018, -0.002), 'worse'),
        (0.010, (np.nan, np.nan), (np.nan, np.nan), 'undecided'),
    ],
)
def test_verdict_needs_the_right_interval_for_each_claim(change, wide, narrow, said):
    assert verdict(change, wide, narrow, 0.005) == said


def test_verdict_over_many_comparisons_is_holms():
    change, p, p_equal = [.02, .02, -.02, .001], [.001, .03, .002, .9], [.9, .9, .9, .001]
    assert verdict(change, p, p_equal, adjusted='holm').tolist() == ['better', 'undecided', 'worse', 'equivalent']
    assert verdict(change[1:2], p[1:2], p_equal[1:2], adjusted='holm').tolist() == ['better']


# against definitions

def test_macro_row_and_frames_keep_names():
    y, z, pat = simulated()
    names = list('abcd')
    assert list(auc_interval(pd.DataFrame(y, columns=names), z, pat, n_boot=5).index) == names + ['macro']
    with pytest.raises(DataError, match='same columns'): macro_auc(pd.DataFrame(y, columns=names), pd.DataFrame(z, columns=names[::-1]))


def test_bootstrap_equals_weighted_sklearn_by_fold_and_model():
    y, z, pat = simulated()
    y[::7, 1] = np.nan
    folds, z2 = pat % 3, z.round(1)
    reps = bootstrap(y, np.stack([z, z2]), pat, folds, n_boot=4, seed=5)
    w = np.concatenate(list(patient_weights(len(set(pat)), 4, 5)), 1)[pat]
    for b in range(5):
        for m, s in enumerate((z, z2)):
            for f in range(3):
                for l in range(4):
                    k = (folds == f) & ~np.isnan(y[:, l]) & (w[:, b] > 0)
                    expect = roc_auc_score(y[k, l], s[k, l], sample_weight=w[k, b]) if len(set(y[k, l])) == 2 else np.nan
                    assert np.isclose(reps[b, m, f, l], expect, atol=1e-12, rtol=0, equal_nan=True)


def test_replicates_do_not_depend_on_the_chunk():
    a, b = (np.concatenate(list(patient_weights(37, 100, 3, chunk)), 1) for chunk in (7, 256))
    assert (a == b).all() and (a.sum(0) == 37).all()


def test_same_seed_same_bytes_and_rows_without_fold_left_out():
    y, z, pat = simulated()
    folds = np.where(pat % 4 == 3, -1, pat % 4)
    a, b = (bootstrap(y, z, pat, folds, n_boot=30) for _ in range(2))
    assert a.tobytes() == b.tobytes() and a.shape == (31, 1, 3, 4)


def test_cumsum_is_exact():
    x = np.random.default_rng(0).integers(0, 9, (1001, 5)).astype(np.float32) / 2
    for k in (1, 2, 31, 32, 33, 1000, 1001): assert (_cumsum(x[:k]) == np.cumsum(x[:k], 0, dtype=float)).all()


def test_average_precision_and_losses_underpatient_weights():
    y, z, pat = simulated()
    p = tta(z, z)
    w = np.concatenate(list(patient_weights(len(set(pat)), 3, 0)), 1)[pat]
    ap, brier = (bootstrap(y, p, pat, metric=m, n_boot=3)[:, 0, 0] for m in ('ap', 'brier'))
    for b in range(4):
        assert np.allclose(ap[b], [average_precision_score(y[:, l], p[:, l], sample_weight=w[:, b]) for l in range(4)], atol=1e-9)
        assert np.allclose(brier[b], np.average((p - y)**2, 0, w[:, b]), atol=1e-9)
    assert set(scores(y, p).columns) == {'auc', 'ap', 'log_loss', 'brier', 'prevalence'}


BY_SKLEARN = dict(auc=roc_auc_score, ap=average_precision_score, log_loss=log_loss, brier=brier_score_loss)


def test_scores_equal_sklearn():
    y, z, _ = simulated(200)
    y[::9, 2] = np.nan
    p = expit(z.round(1).astype(float))
    t = scores(y, p)
    for l in range(4):
        k = ~np.isnan(y[:, l])
        expect = {name: score(y[k, l], p[k, l]) for name, score in BY_SKLEARN.items()}
        assert all(abs(t[m].iloc[l] - v) < 1e-12 for m, v in expect.items())
        assert abs(t.prevalence.iloc[l] - y[k, l].mean()) < 1e-12
    assert np.allclose(t.iloc[-1, :4], t.iloc[:-1, :4].mean(), atol=1e-12)


def test_delong_has_students_t_with_the_patients_of_the_smaller_class():
    y, z, pat = simulated()
    t, n = delong(y, z, z.round(), pat), delong(y, z, z.round(), pat, normal=True)
    expect = [min(len(set(pat[y[:, l] == k])) for k in (0, 1)) - 1 for l in range(4)]
    assert t.df.tolist() == expect and np.isinf(n.df).all() and np.allclose(t.se, n.se)
    assert np.allclose((n.high - n.low) / 2 / n.se, norm.ppf(.975)) and ((t.high - t.low) > (n.high - n.low)).all() and (t.p > n.p).all()
    assert np.allclose(n.p, 2 * norm.sf(np.abs(n.change) / n.se))


def test_delong_pair_is_the_two_singles_when_independent_of_order():
    y, z, pat = simulated()
    ab, ba = delong(y, z, z.round(), pat), delong(y, z.round(), z, pat)
    assert np.allclose(ab.change, -ba.change) and np.allclose(ab.se, ba.se) and np.allclose(ab.p, ba.p)
    assert np.allclose(ab.p_holm, holm(ab.p)) and (ab.p_holm >= ab.p).all()


def test_repeating_every_film_does_not_shrink_a_clustered_interval():
    y, z, _ = simulated()
    films = np.arange(len(y))
    one = delong(y, z, clusters=films)
    two = delong(np.repeat(y, 2, 0), np.repeat(z, 2, 0), clusters=np.repeat(films, 2))
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


def test_full_size_is_fast_and_small():
    y, z, pat = simulate(7500, np.linspace(.01, .4, 14), 1.5)
    for n in (3000, len(y)): assert peak_of(lambda: bootstrap(y[:n], z[:n], pat[:n], n_boot=300))[1] < 1e9
    by_roc_auc_score = 2000*seconds_of(lambda: [roc_auc_score(y[:, l], z[:, l]) for l in range(14)], 5)
    assert len(y) > 24000 and by_roc_auc_score > 50*seconds_of(lambda: auc_interval(y, z, pat, n_boot=2000), 2)


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='anonymous memory is read from Linux\'s /proc')
def test_full_size_stays_below_a_gigabyte():
    code = '\n'.join(['import numpy as np', 'from cxrlg.eval import auc_interval, simulate',
                      'y, z, p = simulate(7500, np.linspace(.01, .4, 14), 1.5)', 'print(len(y), flush=True)',
                      'auc_interval(y, z, p, n_boot=2000)', 'print("done")'])
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


def test_ranks_are_double_where_scipy_keeps_single_precision(monkeypatch):
    "SciPy 1.18 ranks float32 in float32: the sum of a hundred thousand ranks is then off"
    def single(x): return rankdata(x).astype(x.dtype)
    rng = np.random.default_rng(0)
    y, s = (rng.random((100_000, 1)) < .3).astype(float), rng.normal(size=(100_000, 1)).astype(np.float32)
    expect = roc_auc_score(y, s)
    monkeypatch.setattr('cxrlg.checks.rankdata', single)
    assert abs(macro_auc(y, s).macro - expect) < 1e-12


# what looks like numbers, and is more

def test_a_mask_is_nan():
    y, z, pat = simulated()
    hide = np.random.default_rng(0).random(y.shape) < .3
    want = macro_auc(np.where(hide, np.nan, y), z)
    for masked in (np.ma.array(y, mask=hide), np.ma.array(y.astype(int), mask=hide)): assert macro_auc(masked, z).auc.equals(want.auc)
    refused(lambda: macro_auc(y, np.ma.array(z, mask=hide)), 'NaN or infinite scores')
    refused(lambda: auc_interval(y, z, np.ma.array(pat, mask=pat == 0), n_boot=20), 'have no patients')
    assert numbers([np.ma.array([1, 0], mask=[True, False]), np.array([1, 1])]).tolist()[1] == [1, 1]
    assert np.isnan(numbers([np.ma.array([1, 0], mask=[True, False]), np.array([1, 1])])[0, 0])


def test_tensors_of_any_kind():
    torch = pytest.importorskip('torch')
    y, z, _ = simulated()
    coarse = torch.tensor(z).bfloat16()
    want = macro_auc(y, coarse.float().numpy()).auc
    assert macro_auc(torch.tensor(y).bfloat16(), coarse).auc.equals(want)
    assert macro_auc(y, coarse.clone().requires_grad_()).auc.equals(want)
    assert numbers([torch.ones(2, requires_grad=True), torch.zeros(2)]).tolist() == [[1, 1], [0, 0]]
    assert numbers(torch.tensor(z)).dtype == np.float32


def test_films_in_another_order_are_refused():
    y, z, pat = simulated()
    Y, P = pd.DataFrame(y), pd.DataFrame(z)
    for call in (lambda: macro_auc(Y.sample(frac=1, random_state=0), P), lambda: macro_auc(Y[0], P[0][::-1]),
                 lambda: auc_interval(Y, P, pd.Series(pat)[::-1], n_boot=20), lambda: delong(Y, P, clusters=pd.Series(pat)[::-1]),
                 lambda: auc_interval(Y, P, pat, pd.Series(pat % 2)[::-1], n_boot=20)):
        refused(call, 'the same rows in another order')
    assert macro_auc(Y[50:], P[50:].reset_index(drop=True)).macro == macro_auc(y[50:], z[50:]).macro


def test_one_set_of_scores_where_one_is_judged():
    y, z, pat = simulated()
    several = np.stack([z, -z])
    for call in (lambda: delong(y, several), lambda: delong(y, z, several), lambda: calibration(y, expit(several)),
                 lambda: fit_platt(y, several), lambda: operating_points(y, several), lambda: roc_curves(y, several)):
        refused(call, r'scores have shape \(2, .*average the seeds first')


def test_losses_need_probabilities():
    y, z, pat = simulated()
    for call in (lambda: scores(y, z), lambda: auc_interval(y, z, pat, metric='brier', n_boot=20),
                 lambda: auc_interval(y, z, pat, metric='log_loss', n_boot=20)): refused(call, 'through the sigmoid first')
    assert scores(y, expit(z)).brier['macro'] < .25


@pytest.mark.parametrize('change,text', [
    (dict(level=95), 'level=95: give a share'), (dict(level=0), 'level=0: give a share'),
    (dict(n_boot=-1), 'n_boot=-1: give a whole number'),
    (dict(n_boot=2.5), 'n_boot=2.5: give a whole number'), (dict(n_boot=1), 'n_boot=1: one replicate has no spread'),
    (dict(patients='column'), r'patients have shape \(\d+, 1\)'), (dict(folds='column'), r'folds have shape \(\d+, 1\)')])
def test_arguments_of_intervals_that_cannot_be_used(change, text):
    y, z, pat = simulated()
    change = {k: pat[:, None] if v == 'column' else v for k, v in change.items()}
    refused(lambda: auc_interval(**dict(targets=y, probs=z, patients=pat, n_boot=20) | change), text)


@pytest.mark.parametrize('text', [np.array([['0'], ['x']]), np.array([[0], ['x']], object), pd.DataFrame([['0'], ['x']]), [['0'], ['x']]])
def test_text_is_named(text):
    refused(lambda: macro_auc(text, [[1], [0]]), "targets hold text, or what is no number: 'x' in row 1; give numbers")
    refused(lambda: macro_auc([[1, 0], [1]], [[1], [0]]), 'targets are no table of numbers')


def test_one_patient_has_no_interval_of_a_loss():
    y, z, _ = simulated()
    t = auc_interval(y, expit(z), np.zeros(len(y)), metric='brier', n_boot=20)
    assert t[['low', 'high']].isna().all(axis=None) and t.brier.notna().all()
