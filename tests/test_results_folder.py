"""A study's folder: names of files, damaged and missing folds, locked films, notebooks that papermill runs."""
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from cxrlg.core import DataError
from cxrlg.results import FoldFolder, StudyFolder, example_study, injected_parameters, read_study


@pytest.fixture()
def study(tmp_path): return StudyFolder(example_study(tmp_path/'small', n_patients=150))


@pytest.fixture()
def closed(tmp_path): return StudyFolder(example_study(tmp_path/'closed', 300, seeds=(1, 2), locked=.4))


def rewrite(path, edit): edit(pd.read_parquet(path)).to_parquet(path, index=False)


def test_rooms_of_statistics_need_neither_torch_nor_matplotlib():
    code = 'import sys, cxrlg.eval, cxrlg.tables; print({"torch", "matplotlib", "sklearn"} & set(sys.modules))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'


def test_names_are_those_that_a_fold_is_written_with(study):
    fold = study.fold('prox', 42, 1)
    written = {f.name for f in fold.path.iterdir()}
    known = {v.name for v in vars(FoldFolder).values() if hasattr(v, 'name')}
    assert written <= known and fold.lacking() == ['model.json', 'model.safetensors']
    assert list(study.found()) == [(a, 42, f) for a in ('none', 'prox') for f in range(3)] and study.found() == study.finished()


def test_folders_that_are_no_folds_are_passed_over(study):
    (study.path/'prox/seed42/fold1.old').mkdir()
    (study.path/'prox/seedling/fold1').mkdir(parents=True)
    (study.path/'prox/seed42/fold9').write_text('a file')
    assert len(study.found()) == 6


# what is missing

def test_missing_and_unfinished_folds_are_named(study):
    study.fold('prox', 42, 1).done.unlink()
    fold = study.fold('none', 42, 0)
    for f in fold.path.iterdir(): f.unlink()
    fold.path.rmdir()
    assert read_study(study).notes == ['none/seed42/fold0 is missing: left out', 'prox/seed42/fold1 is not finished: left out']


def test_a_seed_without_a_fold_leaves_a_rectangle(tmp_path):
    folder = StudyFolder(example_study(tmp_path/'seeds', 150, seeds=(1, 2)))
    folder.fold('none', 2, 1).done.unlink()
    s = read_study(folder)
    assert s.grid('none') == ((1, 2), (0, 2))
    assert 'none/seed1/fold1 is finished but left out: not every seed of none has this fold' in s.notes


def test_no_done_fold(tmp_path):
    (tmp_path/'none/seed42/fold0').mkdir(parents=True)
    with pytest.raises(DataError, match='no finished fold'): read_study(tmp_path)


# what is damaged

def turned(t): return t.assign(**{'y:Edema': 1 - t['y:Edema']})
def shorter(t): return t.iloc[1:]
def unknown(t): return t.assign(**{'r:Edema': np.nan})
def infinite(t): return t.assign(**{'rf:Edema': np.inf})
def without_flip(t): return t.drop(columns='zf:Edema')
def without_label(t): return t.drop(columns=[c for c in t if c.endswith(':Edema')])


@pytest.mark.parametrize('edit,text', [
    (turned, 'different films or targets'), (shorter, 'different films or targets'), (unknown, 'NaN or infinite logits'),
    (without_flip, 'has no column zf:Edema'), (without_label, 'same labels in every arm')], ids=lambda x: getattr(x, '__name__', ''))
def test_damaged_predictions_are_named_in_one_line(study, edit, text):
    rewrite(study.fold('prox', 42, 1).oof, edit)
    refused(study, text)


OTHER = json.dumps(dict(n_splits=3, hashes=dict(table='other', folds='simulated')))


@pytest.mark.parametrize('file,content,text', [('oof', 'PAR1 cut off', 'cannot be read'), ('oof', None, 'cannot be read'),
    ('history', '', 'cannot be read'), ('config', '{', 'cannot be read'), ('config', OTHER, 'another table')])
def test_damaged_file_is_named_in_one_line(study, file, content, text):
    path = getattr(study.fold('prox', 42, 1), file)
    if content is None: path.unlink()
    else: path.write_text(content)
    refused(study, text)


@pytest.mark.parametrize('edit,text', [(shorter, 'different locked films'), (infinite, 'NaN or infinite logits'),
    (without_flip, 'has no column zf:Edema'), (without_label, 'has labels')], ids=lambda x: getattr(x, '__name__', ''))
def test_damaged_locked_file_is_named_in_one_line(closed, edit, text):
    rewrite(closed.fold('prox', 2, 1).locked, edit)
    refused(closed, text)


def refused(folder, text):
    with pytest.raises(DataError, match=text) as e: read_study(folder)
    assert 'fold1' in str(e.value) and '\n' not in str(e.value)


def test_locked_file_cut_off(closed):
    closed.fold('prox', 2, 1).locked.write_bytes(b'PAR1')
    refused(closed, 'cannot be read')


# locked patients

def test_locked_patient_in_a_fold_is_said_and_not_scored(closed):
    patient = pd.read_parquet(closed.fold('none', 1, 0).oof).patient[0]
    for fold in closed.found().values(): rewrite(fold.locked, lambda t: t.assign(patient=[patient, *t.patient[1:]]))
    s = read_study(closed)
    assert not s.has_locked
    assert s.notes == ['1 patients of the locked films have films in the folds too: the locked films are left out']


def test_locked_without_a_film_counts_as_none(closed):
    for fold in closed.found().values(): rewrite(fold.locked, lambda t: t.iloc[:0])
    assert not read_study(closed).has_locked


# a notebook as a program

def test_parameters_that_papermill_injected():
    cells = ['', 'import x', "study = ''  # name\nn_boot = 2000", '# Parameters\nstudy = "a"\nn_boot = 20\n', 'job()']
    assert injected_parameters(cells) == ['study', 'n_boot'] and injected_parameters(cells[:3]) == []
    with pytest.raises(DataError, match="no parameter 'nboot'; did you mean 'n_boot'"):
        injected_parameters([*cells[:3], '# Parameters\nnboot = 3\n'])
