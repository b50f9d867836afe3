"A study end to end: what is refused, a fold that fails, a study that is stopped, locked patients, and the second call."

import concurrent.futures
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from PIL import Image
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from conftest import ROOT
from cxrlg import commands, study
from cxrlg.core import DataError
from cxrlg.phantom import make_phantom
from cxrlg.programs import _failure
from cxrlg.results import read_study
from cxrlg.study import StudyError, expand, read_config, run_study, score_locked
from cxrlg.config import TrainConfig
from cxrlg.tables import fit_calibration
from cxrlg.train import train_fold

TINY = dict(
    study='tiny',
    arms=['none'],
    data_args={'n_patients': 40},
    size=32,
    n_splits=2,
    arch='test_resnet',
    arch_args={},
    epochs=1,
    bs=8,
    threads=1,
)


def command(*args, **env):
    "The command as a user calls it: exit status, standard output, lines of standard error without warnings"
    run = subprocess.run(
        [Path(sys.executable).parent / 'cxrlg_study', *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONWARNINGS='ignore') | env,
    )
    return run.returncode, run.stdout, run.stderr


def wait_until(ok, process, log, seconds=240):
    "Wait for a condition while `process` runs"
    end = time.monotonic() + seconds
    while not ok():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(.1)


def notebooks_of(folders):
    "The (process that is ready, [its fork]) that train in `folders` now: who holds a fold's lock is written beside it"
    found = []
    for folder in folders:
        try:
            fork = psutil.Process(int(re.search(r'process (\d+)', (folder/'lock.holder').read_text())[1]))
            found.append((fork.parent(), [fork]))
        except (FileNotFoundError, TypeError, psutil.NoSuchProcess): continue
    return [(ready, forks) for ready, forks in found if ready]


def are_gone(notebooks, seconds=10):
    "Assert that the processes that run notebooks end by themselves"
    every = [p for runner, kernels in notebooks for p in (runner, *kernels)]
    assert every
    _, left = psutil.wait_procs(every, seconds)
    assert not [p for p in left if p.status() != psutil.STATUS_ZOMBIE], left


def stop(process, how, log, group=False):
    "Send a signal to the command, or to its whole group as a terminal does; it ends soon, and says how to go on"
    (os.killpg if group else os.kill)(process.pid, how)
    assert process.wait(60) == 130
    assert (
        log.read_text()
        .strip()
        .splitlines()[-1]
        .endswith('cxrlg_study: stopped; the same command goes on from the last finished epoch of each fold')
    )
    assert 'Traceback' not in log.read_text() and 'failed:' not in log.read_text()


@pytest.fixture
def config(tmp_path):
    (tmp_path/'tiny.yaml').write_text(yaml.safe_dump(TINY | {'out_dir': str(tmp_path/'runs')}))
    return tmp_path/'tiny.yaml'


def test_a_failing_fold_is_named_and_the_others_go_on(config, tmp_path, monkeypatch, capsys):
    folds = [tmp_path/'runs'/'tiny'/'none'/'seed42'/f'fold{k}' for k in (0, 1)]
    folds[1].mkdir(parents=True)
    (folds[1]/'checkpoint.pt').write_bytes(b'no checkpoint')
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(signal, 'signal', lambda *_: None)
        m.setattr(study, 'evaluate', lambda *_: pd.DataFrame())
        commands.study(str(config))
    err = capsys.readouterr().err
    assert e.value.code == 1
    assert '05_train.ipynb, cell' in err and 'checkpoint.pt is damaged' in err and '1 of 2 folds failed' in err
    assert (folds[0]/'done.json').is_file() and not (folds[1]/'done.json').exists()

    (folds[1]/'checkpoint.pt').unlink()
    train_fold(expand(read_config(config))[1], bar=False)
    stamp = (folds[0]/'done.json').stat().st_mtime_ns
    status, out, err = command(config, '--n_boot', 50)
    assert status == 0, err
    assert 'report.html' in out and 'fold1' in out
    assert (folds[0]/'done.json').stat().st_mtime_ns == stamp
    results = pd.read_csv(tmp_path/'runs'/'tiny'/'results.csv')
    done = [json.loads((fold/'done.json').read_text())['auc'] for fold in folds]
    assert results[['fold0', 'fold1']].iloc[0].tolist() == pytest.approx(done, abs=1e-6)
    assert 'phantom' in (tmp_path/'runs'/'tiny'/'report.html').read_text()


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(epoch=2), "did you mean 'epochs'"),
        (dict(arms=['none', 'lasso']), 'none, l1, prox'),
        (dict(folds=[0, 2]), 'the folds are 0 to 1'),
        (dict(data='csv', data_dir='no/such/folder', data_args={}), 'no/such/folder'),
        (dict(arch='test_resnt'), 'test_resnet'),
        (dict(epochs='three'), 'whole number'),
        (dict(n_splits=41), '40 patients'),
        (dict(arms=[]), 'arms'),
        (dict(seeds=['x']), 'seed'),
        (dict(views=['PA', 'L']), "no view 'L'"),
        (dict(views='PA'), 'a list of the names of views'),
        (dict(unit='visit'), 'film, study, patient'),
        (dict(unit='study', group='image'), 'needs group=patient'),
    ],
)
def test_refused_before_anything_runs(tmp_path, change, says):
    with pytest.raises(DataError, match=says) as e: run_study(TINY | change, out_dir=str(tmp_path), bar=False)
    assert '\n' not in str(e.value)
    assert not list(tmp_path.rglob('*.ipynb'))


