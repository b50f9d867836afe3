"""What was possible beside each verdict: the ceiling of couplings, words where it is not known, two runs of one arm."""
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from cxrlg.eval import bootstrap, label_statistics, macro_auc, simulate
from cxrlg.headroom import study_ceiling
from cxrlg.results import example_study, read_study
from cxrlg.tables import FREQUENT, summarise
from cxrlg.verdicts import NO_COUPLING, ceiling_table, judged_change, plot_verdicts, seed_changes, verdict_table

NAMES = ['Edema', 'Mass', 'Hernia']


@pytest.fixture(scope='module')
def labels():
    y, z, patients = simulate(400, [.3, .2, .1], [1.5, 1.2, 1.8])
    return pd.DataFrame(y, columns=NAMES), macro_auc(y, z, NAMES).auc, z, patients


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    return read_study(example_study(tmp_path_factory.mktemp('studies')/'seeds', 300, arms=('none', 'l1', 'prox'), seeds=(1, 2, 3)))


@pytest.fixture(scope='module')
def tables(study): return summarise(study, 60)


def arm(**columns):
    base = dict(arm='prox', verdict='equivalent', change=.001, change_low=-.001, change_high=.002, folds_up='2 of 3')
    return pd.DataFrame([base | dict(rare=0, own_change=np.nan, layer='') | columns])


def most(gain=.008, note=''): return pd.DataFrame([dict(findings=3, gain=gain, margin=.005, note=note)])


def test_the_ceiling_is_that_of_the_studys_labels(labels):
    y, auc, _, _ = labels
    found = ceiling_table(auc, y, margin=.004).iloc[0]
    assert found.gain == pytest.approx(study_ceiling(auc, y, n_sim=50_000).gain, abs=5 * found.mc_error)
    assert found.share == pytest.approx(.004 / found.gain) and found.note == '' and found.films == len(y) and found.findings == 3


def test_a_study_without_enough_labels_says_so(labels):
    y, auc, _, _ = labels
    for left in (auc[:1], auc * np.nan, auc.where(auc.index == 'Mass')):
        found = ceiling_table(left, y).iloc[0]
        assert found.note == 'fewer than two findings have an AUC' and np.isnan([found.gain, found.share]).all()
    assert ceiling_table(auc.where(auc.index != 'Mass'), y, ['Mass']).note.item() == 'no finding that is judged has an AUC'
    unknown = y.where(np.random.default_rng(0).random(y.shape) < .7)
    assert ceiling_table(auc, unknown).note.item() == '' and ceiling_table(auc, unknown).gain.item() >= 0


@pytest.mark.parametrize('columns,gain,note,words', [
    (dict(), .008, '', 'excludes more than 0.0020, 25% of it; the margin of 0.005 is 62% of it'),
    (dict(change_high=np.nan, change_low=np.nan), .008, '', 'at most 0.0080 here; what this study excludes is not known'),
    (dict(change=.03, change_low=.02, change_high=.04), .008, '', 'the change is more (from 0.0200 on): not the work of couplings alone'),
    (dict(), 0, '', 'couplings could give nothing here'),
    (dict(), np.nan, 'fewer than two findings have an AUC', 'not known: fewer than two findings have an AUC')])
def test_clause_of_a_verdict(columns, gain, note, words):
    found = verdict_table(arm(**columns), most(gain, note))
    assert words in found.clause.item() and found.verdict.item() == 'equivalent'


def test_no_arm_is_compared():
    alone = arm().drop(columns=['change', 'change_low', 'change_high'])
    assert len(verdict_table(alone, most())) == len(verdict_table(arm(change=np.nan), most())) == 0
    assert plot_verdicts(pd.DataFrame(), most()) is None


def test_verdicts_of_a_study_are_over_its_frequent_findings(study, tables):
    y = study.targets(study.folds)
    enough = np.minimum((y == 1).sum(), (y == 0).sum()) >= FREQUENT
    t, frequent = tables['verdicts'].set_index('arm'), tables['frequent'].set_index('arm')
    assert 0 < enough.sum() < len(y.columns) and (t.findings == enough.sum()).all() and (t.rare == 0).all()
    assert np.allclose(t.change, frequent.change[t.index]) and t.verdict.tolist() == frequent.verdict[t.index].tolist()
    assert tables['ceiling'].findings.item() == enough.sum() and t.clause.str.startswith('couplings could give').all()


def test_two_runs_of_one_arm(study, tables):
    aa, grid = tables['aa'], study.grid('none')
    assert aa[['seed', 'against']].values.tolist() == [[2, 1], [3, 2]] and aa.arm.eq('none').all()
    y, films = study.targets(grid[1]), study.films(grid[1])
    use = [l for l in y if min((y[l] == 1).sum(), (y[l] == 0).sum()) >= FREQUENT]
    at = [study.labels.index(l) for l in use]
    each = [label_statistics(bootstrap(y[use], p[:, at], films.patient, films.fold, n_boot=0, labels=use))[0, -1]
            for p in study.probs('none', grid)]
    assert np.allclose(aa.change, np.diff(each)) and (aa.low <= aa.change).all() and aa.adjusted.eq('not adjusted').all()


def test_a_seed_against_itself_is_equivalent(labels):
    y, _, z, patients = labels
    reps = np.repeat(bootstrap(y, z, patients, n_boot=50, labels=NAMES), 2, axis=1)
    aa = seed_changes(reps, ['a', 'b'], NAMES)
    assert aa.change.item() == 0 and aa.verdict.item() == 'equivalent' and len(seed_changes(reps[:, :1], ['a'], NAMES)) == 0
    s = label_statistics(reps)
    assert judged_change(s, s + .01, NAMES, .005)['verdict'] == 'better'


def test_a_graph_that_is_empty_in_every_fold(tmp_path):
    path = example_study(tmp_path/'empty', 200)
    for f in path.glob('prox/seed*/fold*/couplings.csv'): (pd.read_csv(f, index_col=0) * 0).to_csv(f)
    arms = summarise(path, 10)['arms'].set_index('arm')
    assert arms.layer.to_dict() == {'none': '', 'prox': NO_COUPLING}


def test_no_torch():
    subprocess.run([sys.executable, '-c', 'import sys, cxrlg.verdicts, cxrlg.report; assert "torch" not in sys.modules'], check=True)
