"The figures of the README and of the findings page are those of the committed out-of-fold logits."
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from conftest import ROOT
from cxrlg.ablation import ablation_table
from cxrlg.controls import coupling_controls
from cxrlg.corrections import Outputs
from cxrlg.data import read_table
from cxrlg.kept import load_outputs, load_study
from cxrlg.eval import auc_interval, ensemble, macro_auc, paired_bootstrap
from cxrlg.headroom import study_ceiling
from cxrlg.study import expand, read_config

README = (ROOT/'README.md').read_text()
FINDINGS = (ROOT/'nbs'/'findings.qmd').read_text()


def mean_fold_auc(out, z, labels):
    "Mean over seeds and folds of the fold's macro AUC"
    cols = [out.labels.index(l) for l in labels]
    return np.mean(
        [
            macro_auc(out.targets[out.folds == k][:, cols], s[out.folds == k][:, cols]).macro
            for s in z
            for k in np.unique(out.folds)
        ]
    )


def row(start, arm):
    "The macro AUC in the findings page's table: the row of an arm, in the block that opens with a text"
    block = FINDINGS[FINDINGS.index(start):]
    return float(re.search(rf'^.*\| {arm}[^|]*\| (0\.\d+)', block, flags=re.M).group(1))


BLOCKS = [
    ('phantom', 'phantom (drawn)', 'all', ('none', 'l1', 'prox')),
    ('nih128', '[nih128]', 'all', ('none', 'l1', 'prox')),
    ('nih128', 'the same, 13 findings', 'frequent', ('none', 'l1', 'prox')),
    ('nih128_pretrained', 'the same 13 findings', 'frequent', ('none', 'prox')),
    ('nih128_seresnext', 'the same films, the paper', 'all', ('none', 'prox')),
    ('nih128_seresnext', 'the same 13 findings, the whole network', 'frequent', ('none', 'prox')),
]


@pytest.mark.parametrize('name, start, judged, arm', [(*block, arm) for *block, arms in BLOCKS for arm in arms])
def test_macro_auc_of_the_findings(name, start, judged, arm):
    out = load_outputs(ROOT/'nbs'/'results'/f'{name}_outputs.npz')[0]
    labels = [l for l, n in zip(out.labels, np.nansum(out.targets, 0)) if judged == 'all' or n >= 30]
    assert len(labels) == (13 if judged == 'frequent' else 14)
    z = out.logits if arm == 'none' else out.arms[arm]
    assert mean_fold_auc(out, z, labels) == pytest.approx(row(start, arm), abs=.0006)


def test_no_patient_is_in_two_folds_or_locked_as_well():
    out, locked, _ = load_outputs(ROOT/'nbs'/'results'/'nih128_outputs.npz')
    assert all(len(set(out.folds[out.patients == p])) == 1 for p in set(out.patients)) and not set(out.patients) & set(locked[2])


@pytest.mark.parametrize('name, start', [block[:2] for block in BLOCKS if block[2] == 'frequent'])
def test_intervals_and_changes_of_the_findings(name, start):
    "Recomputed from the kept logits, with the report's bootstrap"
    few = load_study(ROOT/'nbs'/'results'/f'{name}_outputs.npz').frequent(30)
    grid, written = few.grid(*few.arms), FINDINGS[FINDINGS.index(start):]
    films, y = few.films(grid[1]), few.targets(grid[1])
    def numbers(text): return [float(x) for x in re.findall(r'[-+]?\d\.\d{3}', text)]
    p = {a: few.probs(a, grid) for a in few.arms}
    for arm in few.arms:
        cells = [c.strip() for c in re.search(rf'^.*\| {arm}[^|]*\|.*$', written, flags=re.M).group().split('|')]
        t = auc_interval(y, p[arm], films.patient, films.fold, few.labels).loc['macro']
        assert numbers(cells[-4]) == pytest.approx([t.auc, t.low, t.high], abs=.0006)
        if arm == 'none': continue
        t = paired_bootstrap(y, p['none'], p[arm], films.patient, films.fold, few.labels).loc['macro']
        assert numbers(cells[-3]) == pytest.approx([t.change, t.low, t.high], abs=.0006)


@pytest.mark.parametrize('name, apart, together', [
    ('nih128', '0.004 (0.000 to 0.008)', '(-0.001 to +0.001)'),
    ('phantom', '0.015 (0.006 to 0.022)', '0.004 (0.000 to 0.008)'),
])
def test_what_couplings_gain_after_networks_trained_apart_and_together(name, apart, together):
    both, part = load_outputs(ROOT/'nbs'/'results'/f'{name}_separate.npz')[0], FINDINGS[FINDINGS.index('**Training together'):]
    for z, written in ((both.arms['separate'], apart), (both.logits, together)):
        out = Outputs(both.targets, z, both.patients, both.folds, both.labels)
        t = coupling_controls(out, ['couplings_min'], metrics=('auc',), n_boot=1000, bar=False).table.set_index('arm').loc['couplings_min']
        numbers = [float(x) for x in re.findall(r'[-+]?\d\.\d{3}', written)]
        assert written in part and numbers == pytest.approx([t.change, t.low, t.high][-len(numbers):], abs=.0006)


@pytest.mark.parametrize('study, before, verdict', [
    ('phantom', 'on the phantom, it is', 'worse'),
    ('nih128', 'with `No Finding` above the others, it is', 'better'),
])
def test_what_a_trained_tree_of_findings_does(study, before, verdict):
    t = ablation_table(load_outputs(ROOT/'nbs'/'results'/f'{study}_tied.npz')[0], n_boot=1000).loc['tied']
    written = re.search(before + r' ([-+]0\.\d+) \(([-+]0\.\d+) to ([-+]0\.\d+)\)', FINDINGS).groups()
    assert [float(x) for x in written] == pytest.approx([t.change, t.low, t.high], abs=.0006) and t.verdict == verdict


