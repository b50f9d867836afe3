"A study on other films: nothing half-written, one line for what is wrong, and figures that other ways of computing give too."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cxrlg.core import DataError
from cxrlg.eval import auc_interval
from cxrlg.model import CXRNet, predict_logits, save_model
from cxrlg.phantom import make_phantom
from cxrlg.predict import Predictor
from cxrlg.splits import make_folds
from cxrlg.train import oof_frame
from cxrlg.validate import _other_people as other_people
from cxrlg.validate import match_findings, shared_targets, twin_films, validate
from small_studies import one_thread

CALLS = {'Edema': 'Edema', 'Cardiomegaly': 'Heart', 'Pleural Effusion': 'Effusion', 'Support Devices': 'Tubes', 'Fracture': 'Fracture'}


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A study of random models on a small phantom"
    path = tmp_path_factory.mktemp('runs')/'home'
    table, pixels, _ = make_phantom(n_patients=60, size=32, seed=42)
    labels, folds = table.attrs['labels'], make_folds(table, 2)
    for k in range(2):
        place = path/f'none/seed42/fold{k}'
        torch.manual_seed(k)
        model = CXRNet('test_resnet', labels).eval()
        save_model(model, place, size=32)
        rows = np.flatnonzero(folds == k)
        oof_frame(table, rows, k, predict_logits(model, pixels, rows), labels).to_parquet(place/'oof.parquet', index=False)
        config = dict(data='phantom', data_args=dict(n_patients=60), size=32, n_splits=2, fold=k, seed=42, arm='none')
        config |= dict(hashes={}, versions={})
        (place/'config.json').write_text(json.dumps(config))
        (place/'history.csv').write_text('epoch\n0\n')
        (place/'done.json').write_text('{}')
    pd.DataFrame(dict(image=table.image, patient=table.patient, fold=folds)).to_csv(path/'folds.csv', index=False)
    return path


