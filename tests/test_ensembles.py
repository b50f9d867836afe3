"A study travels: the same numbers from a folder that was moved, and one line for a folder that is not whole."
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from cxrlg.core import DataError
from cxrlg.ensembles import open_ensemble
from cxrlg.export import export_folder, main, model_card
from cxrlg.localise import localise
from cxrlg.predict import main as predict
from small_studies import LABELS, copy, load, names_in, numbers, one_line, one_thread, pngs, predictor, study, write_fold

SCALE = {'Edema': dict(temperature=.3, bias=-1.), 'Mass': dict(temperature=2., bias=.5), 'Pneumonia': dict(temperature=1., bias=1e-17)}
POINTS = [dict(label=l, rule='Youden', threshold=.1 + .2*i, sensitivity=.5) for i, l in enumerate(LABELS)]


@pytest.fixture
def evaluated(copy):
    "A study with a scale and operating points"
    (copy/'calibration.json').write_text(json.dumps(dict(none=SCALE, prox=SCALE)))
    arms = [dict(arm='none', mean=.8, seeds=1, folds=2), dict(arm='prox', mean=.7, seeds=1, folds=2)]
    (copy/'results.json').write_text(json.dumps(dict(arms=arms, points=POINTS)))
    return copy


@pytest.fixture(scope='module')
def exported(study, tmp_path_factory):
    "A folder of the study; not to be changed"
    return export_folder(load(study), tmp_path_factory.mktemp('hub')/'model')


@pytest.mark.parametrize('arm, raw', [('none', False), ('prox', False), ('none', True)])
def test_a_moved_folder_gives_the_same_bits(evaluated, tmp_path, pngs, arm, raw):
    ours = load(evaluated, arm=arm, raw=raw)
    folder = shutil.move(export_folder(ours, tmp_path/'a'/'model'), tmp_path/'elsewhere')
    expected, points, kind = ours(pngs), ours.thresholds, ours.kind
    shutil.rmtree(evaluated)
    theirs = load(folder)
    pd.testing.assert_frame_equal(theirs(pngs), expected, check_exact=True)
    pd.testing.assert_frame_equal(theirs.thresholds, points, check_exact=True)
    assert (theirs.arm, theirs.labels, theirs.size, theirs.mode) == (arm, LABELS, 32, 'squash')
    assert len(points) == (3 if arm == 'none' else 0) and ('calibrated' in theirs.kind) == ('calibrated' in kind) == (not raw)
    assert np.array_equal(theirs.explain(pngs[0]), ours.explain(pngs[0]))


def test_thresholds_go_through_the_scale(evaluated):
    raw, scaled = load(evaluated, raw=True).thresholds.threshold, load(evaluated).thresholds.threshold
    np.testing.assert_allclose(raw, [.1, .3, .5])
    z = np.log(raw/(1 - raw))
    np.testing.assert_allclose(scaled, [1/(1 + np.exp(-(v/s['temperature'] + s['bias']))) for v, s in zip(z, SCALE.values())])


def test_the_command_reads_the_folder(study, exported, pngs, tmp_path, capsys):
    for place, out in ((study, 'a.csv'), (exported, 'b.csv')): predict(str(place), pngs, out=str(tmp_path/out))
    assert (tmp_path/'a.csv').read_bytes() == (tmp_path/'b.csv').read_bytes()
    assert 'arm none: 2 models, 3 findings, 32 px' in capsys.readouterr().out


def test_seeds_and_folds_of_a_folder_are_chosen(copy, tmp_path, pngs):
    write_fold(copy/'none/seed7/fold0', seed=9)
    folder = export_folder(load(copy), tmp_path/'model')
    for asked in (dict(seeds=7), dict(folds=1), dict(seeds=42, folds=[0, 1])):
        assert np.array_equal(numbers(load(folder, **asked)(pngs)), numbers(load(copy, **asked)(pngs)))
    assert np.array_equal(numbers(load(folder).only(0)(pngs)), numbers(load(copy).only(0)(pngs)))
    with pytest.raises(DataError, match='has no seed 8: choose among 7, 42'): load(folder, seeds=8)
    with pytest.raises(DataError, match="has no arm 'prox': it was exported with arm none"): load(folder, arm='prox')
    assert 'none/seed7/fold1 is missing' in load(folder).notes[0]


def test_a_folder_of_a_folder_is_the_same(exported, tmp_path):
    "Written again from what was read, the weights have the same bytes"
    (tmp_path/'again').mkdir()
    open_ensemble(exported).write(tmp_path/'again')
    for name in ('model.safetensors', 'config.json'): assert (tmp_path/'again'/name).read_bytes() == (exported/name).read_bytes()


# ---- what a hub reads

def test_the_card_has_a_header_and_no_path_is_in_the_folder(copy, tmp_path):
    hidden = dict(mode='squash', labels_file=str(tmp_path/'secret'/'labels.csv'), more=['C:\\Users\\me\\a.csv'])
    for k in range(2): write_fold(copy/f'none/seed42/fold{k}', seed=k, data_args=hidden, weights='~/w.pth', data_dir=str(tmp_path))
    folder = export_folder(load(copy), tmp_path/'model')
    assert names_in(folder) == ['README.md', 'config.json', 'model.safetensors']
    texts = [(folder/name).read_text() for name in ('README.md', 'config.json')]
    assert not any(part in t for t in texts for part in (str(tmp_path), 'secret', 'Users', '~/'))
    assert 'labels.csv' in texts[0] and 'cxrlg_predict FOLDER' in texts[0]
    header = yaml.safe_load(texts[0].split('---\n')[1])
    assert header['library_name'] == 'cxrlg' and header['pipeline_tag'] == 'image-classification' and 'chest-x-ray' in header['tags']
    said = json.loads(texts[1])
    assert said['labels'] == LABELS and list(said['models']) == ['seed42.fold0', 'seed42.fold1'] and said['calibration'] is None