def test_what_the_pretrained_recipe_reaches_on_more_films():
    study = load_study(ROOT/'nbs'/'results'/'nih128_more_outputs.npz').frequent(30)
    grid = study.grid('none')
    films = study.films(grid[1])
    probs, written = study.probs('none', grid), r'(0\.\d+) \((0\.\d+) to (0\.\d+)\)'
    ways = {'at 128 px reaches ': (ensemble(probs), None), 'Its single models have ': (probs, films.fold)}
    for before, (p, folds) in ways.items():
        t = auc_interval(study.targets(grid[1]), p, films.patient, folds, study.labels).loc['macro']
        numbers = re.search(before + written, FINDINGS).groups()
        assert [float(x) for x in numbers] == pytest.approx([t.auc, t.low, t.high], abs=.0006)
    assert len(films) == 9998 and grid[0] == (42, 43)


def test_what_couplings_gain_on_more_films():
    out = load_outputs(ROOT/'nbs'/'results'/'nih128_more_outputs.npz')[0]
    t = coupling_controls(out, ['couplings_min'], metrics=('auc',), n_boot=1000, bar=False).table.set_index('arm').loc['couplings_min']
    written = re.search(r'least loss gains (0\.\d+) \(([-+]0\.\d+) to ([-+]0\.\d+)\)', FINDINGS).groups()
    assert [float(x) for x in written] == pytest.approx([t.change, t.low, t.high], abs=.00006)


def test_the_ablation_in_the_paper_page():
    "Changes and intervals recomputed from the kept logits"
    text = (ROOT/'nbs'/'paper.qmd').read_text()
    for name, column in (('phantom', 4), ('nih128', 6)):
        out, _, more = load_outputs(ROOT/'nbs'/'results'/f'ablation_{name}.npz')
        table = ablation_table(out, {k.removeprefix('folds_'): v for k, v in more.items() if k.startswith('folds_')})
        for variant, t in table.drop(index='full').iterrows():
            cells = [c.strip() for c in re.search(rf'^\|[^|]*\(`{variant}`\).*$', text, flags=re.M).group().split('|')]
            written = [float(x) for x in re.findall(r'[-+]?\d\.\d{3}', cells[column])]
            assert written == pytest.approx([t.change, t.low, t.high][:len(written)], abs=.0006), variant
            if name == 'phantom': assert cells[5] == t.verdict, variant


@pytest.mark.parametrize('name', ['nih128_pretrained', 'nih128_seresnext', 'nih128_pretrained_224'])
def test_kept_studies_are_those_of_the_committed_configurations(name):
    kept = load_study(ROOT/'nbs'/'results'/f'{name}_outputs.npz').cells
    jobs = {(j.arm, j.seed, j.fold): j for j in expand(read_config(ROOT/'configs'/f'{name}.yaml'))}
    assert set(jobs) == set(kept)
    first = next(iter(kept))
    assert jobs[first].hash == kept[first]['config']['hashes']['config']


def test_the_python_of_the_readme_runs(tmp_path):
    code = re.search(r'## In Python\n.*?```python\n(.*?)```', README, flags=re.S).group(1)
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'CXRLG_RUNS': str(tmp_path)})
    assert run.returncode == 0, run.stderr[-2000:]
    assert 'macro' in run.stdout


def test_the_readmes_table_says_what_the_findings_page_says():
    "Each figure of a row of the README stands in one row of the page, or is the ceiling"
    rows = [r for r in README.splitlines() if r.startswith(('| drawn', '| real'))]
    assert len(rows) == 5
    for text in rows:
        auc, change, verdict = [c.strip() for c in text.split('|')][2:5]
        assert auc in FINDINGS and f'| {change} | {verdict} |' in FINDINGS, text


@pytest.mark.parametrize('name, start', [
    ('phantom', '| drawn'),
    ('nih128', '| real, the same four blocks'),
    ('nih128_pretrained', '| real, pretrained'),
    ('nih128_seresnext', '| real, the paper'),
])
def test_the_ceilings_in_the_readme(name, start):
    study = load_study(ROOT/'nbs'/'results'/f'{name}_outputs.npz').frequent(30)
    grid = study.grid('none')
    y, p = study.targets(grid[1]), study.probs('none', grid).mean(0)
    auc = {label: roc_auc_score(y[label].dropna(), p[y[label].notna(), j]) for j, label in enumerate(study.labels)}
    written = float(re.search(rf'^{re.escape(start)}.*\| (0\.\d+)[^|]*\|$', README, flags=re.M).group(1))
    assert study_ceiling(auc, y).gain == pytest.approx(written, abs=.0008)


def test_the_radiologists_labels_are_those_that_were_published(films):
    spec = importlib.util.find_spec('torchxrayvision')
    if spec is None: pytest.skip('the labels come with torchxrayvision')
    published = pd.read_csv(Path(spec.origin).parent/'data'/'google2019_nih-chest-xray-labels.csv.gz').set_index('Image Index')
    table = read_table('nih', films/'nih128', verbose=False)
    kept = pd.read_csv(ROOT/'nbs'/'results'/'nih128_settled.csv', index_col='row')
    names = table.image.map(lambda o: Path(o).name)
    assert set(kept.index) == set(np.flatnonzero(names.isin(published.index)))
    assert (published.loc[names[kept.index], list(kept)].eq('YES').to_numpy() == kept.to_numpy()).all()