def write_away(folder, first=0, prefix='B'):
    "Sixty films of another phantom under other names; the first ones are the study's own"
    table, pixels, _ = make_phantom(n_patients=60, size=32, seed=9)
    own = make_phantom(n_patients=60, size=32, seed=42)[1]
    pixels = np.concatenate([own[:first], pixels[first:]])
    table = table.assign(film=[f'{i}.png' for i in range(len(table))], patient=prefix + table.patient)
    folder.mkdir()
    for name, film in zip(table.film, pixels): Image.fromarray(film).save(folder/name)
    table[['film', 'patient', *CALLS]].rename(columns=CALLS).to_csv(folder/'labels.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def away(tmp_path_factory): return write_away(tmp_path_factory.mktemp('there')/'away', first=3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('CXRLG_CACHE', str(tmp_path/'cache'))


NAMES = {'Heart': 'Cardiomegaly', 'Tubes': 'Support Devices', 'Fracture': None}


def judge(study, away, out, names=NAMES, **more):
    given = dict(options=dict(image='film'), n_boot=30, corrections=(), verbose=False) | more
    return validate(study, 'csv', away, names, out, **given)


def test_what_is_written_and_that_it_is_right(study, away, tmp_path):
    report = judge(study, away, tmp_path/'out', corrections=('scale',))
    tables = {p.stem: pd.read_csv(p) for p in (tmp_path/'out').glob('*.csv')}
    assert set(tables) == {'findings', 'auc', 'calibration', 'points', 'couplings', 'twins', 'predictions'}
    auc = tables['auc'].set_index('label')
    assert list(auc.index) == ['Cardiomegaly', 'Edema', 'Pleural Effusion', 'Support Devices', 'macro']
    y = pd.read_csv(away/'labels.csv').rename(columns={v: k for k, v in CALLS.items()})[list(auc.index[:-1])]
    p = Predictor(study, raw=True, verbose=False)([away/f'{i}.png' for i in range(len(y))])[list(y)]
    assert np.abs(tables['predictions'][list(y)].to_numpy() - p.to_numpy()).max() < 2e-5
    patients = pd.read_csv(away/'labels.csv').patient
    same = auc_interval(y, p.to_numpy(float), patients, n_boot=30, seed=[42, 1])
    assert auc.ensemble.to_numpy() == pytest.approx(same.auc.to_numpy(), abs=1e-4)
    assert auc.ensemble_low.to_numpy() == pytest.approx(same.low.to_numpy(), abs=1e-4)
    assert auc.difference.to_numpy() == pytest.approx((auc.there - auc.out_of_fold).to_numpy(), abs=1e-5)
    assert tables['twins'].same.sum() == 3 and set(tables['twins'].there[:3]) == {'0.png', '1.png', '2.png'}
    notes = tables['findings'].set_index('there').note.fillna('')
    assert notes['Fracture'] == 'the mapping leaves it out' and tables['findings'].note.eq('not in the other set').sum() == 10
    html = report.read_text()
    assert 'Phantom data' in html and '3 with identical pixels' in html and 'Films in both sets' in html and '{{' not in html


def test_the_same_call_gives_the_same_bytes(study, away, tmp_path):
    found = []
    for out in ('a/x', 'b/x'):
        judge(study, away, tmp_path/out)
        found.append({p.name: p.read_bytes() for p in (tmp_path/out).iterdir()})
    assert found[0] == found[1]


@pytest.mark.parametrize('more, says', [
    (dict(names={'Hart': 'Cardiomegaly'}), "no finding in the other set 'Hart'; did you mean 'Heart'"),
    (dict(names={'Heart': 'Cardio'}), "no finding of the study 'Cardio'"),
    (dict(names=dict.fromkeys(CALLS.values())), 'no finding can be judged in both sets'),
    (dict(arm='prox'), "has no arm 'prox'"),
    (dict(share=0), 'share=0: give a share'),
    (dict(share=.001), 'leaves nobody to fit on'),
    (dict(options=dict(image='nofilm')), "no column 'nofilm'"),
    (dict(corrections=('copulings',)), "no correction 'copulings'"),
    (dict(options=dict(image='film', labels=['Heart', 'Nothing'])), "no column 'Nothing'"),
])
def test_bad_input_is_one_line_and_nothing_is_written(study, away, tmp_path, more, says):
    with pytest.raises(DataError, match=says) as e: judge(study, away, tmp_path/'out', **more)
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists() and not list(tmp_path.glob('.out*'))


def test_a_mapping_that_is_none(study, away, tmp_path):
    (tmp_path/'map.yaml').write_text('- Heart\n')
    with pytest.raises(DataError, match='is no mapping of findings'): judge(study, away, tmp_path/'out', names=tmp_path/'map.yaml')


def test_labels_of_one_class_and_films_twice_are_refused(study, away, tmp_path):
    bad = shutil.copytree(away, tmp_path/'bad')
    listed = pd.read_csv(away/'labels.csv')
    listed.assign(**{c: 0 for c in CALLS.values()}).to_csv(bad/'labels.csv', index=False)
    with pytest.raises(DataError, match='no finding can be judged in both sets .*no positive'): judge(study, bad, tmp_path/'out')
    pd.concat([listed, listed[:2]]).to_csv(bad/'labels.csv', index=False)
    with pytest.raises(DataError, match='0.png'): judge(study, bad, tmp_path/'out')
    listed.to_csv(bad/'labels.csv', index=False)
    (bad/'5.png').write_bytes(b'no film')
    with pytest.raises(DataError, match='5.png'): judge(study, bad, tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_patients_of_the_study_are_left_out_or_other_people_as_the_caller_says(study, tmp_path):
    there = write_away(tmp_path/'away', prefix='')
    with pytest.raises(DataError, match='60 ids of patients are in the study too.*drop.*keep'): judge(study, there, tmp_path/'out')
    with pytest.raises(DataError, match='no other patient is there'): judge(study, there, tmp_path/'out', shared_ids='drop')
    judge(study, there, tmp_path/'out', shared_ids='keep')
    kept = pd.read_csv(tmp_path/'out'/'predictions.csv')
    assert kept.patient.str.endswith(' (there)').all()
    listed = pd.read_csv(there/'labels.csv')
    listed['patient'] = np.where(listed.index < 40, listed.patient, 'Z' + listed.patient)
    listed.to_csv(there/'labels.csv', index=False)
    judge(study, there, tmp_path/'dropped', shared_ids='drop')
    assert len(pd.read_csv(tmp_path/'dropped'/'predictions.csv')) == len(listed) - 40


def test_an_earlier_validation_is_replaced_only_when_asked(study, away, tmp_path):
    judge(study, away, tmp_path/'out')
    with pytest.raises(DataError, match='holds an evaluation already'): judge(study, away, tmp_path/'out')
    judge(study, away, tmp_path/'out', overwrite=True)


def test_patients_may_be_judged_in_place_of_films(study, away, tmp_path):
    judge(study, away, tmp_path/'out', unit='patient')
    found, listed = pd.read_csv(tmp_path/'out'/'predictions.csv'), pd.read_csv(away/'labels.csv')
    assert found.image.tolist() == listed.patient.unique().tolist() and found.n_films.sum() == len(listed)
    assert 'unit patient' in (tmp_path/'out'/'report.html').read_text()
    auc = pd.read_csv(tmp_path/'out'/'auc.csv').set_index('label')
    assert auc.n_pos['Edema'] == listed.groupby('patient').Edema.max().sum()
    with pytest.raises(DataError, match='add a column study'): judge(study, away, tmp_path/'no', unit='study')


def test_a_study_whose_films_are_gone_is_validated_and_says_so(study, away, tmp_path):
    moved = shutil.copytree(study, tmp_path/'moved')
    for path in moved.glob('none/*/*/config.json'):
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(data='nih', data_args={}, data_dir=str(tmp_path/'gone'))))
    html = judge(moved, away, tmp_path/'out').read_text()
    assert 'were not looked for' in html and 'No such film was found' in html


