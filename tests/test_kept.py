"""Kept studies: what comes back, what is not told, and damaged files."""
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cxrlg.corrections import Outputs
from cxrlg.core import DataError
from cxrlg.eval import simulate
from cxrlg.results import example_study, read_study
from cxrlg.kept import load_outputs, load_study, locked_outputs, oof_outputs, save_outputs, save_study


@pytest.fixture(scope='module')
def out():
    y, z, patients = simulate(500, [.3, .2, .1, .25], [1.5, 1.2, 1.8, 1.], seed=5)
    two = np.stack([z, z + .3*np.random.default_rng(0).normal(size=z.shape)])
    return Outputs(y, two, patients, patients % 3, list('ABCD'), context=np.where(patients % 2, 'AP', 'PA'))


def test_saved_outputs_come_back_and_judge_alike(out, tmp_path):
    "Logits are kept to 1/1024: the AUC moves by less than its rounding matters"
    y, z, patients = simulate(80, [.3, .2, .1, .25], 1.5, seed=9)
    locked = (y, np.stack([z, z])[:, None], patients + 10_000, np.where(patients % 2, 'AP', 'PA'))
    save_outputs(out, tmp_path/'o.npz', locked, note='test')
    back, held, more = load_outputs(tmp_path/'o.npz')
    assert np.abs(back.logits - out.logits).max() <= .5/1024 + 1e-9 and np.array_equal(back.targets, out.targets, equal_nan=True)
    assert (pd.factorize(back.patients)[0] == pd.factorize(out.patients)[0]).all() and back.labels == out.labels
    assert str(more['note']) == 'test'
    assert list(back.context) == list(out.context) and list(held[3]) == list(locked[3])
    assert held[1].shape == locked[1].shape and not set(held[2]) & set(back.patients)
    for j in range(4):
        before, after = (roc_auc_score(out.targets[:, j], o.logits[0, :, j]) for o in (out, back))
        assert abs(after - before) < 1e-4
    (tmp_path/'bad.npz').write_bytes(b'nothing')
    with pytest.raises(DataError, match='bad.npz'): load_outputs(tmp_path/'bad.npz')


@pytest.fixture()
def study(tmp_path):
    folder = tmp_path/'real'/'demo'
    return read_study(example_study(folder, arms=('none', 'prox'), seeds=(42, 43), n_patients=300, locked=.2))


def test_a_kept_study_names_no_film_no_patient_and_no_folder(study, tmp_path):
    "Only rows, running numbers, and sex, age and view"
    private = dict(weights='/srv/someone/w.pth', data_args={'csv': '/srv/someone/patients.csv'}, data_dir='/films')
    for c in study.cells.values(): c['config'] |= private
    save_study(study, tmp_path/'kept.npz')
    with np.load(tmp_path/'kept.npz') as f: texts = ' '.join(str(f[k]) for k in f if f[k].dtype.kind == 'U')
    names = set(study.films((0,)).image) | set(study.films((0,)).patient)
    assert not [n for n in names if n in texts] and 'someone' not in texts and '/films' not in texts
    assert 'w.pth' in texts and 'patients.csv' in texts


def test_logits_before_the_graph_are_kept_of_the_folds_and_of_the_locked_films(study, tmp_path):
    save_study(study, tmp_path/'kept.npz')
    back, (out, _, _) = load_study(tmp_path/'kept.npz'), load_outputs(tmp_path/'kept.npz')
    assert list(out.before) == ['prox'] and np.abs(out.before['prox'] - oof_outputs(study).before['prox']).max() < 1e-3
    a, b = (locked_outputs(s, 'prox', before=True)[1] for s in (study, back))
    assert np.abs(a - b).max() < 1e-3 and np.abs(a - locked_outputs(study, 'prox')[1]).max() > 1e-3
    with np.load(tmp_path/'kept.npz') as f: parts = {k: f[k] for k in f if 'locked_before' not in k}
    parts['more:before_prox'] = parts.pop('before:prox') # as earlier versions called it
    np.savez_compressed(tmp_path/'old.npz', **parts)
    old = load_study(tmp_path/'old.npz')
    assert 'before' in old.kinds and np.isnan(locked_outputs(old, 'prox', before=True)[1]).all()


def test_what_a_kept_study_lacks_is_said(tmp_path):
    whole = example_study(tmp_path/'demo', arms=('none', 'prox'), seeds=(42, 43), n_patients=300, locked=.2)
    (whole/'prox'/'seed43'/'fold1'/'done.json').unlink()
    (whole/'none'/'seed42'/'fold0'/'locked.parquet').unlink()
    study = read_study(whole)
    save_study(study, tmp_path/'kept.npz')
    back = load_study(tmp_path/'kept.npz')
    assert back.notes[:len(study.notes)] == study.notes and not back.has_locked
    assert any('that all arms share' in n for n in back.notes)
    assert any('locked films are left out' in n for n in back.notes)


def test_fewer_labels_are_kept_with_their_own_couplings(study, tmp_path):
    few = study.frequent(30)
    save_study(few, tmp_path/'few.npz')
    back = load_study(tmp_path/'few.npz')
    assert back.labels == few.labels
    for k, c in back.cells.items():
        if c['couplings'] is None: continue
        assert np.allclose(c['couplings'], study.cells[k]['couplings'].loc[few.labels, few.labels], atol=1e-6)


def test_a_damaged_kept_study_is_refused_in_one_line(study, tmp_path):
    save_study(study, tmp_path/'kept.npz')
    with np.load(tmp_path/'kept.npz') as f: parts = dict(f)
    for change in (dict(people=None), dict(rows=parts['more:rows'][:-3]), dict(people='sex,age\nF,30\n')):
        broken = {k: v for k, v in parts.items() if k[5:] not in change}
        broken |= {f'more:{k}': v for k, v in change.items() if v is not None}
        np.savez_compressed(tmp_path/'broken.npz', **broken)
        with pytest.raises(DataError, match='damaged'): load_study(tmp_path/'broken.npz')
    whole = (tmp_path/'kept.npz').read_bytes()
    directory = whole.index(b'PK\x01\x02')
    for i in (*range(0, len(whole), len(whole)//40), *range(directory, directory + 46), *range(len(whole) - 22, len(whole))):
        for mask in (1, 16, 255):
            (tmp_path/'flipped.npz').write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1:])
            try: load_study(tmp_path/'flipped.npz')
            except DataError as e: assert '\n' not in str(e) and not str(e).endswith(': ')