def test_the_command_refuses_in_one_line(tmp_path):
    status, out, err = command(tmp_path/'missing.yaml')
    assert status == 2 and out == '' and err.strip().splitlines()[-1].startswith('cxrlg_study: there is no configuration')
    (tmp_path/'bad.yaml').write_text('study: [1\n')
    with pytest.raises(DataError, match='not valid YAML'): read_config(tmp_path/'bad.yaml')
    (tmp_path/'list.yaml').write_text('- a\n- b\n')
    with pytest.raises(DataError, match='not a mapping'): read_config(tmp_path/'list.yaml')


def test_a_stopped_study_leaves_nothing_behind_and_goes_on(tmp_path, monkeypatch):
    (tmp_path/'long.yaml').write_text(yaml.safe_dump(TINY | dict(study='long', epochs=80, folds=[0], out_dir=str(tmp_path/'runs'))))
    fold, log = tmp_path/'runs'/'long'/'none'/'seed42'/'fold0', tmp_path/'log'
    call = lambda n: subprocess.Popen(
        [Path(sys.executable).parent / 'cxrlg_study', tmp_path / 'long.yaml', '--n_jobs', str(n)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=open(log, 'w'),
        start_new_session=True,
        env=os.environ | dict(PYTHONWARNINGS='ignore'),
    )
    rows = lambda: len(study.torch.load(fold/'checkpoint.pt', weights_only=True)['history']) if (fold/'checkpoint.pt').is_file() else 0
    for n, how, group in ((2, signal.SIGINT, True), (1, signal.SIGTERM, False)):
        before, going = rows(), call(n)
        wait_until(lambda: notebooks_of([fold]) and rows() > before, going, log)
        notebooks = notebooks_of([fold])
        stop(going, how, log, group)
        are_gone(notebooks)
        assert rows() > before and not (fold/'done.json').exists()
    kept = rows()
    monkeypatch.setattr(study, 'evaluate', lambda *_: pd.DataFrame())
    run_study(tmp_path/'long.yaml', bar=False)
    assert kept < 80 and pd.read_csv(fold/'history.csv').epoch.tolist() == list(range(1, 81))
    assert (fold/'done.json').is_file() and not list(tmp_path.rglob('checkpoint.pt'))


def trained(tmp_path, **more):
    "A finished little study with locked patients, trained in this process"
    jobs = expand(read_config(TINY | dict(locked=.2, out_dir=str(tmp_path)) | more))
    for cfg in jobs: train_fold(cfg, bar=False)
    return jobs


def test_locked_patients_are_scored_once_and_by_these_weights(tmp_path):
    jobs = trained(tmp_path)
    folder = tmp_path/'tiny'
    assert score_locked(folder, bar=False) == [cfg.path/'locked.parquet' for cfg in jobs]
    films = pd.read_csv(folder/'folds.csv')
    for cfg in jobs:
        locked, oof = pd.read_parquet(cfg.path/'locked.parquet'), pd.read_parquet(cfg.path/'oof.parquet')
        assert (locked.row == films.index[films.fold == -1]).all() and len(locked) and (locked.fold == -1).all()
        assert list(locked.dtypes) == list(oof.dtypes) and list(locked) == list(oof)
        assert not set(locked.patient) & set(films.patient[films.fold >= 0])
    stamps = [(cfg.path/'locked.parquet').stat().st_mtime_ns for cfg in jobs]
    assert score_locked(str(folder), bar=False) == [] == score_locked(jobs, bar=False)
    assert stamps == [(cfg.path/'locked.parquet').stat().st_mtime_ns for cfg in jobs]

    shutil.copy(jobs[1].path/'locked.parquet', jobs[0].path/'locked.parquet')
    with pytest.raises(DataError, match='fold0/locked.parquet was made by other weights'): score_locked(folder, bar=False)
    (jobs[0].path/'locked.parquet').write_bytes(b'no parquet')
    with pytest.raises(DataError, match='fold0/locked.parquet cannot be read'): score_locked(folder, bar=False)
    (jobs[0].path/'locked.parquet').unlink()
    config = json.loads((jobs[0].path/'config.json').read_text())
    for part in ('pixels', 'table', 'folds'):
        (jobs[0].path/'config.json').write_text(json.dumps(config | dict(hashes=config['hashes'] | {part: 'another'})))
        with pytest.raises(DataError, match=f'another {part}'): score_locked(folder, bar=False)
    assert not (jobs[0].path/'locked.parquet').exists() and not list(tmp_path.rglob('*.tmp-*'))


def test_folds_are_scored_side_by_side_each_with_its_own_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    jobs, seen, both, frame = trained(tmp_path), [], threading.Barrier(2, timeout=120), study._locked_frame
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    def together(*args):
        both.wait()
        seen.append(torch.get_num_threads())
        return frame(*args)
    alone = {cfg.path: pd.read_parquet(path) for cfg, path in zip(jobs, score_locked(jobs, bar=False, n_jobs=1))}
    for path in alone: (path/'locked.parquet').unlink()
    monkeypatch.setattr(study, '_locked_frame', together)
    score_locked(jobs, bar=False, n_jobs=2)
    assert seen == [1, 1] and torch.get_num_threads() == 2
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2, 'a new thread takes the number that was set last'
    torch.set_num_threads(before)
    for path, one in alone.items(): pd.testing.assert_frame_equal(pd.read_parquet(path/'locked.parquet'), one)


def test_a_fold_that_cannot_be_scored_leaves_nothing_half_written(tmp_path, monkeypatch):
    jobs, frame = trained(tmp_path), study._locked_frame
    def failing(cfg, *args):
        if cfg.fold == 1: raise DataError('this one')
        return frame(cfg, *args)
    (jobs[1].path/'locked.parquet.tmp-1').write_bytes(b'left by a kill')
    monkeypatch.setattr(study, '_locked_frame', failing)
    with pytest.raises(DataError, match='this one'): score_locked(jobs, bar=False, n_jobs=2)
    assert not list(tmp_path.rglob('*.tmp-*')) and not list(tmp_path.rglob('lock')) and not (jobs[1].path/'locked.parquet').exists()
    monkeypatch.setattr(study, '_locked_frame', frame)
    assert jobs[1].path/'locked.parquet' in score_locked(jobs, bar=False)


@pytest.mark.parametrize('why', [KeyboardInterrupt, DataError])
def test_scoring_that_is_stopped_ends_every_fold_at_its_next_batch(tmp_path, monkeypatch, why):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    jobs, both, ends, before = trained(tmp_path), threading.Barrier(2, timeout=120), [], torch.get_num_threads()
    def long(cfg, table, pixels, rows):
        both.wait()
        if cfg.fold == 1 and why is DataError: raise DataError('this one')
        if cfg.fold == 1: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        for _ in range(1000):
            try: pixels[rows[:2]]
            except concurrent.futures.CancelledError:
                ends.append(cfg.fold)
                raise
            time.sleep(.05)
    monkeypatch.setattr(study, '_locked_frame', long)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(why): score_locked(jobs, bar=False, n_jobs=2)
    finally: signal.signal(signal.SIGINT, handler)
    assert sorted(ends) == ([0] if why is DataError else [0, 1]) and torch.get_num_threads() == before
    assert not list(tmp_path.rglob('*.tmp-*')) and not list(tmp_path.rglob('lock')) and not list(tmp_path.rglob('locked.parquet'))


def test_an_interrupt_before_the_first_wait_ends_every_fold_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    jobs, begun, ends = trained(tmp_path), threading.Barrier(3, timeout=120), []
    def long(cfg, table, pixels, rows):
        begun.wait()
        try:
            while True:
                pixels[rows[:2]]
                time.sleep(.05)
        except concurrent.futures.CancelledError:
            ends.append(cfg.fold)
            raise
    def interrupted(scoring):
        begun.wait()
        raise KeyboardInterrupt
    monkeypatch.setattr(study, '_locked_frame', long)
    monkeypatch.setattr(concurrent.futures, 'as_completed', interrupted)
    with pytest.raises(KeyboardInterrupt): score_locked(jobs, bar=False, n_jobs=2)
    assert sorted(ends) == [0, 1]


@pytest.mark.parametrize('bs, epochs, said', [(64, 1, True), (64, 2, False), (4, 1, False)])
def test_a_study_that_takes_one_step_says_that_it_learns_nothing(tmp_path, bs, epochs, said):
    jobs = expand(TINY | dict(out_dir=str(tmp_path), bs=bs, epochs=epochs, arms=['none']))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        study.prepare(jobs)
    assert said == any('nothing is learned' in str(w.message) for w in seen)


def test_a_process_that_comes_second_does_not_score_again(tmp_path, monkeypatch):
    jobs, frame, calls = trained(tmp_path), study._locked_frame, []
    score_locked(jobs, bar=False)
    stamp = (jobs[0].path/'locked.parquet').stat().st_mtime_ns
    monkeypatch.setattr(study, '_locked_frame', lambda *a: calls.append(a) or frame(*a))
    study._score(jobs[0], None, None, None)
    assert not calls and stamp == (jobs[0].path/'locked.parquet').stat().st_mtime_ns


def test_a_fold_trained_again_forgets_what_its_predecessor_said(tmp_path):
    jobs = trained(tmp_path)
    score_locked(jobs, bar=False)
    (jobs[0].path/'model.safetensors').unlink()
    train_fold(jobs[0], bar=False)
    assert not (jobs[0].path/'locked.parquet').exists() and (jobs[1].path/'locked.parquet').exists()


@pytest.mark.parametrize('arch_args', [dict(act_layer='foo'), dict(block='x'), dict(output_stride=5), dict(layers='two')])
def test_a_model_that_cannot_be_built_is_one_line(tmp_path, arch_args):
    with pytest.raises(DataError, match='arch=|holds no') as e:
        run_study(TINY | dict(out_dir=str(tmp_path), arch='resnet10t', arch_args=arch_args), bar=False)
    assert '\n' not in str(e.value) and str(e.value).split(': ')[-1].strip()


def test_locked_patients_are_not_scored_before_the_end(tmp_path):
    jobs = trained(tmp_path, folds=[0])
    with pytest.raises(DataError, match='none/seed42/fold1 of tiny not finished'): score_locked(tmp_path/'tiny', bar=False)
    (tmp_path/'tiny'/'prox'/'seed42'/'fold0').mkdir(parents=True)
    with pytest.raises(DataError, match='prox/seed42/fold0 is not finished'): score_locked(tmp_path/'tiny', bar=False)
    with pytest.raises(DataError, match='give the folder of a study'): score_locked(tmp_path/'nowhere', bar=False)
    trained(tmp_path, study='open', locked=0.)
    with pytest.raises(DataError, match='open has no locked patients'): score_locked(tmp_path/'open', bar=False)


def test_the_report_is_made_anew_when_something_in_it_changed(tmp_path, monkeypatch):
    fold, notebook = tmp_path/'none'/'seed42'/'fold0', tmp_path/'06_eval.ipynb'
    fold.mkdir(parents=True)
    shutil.copy(study.notebook('06_eval'), notebook)
    monkeypatch.setattr(study, 'notebook', lambda name: notebook)
    key = lambda n_boot=20: study._evaluation_key(study.StudyFolder(tmp_path), n_boot)
    keys = [key(), key(30)]
    for name, text in (
        ('done.json', '{}'),
        ('done.json', '{"auc": 1}'),
        ('locked.parquet', 'a'),
        ('locked.parquet', 'b'),
        ('../../../flow.json', '{"left_out": 0}'),
        ('../../../flow.json', '{"left_out": 1}'),
    ):
        (fold/name).write_text(text)
        keys.append(key())
    nb = nbformat.read(notebook, 4)
    nb.cells[0].source += ' other prose'
    for cell in nb.cells: cell.get('outputs', []).clear()
    nbformat.write(nb, notebook)
    assert key() == keys[-1]
    nb.cells[-1].source += '#'
    nbformat.write(nb, notebook)
    assert len({*keys, key()}) == len(keys) + 1


def test_the_films_that_were_left_out_are_counted(tmp_path, monkeypatch):
    table, pixels, _ = make_phantom(40, size=32)
    table.attrs['left_out'] = np.int64(7)
    monkeypatch.setattr(study, 'load_data', lambda cfg: (table, pixels))
    jobs = expand(read_config(TINY | dict(out_dir=str(tmp_path))))
    study.prepare(jobs)
    assert json.loads((tmp_path/'tiny'/'flow.json').read_text()) == {'left_out': 7}
    del table.attrs['left_out']
    study.prepare(jobs)
    assert json.loads((tmp_path/'tiny'/'flow.json').read_text()) == {'left_out': 0}


def test_a_folder_that_cannot_be_written_is_one_line(config, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').write_text('not a folder')
    monkeypatch.setattr(signal, 'signal', lambda *_: None)
    with pytest.raises(SystemExit) as e: commands.study(str(config), out_dir=str(tmp_path/'file'/'runs'))
    assert e.value.code == 2
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith('cxrlg_study: ') and f'{tmp_path}/file/runs' in said and 'Not a directory' in said


@contextmanager
def files_up_to(n):
    "Let no file grow beyond `n` bytes here and in what is started from here: what a full disk does, without one"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_loses_nothing(config, tmp_path):
    with files_up_to(1000), pytest.raises(DataError, match=rf'{re.escape(str(tmp_path))}/runs/.*File too large') as e:
        run_study(config, bar=False)
    assert '\n' not in str(e.value)
    assert [f for f in (tmp_path/'runs').rglob('*') if f.is_file()] == []
    with files_up_to(300_000), pytest.raises(
        StudyError, match='1 of 1 folds failed; .*, cell [0-9]+: [A-Z][A-Za-z]+: .{20}'
    ) as e:
        run_study(config, folds=[0], bar=False)
    assert '\n' not in str(e.value)
    assert not list(tmp_path.rglob('done.json')) and not list(tmp_path.rglob('*.tmp-*'))


def test_a_notebook_that_is_not_written_says_what_papermill_said(tmp_path):
    assert (
        _failure(tmp_path / 'no.ipynb', 'some\nOSError: disk full\n')
        == f'{tmp_path}/no.ipynb: papermill could not write the notebook: OSError: disk full'
    )
    (tmp_path/'half.ipynb').write_text('{"cells": [')
    assert _failure(tmp_path/'half.ipynb', '').endswith('no message')


def test_a_fold_of_an_older_version_is_of_the_same_study(tmp_path):
    cfg = TrainConfig(**{k: v for k, v in TINY.items() if k != 'arms'}, out_dir=str(tmp_path))
    other = study.replace(cfg, fold=1)
    other.path.mkdir(parents=True)
    said = study.asdict(other)
    for name in ('jitter', 'accum', 'message', 'symmetric', 'deterministic', 'on_device'): said.pop(name, None)
    (other.path/'config.json').write_text(json.dumps(said))
    study._check_others(cfg)
    with pytest.raises(DataError, match='accum: 1 there, 2 here'): study._check_others(study.replace(cfg, accum=2))
    study._check_others(study.replace(cfg, alpha=.5, lam=1e-3, threads=2))
    with pytest.raises(DataError, match='alpha: 0.3 there, 0.5 here'): study._check_others(study.replace(other, alpha=.5))


@pytest.fixture(scope='module')
def ward(tmp_path_factory):
    "Phantom films as files: two views of most patients, one film in nine lateral; a CSV with and one without the study"
    folder = tmp_path_factory.mktemp('ward')
    table, pixels, _ = make_phantom(n_patients=40, size=32)
    table['view'] = table.view.where(np.arange(len(table)) % 9 > 0, 'L')
    table['study'] = (table.study + 1) // 2
    for image, film in zip(table.image, pixels): Image.fromarray(film).save(folder/image)
    table.to_csv(folder/'labels.csv', index=False)
    table.drop(columns='study').to_csv(folder/'no_study.csv', index=False)
    return folder, table


def of_ward(folder, **more):
    "The configuration of a study of the ward's films"
    args = dict(study='study', view='view', labels=['Edema', 'Pleural Effusion', 'Support Devices'])
    return TINY | dict(data='csv', data_dir=str(folder), data_args=args, locked=.2) | more


def test_a_study_by_patient_of_frontal_films_end_to_end(ward, tmp_path):
    folder, table = ward
    asked = of_ward(folder, study='people', unit='patient', views=['PA', 'AP'])
    results = run_study(asked, out_dir=str(tmp_path), n_boot=20, bar=False)
    runs, frontal = tmp_path/'people', table[table.view != 'L']
    oof = pd.concat([pd.read_parquet(runs/f'none/seed42/fold{k}/oof.parquet') for k in (0, 1)])
    assert set(oof.view) == {'PA', 'AP'} and len(pd.read_csv(runs/'folds.csv')) == len(frontal)
    flow = json.loads((runs/'flow.json').read_text())
    assert flow == dict(left_out=0, other_views=len(table) - len(frontal))
    config = json.loads((runs/'none/seed42/fold0/config.json').read_text())
    assert config['unit'] == 'patient' and config['views'] == ['PA', 'AP']
    report = (runs/'report.html').read_text()
    said = f'unit patient: {oof.patient.nunique()} cases from {len(oof)} films'
    assert said in report and f'{oof.patient.nunique()} cases of {oof.patient.nunique()} patients' in report
    assert f'{flow["other_views"]} films of other or unknown views are left out' in report
    assert results['mean'][0] == pytest.approx(by_hand(oof), abs=1e-6)
    assert json.loads((runs/'calibration.json').read_text())['none'] == scale_of_films(runs)


def mean_of_views(films, label):
    p = (expit(films[f'r:{label}']) + expit(films[f'rf:{label}'])) / 2
    return p.groupby(films.view).mean().mean()


def by_hand(oof):
    "The mean over folds of the macro AUC of patients, by loops"
    aucs, labels = [], [c[2:] for c in oof if c.startswith('y:')]
    for _, fold in oof.groupby('fold'):
        people = list(fold.groupby('patient'))
        y = np.array([[g[f'y:{l}'].max() for l in labels] for _, g in people])
        p = np.array([[mean_of_views(g, l) for l in labels] for _, g in people])
        aucs.append(np.mean([roc_auc_score(y[:, j], p[:, j]) for j in range(len(labels)) if 0 < y[:, j].sum() < len(y)]))
    return np.mean(aucs)


def scale_of_films(runs):
    scale = fit_calibration(read_study(runs)).set_index('label')
    return scale[['temperature', 'bias']].to_dict('index')


def test_another_unit_trains_nothing_again_and_makes_the_report_anew(ward, tmp_path):
    folder, _ = ward
    asked = of_ward(folder, study='units')
    by_film = run_study(asked, out_dir=str(tmp_path), n_boot=20, bar=False)
    done = [f.stat().st_mtime_ns for f in tmp_path.rglob('done.json')]
    by_study = run_study(asked | dict(unit='study'), out_dir=str(tmp_path), n_boot=20, bar=False)
    assert [f.stat().st_mtime_ns for f in tmp_path.rglob('done.json')] == done and by_film['mean'][0] != by_study['mean'][0]
    configs = list(tmp_path.rglob('config.json'))
    assert {json.loads(f.read_text())['unit'] for f in configs} == {'study'}
    assert yaml.safe_load((tmp_path/'units/study.yaml').read_text())['unit'] == 'study'
    assert run_study(asked, out_dir=str(tmp_path), n_boot=20, bar=False).equals(by_film)
    with pytest.raises(DataError, match=r"views: \[\] there, \['PA'\] here"):
        run_study(asked | dict(views=['PA']), out_dir=str(tmp_path), bar=False)


def test_a_table_without_studies_is_refused_before_anything_is_trained(ward, tmp_path):
    folder, _ = ward
    asked = of_ward(folder, unit='study')
    asked['data_args'] = {k: v for k, v in asked['data_args'].items() if k != 'study'} | dict(csv='no_study.csv')
    with pytest.raises(DataError, match="unit='study': nothing says the study of a film: add a column study") as e:
        run_study(asked, out_dir=str(tmp_path), bar=False)
    assert '\n' not in str(e.value) and not list(tmp_path.rglob('*.ipynb')) and not list(tmp_path.rglob('oof.parquet'))
