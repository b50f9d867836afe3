"""The command that judges predictions: a whole folder or none, one line for what is wrong, texts of a report without training."""
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from cxrlg.core import DataError, read_json
from cxrlg.eval import simulate
from cxrlg.evaluate import evaluate_predictions
from cxrlg.results import StudyFolder


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A folder with labels and predictions of two models"
    folder = tmp_path_factory.mktemp('files')
    y, z, patients = simulate(200, [.3, .2, .1], [1.5, 1.2, 1.8], seed=3)
    rng, labels = np.random.default_rng(1), ['Edema', 'Mass', '<b>Nodule']
    films = pd.DataFrame(dict(image=[f'f{i:04d}.png' for i in range(len(y))]))
    people = films.assign(patient=patients, sex=np.where(patients % 2, 'F', 'M'), view=rng.choice(['AP', 'PA'], len(y)))
    people.join(pd.DataFrame(y.astype(int), columns=labels)).to_csv(folder/'labels.csv', index=False)
    for name, noise in dict(old=1, new=.2).items():
        scores = expit(z + noise * rng.normal(size=z.shape))
        films.join(pd.DataFrame(scores, columns=labels)).to_csv(folder/f'{name}.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    "The command and its arguments, as the installed script runs them"
    script = tmp_path_factory.mktemp('bin')/'cxrlg_evaluate'
    script.write_text('from cxrlg.commands import evaluate\nevaluate()\n')
    return [sys.executable, str(script)]


def run(command, here, *args):
    done = subprocess.run([*command, *map(str, args)], cwd=here, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def judge(here, out, *names, **options):
    files = [here/f'{n}.csv' for n in names or ('old', 'new')]
    return evaluate_predictions(files, here/'labels.csv', out, n_boot=20, verbose=False, **options)


def test_what_the_command_leaves_and_says(command, here, tmp_path):
    status, said, err = run(command, here, 'old.csv', 'new.csv', '--labels', 'labels.csv', '--out', tmp_path/'out', '--n_boot', 30)
    assert status == 0, err
    assert 'arms: old, new; reference: old' in said and '3 folds by patient, made here with seed 42' in said and 'tables: ' in said
    folder = StudyFolder(tmp_path/'out')
    html = folder.report.read_text()
    assert 'Evaluation out</h1>' in html and 'Nothing was trained here' in html and 'Change against old' in html
    assert 'cxrlg_evaluate old.csv new.csv --labels labels.csv' in html and '3 folds by patient' in html
    assert 'arm none' not in html and 'against none' not in html and 'cxrlg_study' not in html and '<b>Nodule' not in html
    assert {p.stem for p in folder.figures.iterdir()} == {'arms', 'auc', 'roc', 'reliability', 'changes', 'decisions'}
    assert re.search('Decisions</h2>', html) and 'Gaps between groups' in html
    tables = read_json(folder.tables)
    assert {'decisions', 'gaps', 'points', 'subgroups', 'changes', 'power'} <= set(tables) and len(tables['gaps']) == 12
    assert list(pd.read_csv(folder.folds)) == ['image', 'patient', 'fold'] and read_json(folder.evaluation)[
        'predictions'
    ] == ['old.csv', 'new.csv']
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_the_same_files_give_the_same_folder(here, tmp_path):
    found = []
    for out in ('a/x', 'b/x'):
        judge(here, tmp_path/out)
        found.append({p.relative_to(tmp_path/out): p.read_bytes() for p in (tmp_path/out).rglob('*') if p.is_file()})
    assert found[0] == found[1]


def test_bad_input_is_one_line_and_nothing_is_written(command, here, tmp_path):
    pd.read_csv(here/'new.csv')[5:].to_csv(tmp_path/'new.csv', index=False)
    status, said, err = run(command, here, here/'old.csv', tmp_path/'new.csv', '--labels', 'labels.csv', '--out', tmp_path/'out')
    assert (
        status == 2
        and 'lacks 5 films that another file has' in err.splitlines()[-1]
        and err.splitlines()[-1].startswith('cxrlg_evaluate: ')
    )
    assert [p.name for p in tmp_path.iterdir()] == ['new.csv']
    status, _, err = run(command, here, 'old.csv', '--labels', 'labels.csv', '--names', 'Edema')
    assert status == 2 and '--names Edema: write NAME=VALUE' in err


def test_a_failure_on_the_way_leaves_nothing(here, tmp_path, monkeypatch):
    def broken(*_, **__): raise RuntimeError('broken')
    monkeypatch.setattr('cxrlg.evaluate.study_figures', broken)
    with pytest.raises((RuntimeError, DataError)): judge(here, tmp_path/'out')
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(here, tmp_path):
    out = tmp_path/'out'
    judge(here, out)
    before = (out/'report.html').read_bytes()
    with pytest.raises(DataError, match='holds an evaluation already.*overwrite'): judge(here, out)
    judge(here, out, 'old', overwrite=True)
    assert (out/'report.html').read_bytes() != before and [p.name for p in tmp_path.iterdir()] == ['out']
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(DataError, match='is no evaluation of predictions'): judge(here, tmp_path/'mine', overwrite=True)


def test_one_arm_and_seeds(here, tmp_path):
    judge(here, tmp_path/'one', 'old')
    assert 'There is no other arm to compare with old.' in (tmp_path/'one'/'report.html').read_text()
    files = dict(model=[here/'old.csv', here/'new.csv'])
    evaluate_predictions(files, here/'labels.csv', tmp_path/'seeds', n_boot=10, verbose=False)
    assert pd.read_csv(tmp_path/'seeds'/'results.csv').seeds.tolist() == [2]


def test_couplings_and_controls(here, tmp_path, monkeypatch):
    "The corrections that are fastest: what is asked for is in the tables, on the page and among the figures"
    from cxrlg import controls
    fit = controls.coupling_controls
    monkeypatch.setattr(controls, 'coupling_controls', lambda out, **k: fit(out, arms=['scale', 'couplings'], min_pos=5, **k))
    judge(here, tmp_path/'out', couplings=True)
    found = read_json(tmp_path/'out'/'results.json')['controls']
    assert {r['arm'] for r in found} == {'scale', 'couplings'} and (tmp_path/'out'/'figures'/'controls.png').exists()
    assert 'Couplings between labels, fitted on the logits of arm old' in (tmp_path/'out'/'report.html').read_text()


def test_help_is_quick(command, here):
    "Half of the time may be the interpreter's: the rest imports nothing heavy"
    code = 'import sys, cxrlg.commands; assert not {"torch", "pandas", "scipy", "matplotlib"} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True)
    before = os.times()
    assert '--couplings' in run(command, here, '--help')[1]
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_stopped_on_the_way(command, here, tmp_path):
    args = [*command, 'old.csv', 'new.csv', '--labels', 'labels.csv', '--out', tmp_path/'out', '--n_boot', '1000000']
    process = subprocess.Popen([*map(str, args)], cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(tmp_path.glob('.out.tmp-*/out/folds.csv')): time.sleep(.1)
    time.sleep(1)
    process.terminate()
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and err.split()[-3:] == ['was', 'not', 'written'] and list(tmp_path.iterdir()) == []


def test_only_what_an_evaluation_wrote_is_replaced(here, tmp_path):
    out = tmp_path/'out'
    judge(here, out)
    there = sorted(p.relative_to(out).as_posix() for p in out.rglob('*') if p.is_file())
    assert read_json(StudyFolder(out).evaluation)['written'] == there
    (out/'figures'/'mine.txt').write_text('x')
    with pytest.raises(DataError, match='holds 1 files that no evaluation wrote .figures/mine.txt.'): judge(here, out, overwrite=True)
    (out/'figures'/'mine.txt').unlink()
    inside = shutil.copy(here/'old.csv', out/'old.csv')
    with pytest.raises(DataError, match='old.csv lies in .*which would be replaced'):
        evaluate_predictions({'old': [inside]}, here/'labels.csv', out, n_boot=20, verbose=False, overwrite=True)
    assert (out/'old.csv').exists() and (out/'report.html').exists()


@pytest.mark.skipif(os.name == 'nt', reason='links')
def test_a_link_stays_a_link(here, tmp_path):
    (tmp_path/'real').mkdir()
    for name in ('real', 'made'):
        (tmp_path/f'to_{name}').symlink_to(tmp_path/name)
        assert judge(here, tmp_path/f'to_{name}', 'old').is_file()
        assert (tmp_path/f'to_{name}').is_symlink() and (tmp_path/name/'report.html').is_file()


def test_a_margin_is_above_zero(here, tmp_path):
    for margin in (-1, 0, float('nan')):
        with pytest.raises(DataError, match=f'margin={margin} must be above 0'): judge(here, tmp_path/'out', 'old', margin=margin)


def test_an_arm_that_looks_like_a_formula(here, tmp_path):
    evaluate_predictions({'=cmd()': here/'old.csv'}, here/'labels.csv', tmp_path/'out', n_boot=20, verbose=False)
    assert pd.read_csv(StudyFolder(tmp_path/'out').results).arm.tolist() == ["'=cmd()"]