def test_hostile_names_stay_out_of_the_header(tmp_path):
    write_fold(tmp_path/'x\n---\nlicense: mit'/'none/seed1/fold0', labels=['---\nlicense: mit', 'b'])
    folder = export_folder(load(tmp_path/'x\n---\nlicense: mit'), tmp_path/'model')
    header = next(yaml.safe_load_all((folder/'README.md').read_text()))
    assert 'license' not in header
    assert load(folder).labels == ['---\nlicense: mit', 'b']


# ---- what is not whole

def change(path, **new): path.write_text(json.dumps(json.loads(path.read_text()) | new))


def flip_last_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def other_weights(folder):
    "Weights of another network, with their own sha256"
    from safetensors.torch import save_file

    from cxrlg.ensembles import file_sha256
    save_file({'seed42.fold0.x': torch.zeros(1)}, folder/'model.safetensors')
    change(folder/'config.json', sha256=file_sha256(folder/'model.safetensors'))


BROKEN = {
    'no weights': (lambda f: (f/'model.safetensors').unlink(), 'holds no model.safetensors'),
    'no description': (lambda f: (f/'config.json').unlink(), 'config.json cannot be read'),
    'weights cut': (lambda f: os.truncate(f/'model.safetensors', 5000), 'is not the file that was exported'),
    'a bit': (lambda f: flip_last_bit(f/'model.safetensors'), 'is not the file that was exported'),
    'pointer': (lambda f: (f/'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid'), 'git lfs pull'),
    'other weights': (other_weights, 'does not fit its description'),
    'description cut': (lambda f: os.truncate(f/'config.json', 300), 'config.json cannot be read'),
    'description empty': (lambda f: (f/'config.json').write_text('{}'), 'is not what cxrlg_export writes'),
    'description a list': (lambda f: (f/'config.json').write_text('[]'), 'is not what cxrlg_export writes'),
    'another library': (lambda f: change(f/'config.json', library_name='timm'), 'is not what cxrlg_export writes'),
    'later format': (lambda f: change(f/'config.json', format=2), 'has format 2'),
    'no models': (lambda f: change(f/'config.json', models=None), 'is not whole'),
    'models without a seed': (lambda f: change(f/'config.json', models={'a': {}}), 'is not whole'),
    'no arch': (lambda f: change(f/'config.json', models={'seed42.fold0': dict(seed=42, fold=0)}), 'does not fit its description'),
    'a scale of others': (lambda f: change(f/'config.json', calibration=dict(Edema=SCALE['Edema'])), 'lacks a temperature or bias'),
    'other findings': (lambda f: change(f/'config.json', labels=['a', 'b']), 'does not fit its description'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(exported, tmp_path, pngs, name, capsys):
    spoil, say = BROKEN[name]
    folder = shutil.copytree(exported, tmp_path/'copy')
    spoil(folder)
    with pytest.raises(DataError, match=say) as e: load(folder)
    assert one_line(e)
    with pytest.raises(SystemExit) as e: predict(str(folder), pngs[:1], out=str(tmp_path/'p.csv'))
    assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1 and names_in(tmp_path) == ['copy']


def test_the_folder_of_one_fold_is_named(study):
    with pytest.raises(DataError, match='is not what cxrlg_export writes: give the folder of a study'): load(study/'none/seed42/fold0')


def test_a_folder_appears_whole_or_not_at_all(study, predictor, tmp_path, monkeypatch, capsys):
    (tmp_path/'taken').mkdir()
    (tmp_path/'taken'/'a.txt').write_text('mine')
    for out in ('taken', 'taken/a.txt'):
        with pytest.raises(DataError, match='is there already'): export_folder(predictor, tmp_path/out)
    with pytest.raises(SystemExit): main(str(study), str(tmp_path/'new'), no_flip=True)
    assert '--no_flip belongs to a file' in capsys.readouterr().err
    monkeypatch.setattr('cxrlg.export.model_card', lambda *args, **kwargs: 1/0)
    with pytest.raises(ZeroDivisionError): export_folder(predictor, tmp_path/'new')
    assert names_in(tmp_path) == ['taken'] and names_in(tmp_path/'taken') == ['a.txt']


def test_what_only_a_study_has_is_said(exported, tmp_path):
    predictor = load(exported)
    with pytest.raises(DataError, match='whose card is its README.md'): model_card(predictor)
    with pytest.raises(DataError, match='is an exported folder'): export_folder(predictor, tmp_path/'new')
    with pytest.raises(DataError, match='folds.csv is not there'):
        table = pd.DataFrame(dict(image=['a.png'], patient=['1']))
        boxes = pd.DataFrame(dict(image=['a.png'], finding=['Mass'], x=.1, y=.1, w=.5, h=.5))
        localise(predictor, table, np.zeros((1, 32, 32), np.uint8), boxes)
    assert names_in(tmp_path) == []