def test_findings_of_two_names_and_synonyms():
    found = match_findings(['Pleural Effusion', 'Effusion'], ['effusion', 'Pleural effusion'])
    assert found == {}
    assert match_findings(['Infiltration', 'Mass'], ['Infiltrate', 'mass']) == dict(Infiltration=['Infiltrate'], Mass=['mass'])
    y = shared_targets(pd.DataFrame(dict(a=[1, 0, np.nan, np.nan], b=[np.nan, 0, 0, 1])), dict(A=['a', 'b']))
    assert y.A.fillna(-1).tolist() == [1, 0, -1, 1]


def test_twins_among_many_and_of_blank_films():
    films = make_phantom(30, size=64, seed=1)[1]
    films = np.concatenate([films, np.zeros((2, 64, 64), 'uint8')])
    noisy = np.clip(films[4] + np.random.default_rng(0).normal(0, 4, films[4].shape), 0, 255).astype('uint8')
    found = twin_films(films, np.stack([noisy, films[-1], films[9][::-1]]))
    assert found.there.tolist() == [1, 0] and found.here[1] == 4 and found.same.tolist() == [True, False]


def test_what_is_not_judged_is_named_at_once(study, away, tmp_path, capsys):
    html = judge(study, away, tmp_path/'out', verbose=True).read_text()
    line = next(l for l in capsys.readouterr().out.splitlines() if l.startswith('not judged: '))
    lacking, mapped = line.removeprefix('not judged: ').split('; ')
    assert lacking.endswith('(not in the other set)') and 'Atelectasis' in lacking and line in html
    assert mapped == 'Fracture (the mapping leaves it out)'


def test_a_patient_of_the_study_in_another_spelling_is_its_patient():
    there = pd.DataFrame(dict(patient=['P00', 'P01', 'q', '7.0', '007']))
    study = pd.Series(['p00', 'p01', '7'])
    says = '4 ids of patients are in the study too, 4 of them in another spelling'
    with pytest.raises(DataError, match=says): other_people(there, study, '')
    assert other_people(there, study, 'drop')[0].patient.tolist() == ['q']
    assert other_people(there, study, 'keep')[0].patient.tolist() == ['P00 (there)', 'P01 (there)', 'q', '7.0 (there)', '007 (there)']


def test_a_correction_that_is_none_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match="no correction 'zz'"):
        validate(tmp_path/'no', 'csv', tmp_path, out=tmp_path/'out', corrections=('zz',))
