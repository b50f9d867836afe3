"Prediction of new films: the numbers of the training, whatever stands beside them, and clear refusals."
import copy as copy_module
import json
import os
import resource
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit

import cxrlg.predict as room
from cxrlg.core import DataError, film_key, for_spreadsheets, printable
from cxrlg.films import read_film
from cxrlg.model import CXRNet, load_model, predict_logits, save_model
from cxrlg.phantom import make_phantom
from cxrlg.predict import Predictor, find_films, main
from cxrlg.train import train_fold
from small_studies import LABELS, copy, expected, load, names_in, numbers, one_line, one_thread, pngs, predictor, study, write_fold

TINY = dict(study='t', data_args={'n_patients': 40}, size=32, n_splits=3, arch='test_resnet', bs=8, epochs=1, amp='no', threads=1)


# ---- the same numbers as in training

@pytest.mark.parametrize('arm', ['none', 'prox'])
def test_a_fold_gives_its_own_out_of_fold_logits(tmp_path, arm):
    result = train_fold(TINY | dict(out_dir=str(tmp_path), arm=arm), bar=False)
    oof = pd.read_parquet(result.path/'oof.parquet')
    labels = load_model(result.path).labels
    table, pixels, _ = make_phantom(n_patients=40, seed=42, size=32)
    assert table.image[oof.row].tolist() == oof.image.tolist()
    for i in oof.row: Image.fromarray(pixels[i]).save(tmp_path/table.image[i])
    files = [tmp_path/f for f in oof.image]
    logits = predict_logits(load_model(result.path), np.stack([read_film(f, 32) for f in files]), bs=7)
    for k in ('z', 'r', 'zf', 'rf'): np.testing.assert_allclose(logits[k], oof[[f'{k}:{l}' for l in labels]], atol=1e-5, rtol=0)
    r, rf = (oof[[f'{k}:{l}' for l in labels]].to_numpy('float64') for k in ('r', 'rf'))
    predictor = load(tmp_path/'t')
    assert (
        predictor.arm == arm
        and [n.split(' ')[0] for n in predictor.notes[:2]] == [f'{arm}/seed42/fold1', f'{arm}/seed42/fold2']
        and 'phantom' in predictor.notes[2]
    )
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(predictor(files)[labels], (sigmoid(r) + sigmoid(rf)) / 2, atol=1e-5)
    np.testing.assert_allclose(predictor(files, flip=False)[labels], sigmoid(r), atol=1e-5)


def test_ensemble_is_the_mean_over_folds_and_seeds(copy, pngs):
    write_fold(copy/'none/seed7/fold0', seed=9)
    x = torch.from_numpy(np.stack([read_film(f, 32) for f in pngs]))[:, None] / 255
    models = [load_model(f) for f in sorted(copy.glob('none/seed*/fold*'))]
    with torch.inference_mode(): expected = torch.stack([m(o).sigmoid() for m in models for o in (x, x.flip(-1))]).mean(0)
    predictor = load(copy)
    assert len(predictor.models) == 3 and predictor.notes == ['none/seed7/fold1 is missing: the ensemble goes without it']
    np.testing.assert_allclose(numbers(predictor(pngs)), expected, atol=1e-6)
    assert np.ptp(expected.numpy(), axis=0).min() > .01


def test_the_graph_comes_before_the_sigmoid(study, pngs, expected):
    plain = expected
    x = torch.from_numpy(np.stack([read_film(f, 32) for f in pngs]))[:, None] / 255
    models = [load_model(study/f'prox/seed42/fold{k}') for k in range(2)]
    with torch.inference_mode(): expected = torch.stack([m.graph(m.logits(o)).sigmoid() for m in models for o in (x, x.flip(-1))]).mean(0)
    got = numbers(load(study, arm='prox')(pngs))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got - plain).max() > .01


@pytest.mark.parametrize('bs', [1, 2, 5, 1000])
def test_the_batch_size_changes_nothing(predictor, pngs, expected, bs):
    np.testing.assert_allclose(numbers(predictor(pngs, bs=bs)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('most, batches', [(3, [3, 3, 3, 3, 1, 1]), (1, [1]*14)])
def test_large_films_go_in_small_batches(predictor, pngs, monkeypatch, most, batches):
    seen, real = [], room._probs
    def probs(model, pixels, flip):
        seen.append(len(pixels))
        return real(model, pixels, flip)
    monkeypatch.setattr('cxrlg.maps._BATCH_PIXELS', most*32*32)
    monkeypatch.setattr(room, '_probs', probs)
    predictor(pngs[:7], bs=64)
    assert seen == batches


def test_order_and_duplicates_are_kept(predictor, pngs, expected):
    order = [3, 0, 0, 5, 3]
    some = predictor([pngs[i] for i in order], bs=2)
    assert some.file.tolist() == [pngs[i] for i in order] and list(some) == ['file', *LABELS, 'flag', 'error']
    np.testing.assert_allclose(numbers(some), expected[order], atol=1e-5)
    assert (some[LABELS].dtypes == np.float32).all()


def test_one_film_none_and_arrays(predictor, pngs):
    one, a = predictor(pngs[0]), np.asarray(Image.open(pngs[0]))
    assert len(one) == 1 and len(predictor([])) == 0 and list(predictor([])) == list(one)
    for films in (a, [a], a[None]): np.testing.assert_allclose(numbers(predictor(films)), numbers(one), atol=1e-6)
    assert predictor(a).file.tolist() == ['array 0']
    mixed = predictor([a.astype(float), pngs[0], np.zeros((0, 5), np.uint8), np.stack([a]*3, -1)])
    assert mixed.error.str.contains('give uint8').tolist() == [True, False, True, True] and mixed[LABELS].isna().all(
        axis=1
    ).tolist() == [True, False, True, True]


PICTURES = {
    'last axis of colours': (48, 40, 3),
    'of colours and alpha': (48, 40, 4),
    'of one channel': (48, 40, 1),
    'a line': (48,),
    'a number': (),
}


@pytest.mark.parametrize('name', PICTURES)
def test_an_array_of_another_shape_is_one_film_that_is_refused(predictor, name):
    t = predictor(np.zeros(PICTURES[name], np.uint8))
    assert len(t) == 1 and 'give uint8 [height, width]' in t.error[0] and t[LABELS].isna().all(axis=None)


def test_tensors_pictures_and_other_things(predictor, pngs, expected):
    image = Image.open(pngs[0])
    for film in (torch.from_numpy(np.array(image)), image, [image], np.array([pngs[0]]), os.fsencode(pngs[0])):
        np.testing.assert_allclose(numbers(predictor(film)), expected[:1], atol=1e-6)
    t = predictor([image.convert('RGB'), None, 3, np.zeros((2, 8, 8, 3), np.uint8)])
    assert len(t) == 4 and t.error.str.contains('is not a film: give').all()


def test_findings_called_like_columns(tmp_path, pngs):
    names = ['error', 'file', 'Mass']
    write_fold(tmp_path/'s/none/seed1/fold0', labels=names)
    predictor = load(tmp_path/'s')
    t = predictor([pngs[0], 'lost.png'])
    assert list(t) == ['file_', 'error', 'file', 'Mass', 'flag', 'error_'] and t[names].notna().all(axis=1).tolist() == [True, False]
    assert t.file_[1] == 'lost.png' and 'is not there' in t.error_[1] and [n for n in predictor.notes if 'error_' in n]
    assert list(predictor.submission(pngs[:2])) == ['Image_name', *names]
    with pytest.raises(DataError, match="'error' is called like a finding"): predictor.submission(pngs[:2], id='error')


def test_command_on_findings_called_like_columns(tmp_path, pngs, capsys):
    write_fold(tmp_path/'s/none/seed1/fold0', labels=['error', 'file', 'Mass'], size=64)
    with pytest.raises(SystemExit) as e:
        main(
            str(tmp_path / 's'),
            [pngs[0], *bad_files(tmp_path, pngs[0])[:1]],
            str(tmp_path / 'p.csv'),
            heatmaps=str(tmp_path / 'maps'),
        )
    assert e.value.code == 1 and '1 of 2 films could not be read' in capsys.readouterr().err
    assert len(names_in(tmp_path/'maps')) == 1 and pd.read_csv(tmp_path/'p.csv').error_.notna().tolist() == [False, True]


def test_a_part_of_the_ensemble(copy, pngs):
    for k in range(2): write_fold(copy/f'none/seed7/fold{k}', seed=5 + k)
    all_, old = load(copy), load(copy, seeds=42)
    assert (len(all_.models), len(old.models), len(load(copy, seeds=[7, 42], folds=1).models)) == (4, 2, 2)
    one = numbers(load(copy, seeds=7, folds=0)(pngs))
    np.testing.assert_allclose(
        numbers(all_(pngs)), (one + numbers(load(copy, seeds=7, folds=1)(pngs)) + 2 * numbers(old(pngs))) / 4, atol=1e-6
    )
    part = all_.only([1])
    assert list(part.folders) == [(7, 1), (42, 1)] and len(all_.models) == 4 and len(all_.folders) == 4
    np.testing.assert_allclose(numbers(part(pngs)), numbers(load(copy, folds=1)(pngs)), atol=1e-6)
    for wrong, say in (
        (dict(seeds=8), 'no seed 8: choose among 7, 42'),
        (dict(folds=[0, 2]), 'no fold 2: choose among 0, 1'),
        (dict(seeds=[]), 'no seed'),
    ):
        with pytest.raises(DataError, match=say): load(copy, **wrong)
    (copy/'none/seed7/fold1/done.json').unlink()
    assert (
        load(copy, folds=0).notes == []
        and load(copy, seeds=42).notes == []
        and load(copy, seeds=7).notes == ['none/seed7/fold1 is not finished: the ensemble goes without it']
    )


@pytest.mark.parametrize(
    'arch, n, size',
    [
        ('test_resnet', 15, 64),
        ('seresnext26d_32x4d', 31, 64),
        ('densenet121', 0, 64),
        ('test_vit', 0, 160),
        ('inception_v3', 0, 96),
    ],
)
def test_folded_batch_norms_give_the_same_numbers(arch, n, size):
    torch.manual_seed(0)
    model, x = CXRNet(arch, LABELS).eval(), torch.rand(2, 1, size, size)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 2), torch.nn.init.uniform_(
                m.weight, 0.5, 1.5
            ), torch.nn.init.normal_(m.bias, 0, 0.1)
    count = lambda m: sum(type(o) is torch.nn.BatchNorm2d for o in m.modules())
    folded = room._folded(copy_module.deepcopy(model))
    assert count(model) - count(folded) == n
    with torch.inference_mode(): torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


# ---- calibration

SCALE = {'Edema': dict(temperature=.3, bias=-1.), 'Mass': dict(temperature=2., bias=.5), 'Pneumonia': dict(temperature=1., bias=0.)}


def calibrate(study, arm='none', scale=SCALE): (study/'calibration.json').write_text(json.dumps({arm: scale}))


def test_calibration_is_applied_to_the_mean_probability(copy, pngs):
    raw = numbers(load(copy)(pngs)).astype(float)
    calibrate(copy, scale=SCALE | {'Hernia': dict(temperature=1, bias=1)})
    expected = np.stack([expit(logit(raw[:, j]) / SCALE[l]['temperature'] + SCALE[l]['bias']) for j, l in enumerate(LABELS)], 1)
    predictor = load(copy)
    np.testing.assert_allclose(numbers(predictor(pngs)), expected, atol=1e-6)
    np.testing.assert_allclose(numbers(load(copy, raw=True)(pngs)), raw, atol=1e-6)
    for bs in (1, 5): np.testing.assert_allclose(numbers(predictor(pngs, bs=bs)), expected, atol=1e-5)
    assert 'probabilities calibrated' in repr(predictor) and 'raw, as asked for' in repr(load(copy, raw=True))
    assert load(copy, arm='prox').kind == 'raw (no calibration.json of arm prox in the study)'
    assert (predictor(pngs)[LABELS].dtypes == np.float32).all()


def test_calibration_of_certain_probabilities_is_finite():
    scale = pd.DataFrame(SCALE).T
    p = room._scaled(np.array([[0, 0, 0], [1, 1, 1]], np.float32), scale)
    assert np.isfinite(p).all() and (p[1] > p[0]).all()


BAD_SCALES = {
    'cut': '{"none": {"Edema"',
    'a list': '[1]',
    'no label': json.dumps(dict(none={'Edema': SCALE['Edema']})),
    'no bias': json.dumps(dict(none=SCALE | {'Mass': dict(temperature=1)})),
    'zero': json.dumps(dict(none=SCALE | {'Mass': dict(temperature=0, bias=0)})),
    'NaN': json.dumps(dict(none=SCALE | {'Mass': dict(temperature=float('nan'), bias=0)})),
    'text': json.dumps(dict(none=SCALE | {'Mass': dict(temperature='warm', bias=0)})),
    'a number': json.dumps(dict(none=3)),
    'null': json.dumps(dict(none=SCALE | {'Mass': dict(temperature=None, bias=0)})),
}


@pytest.mark.parametrize('name', BAD_SCALES)
def test_a_calibration_that_does_not_fit_is_refused(copy, pngs, name):
    (copy/'calibration.json').write_text(BAD_SCALES[name])
    with pytest.raises(DataError, match='calibration.json') as e: load(copy)
    assert 'ask for raw probabilities' in str(e.value) and '\n' not in str(e.value)
    assert len(load(copy, raw=True)(pngs[:1])) == 1


def test_in_chans_3(tmp_path, pngs):
    write_fold(tmp_path/'none/seed1/fold0', in_chans=3)
    predictor = load(tmp_path)
    assert predictor(pngs[0]).error[0] == '' and predictor.explain(pngs[0]).shape == (3, 32, 32)


# ---- kinds of files

def dicom(path, a):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        pydicom.uid.DigitalXRayImageStorageForPresentation,
        '1.2.3',
        pydicom.uid.ExplicitVRLittleEndian,
    )
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Rows, ds.Columns = meta.MediaStorageSOPClassUID, '1.2.3', *a.shape
    (
        ds.BitsAllocated,
        ds.BitsStored,
        ds.HighBit,
        ds.SamplesPerPixel,
        ds.PhotometricInterpretation,
        ds.PixelRepresentation,
    ) = (8, 8, 7, 1, 'MONOCHROME1', 0)
    ds.PixelData = (255 - a).tobytes()
    ds.save_as(path)


def test_dicom_and_jpeg(study, pngs, tmp_path):
    a = np.asarray(Image.open(pngs[0]))
    dicom(tmp_path/'film.dcm', a)
    dicom(tmp_path/'IM0001', a)
    Image.fromarray(a).save(tmp_path/'film.jpg', quality=100, subsampling=0)
    p = numbers(load(study)([pngs[0], tmp_path/'film.dcm', tmp_path/'IM0001', tmp_path/'film.jpg']))
    np.testing.assert_allclose(p[1:3], p[[0, 0]], atol=1e-6)
    np.testing.assert_allclose(p[3], p[0], atol=.05)


def test_films_of_any_depth_shape_and_colour(study, tmp_path):
    pixels = make_phantom(n_patients=2, size=64, seed=3)[1]
    a, reference = pixels[0], None
    deep = a.astype(np.uint16) * 257
    kinds = dict(
        grey=Image.fromarray(a),
        rgb=Image.fromarray(np.stack([a] * 3, -1)),
        rgba=Image.fromarray(np.dstack([a] * 3 + [np.full_like(a, 255)])),
        deep=Image.fromarray(deep),
        bit=Image.fromarray(a > 100),
        tall=Image.fromarray(a).resize((64, 300)),
        line=Image.fromarray(a[:1]),
        dot=Image.fromarray(a[:1, :1]),
        cmyk=Image.fromarray(np.stack([a] * 3, -1)).convert('CMYK'),
    )
    for k, im in kinds.items(): im.save(tmp_path/f'{k}.{"jpg" if k == "cmyk" else "png"}')
    files = {k: str(tmp_path/f'{k}.{"jpg" if k == "cmyk" else "png"}') for k in kinds}
    t = load(study)(list(files.values()))
    assert t.error.eq('').all() and t[LABELS].notna().all(axis=None)
    p = dict(zip(files, numbers(t)))
    for k in ('rgb', 'rgba'): np.testing.assert_allclose(p[k], p['grey'], atol=1e-5)
    assert t.flag[list(files).index('dot')] == 'nearly constant film'
    for f in files.values(): assert load(study).explain(f).shape == (3, 32, 32)


def test_compressed_dicom_by_threads(study, pngs, tmp_path):
    gdcm = pytest.importorskip('gdcm')
    for i, f in enumerate(pngs[:6]):
        dicom(tmp_path/f'{i}.dcm', np.asarray(Image.open(f)))
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(tmp_path/f'{i}.dcm')), reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1)), change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(tmp_path/f'{i}.dcm')), writer.SetFile(reader.GetFile()), writer.SetImage(change.GetOutput())
        assert writer.Write()
    t = load(study)([tmp_path/f'{i % 6}.dcm' for i in range(60)], bs=16)
    np.testing.assert_allclose(numbers(t), np.tile(numbers(load(study)(pngs[:6])), (10, 1)), atol=1e-5)


def test_mode_of_the_study_is_used(tmp_path):
    write_fold(tmp_path/'s/none/seed1/fold0', data_args={'mode': 'pad'})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90), dtype=np.uint8)).save(tmp_path/'wide.png')
    predictor = load(tmp_path/'s')
    assert np.array_equal(predictor.read(tmp_path/'wide.png'), read_film(tmp_path/'wide.png', 32, 'pad'))
    assert not np.array_equal(predictor.read(tmp_path/'wide.png'), read_film(tmp_path/'wide.png', 32, 'squash'))


def bad_files(folder, good):
    "Files that are no films, one of each kind, in the order of their names"
    data = open(good, 'rb').read()
    (folder/'a_half.png').write_bytes(data[:len(data)//2])
    (folder/'b_text.png').write_text('a picture, honestly')
    (folder/'c_empty.jpg').write_bytes(b'')
    (folder/'d_head.dcm').write_bytes(b'\0'*128 + b'DICM' + b'\7'*40)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    (folder/'e_flipped.png').write_bytes(flipped)
    return sorted(str(f) for f in folder.iterdir())


def test_bad_films_are_rows_without_numbers(study, pngs, tmp_path):
    pytest.importorskip('pydicom')
    bad = [*bad_files(tmp_path, pngs[0]), str(tmp_path/'lost.png'), str(tmp_path)]
    mixed = [f for pair in zip(bad, pngs) for f in pair]
    for bs in (1, 3, 64):
        t = load(study)(mixed, bs=bs)
        assert t.file.tolist() == mixed and t.error[::2].ne('').all() and t.error[1::2].eq('').all()
        assert t[LABELS][::2].isna().all(axis=None)
        np.testing.assert_allclose(numbers(t)[1::2], numbers(load(study)(pngs[:len(bad)])), atol=1e-5)
    assert all(f in e and '\n' not in e for f, e in zip(bad, t.error[::2]))


def test_a_film_that_vanishes_is_a_row_with_an_error(study, pngs, tmp_path, monkeypatch):
    monkeypatch.setattr(room.os.path, 'exists', lambda p, real=os.path.exists: str(p).endswith('gone.png') or real(p))
    t = load(study)([pngs[0], tmp_path/'gone.png', pngs[1]])
    assert t.error.str.contains('gone.png is not there').tolist() == [False, True, False] and t[LABELS].isna().all(
        axis=1
    ).tolist() == [False, True, False]


def test_all_films_bad(study, pngs, tmp_path):
    bad = bad_files(tmp_path, pngs[0])
    t = load(study)(bad, bs=2)
    assert t.error.ne('').all() and t[LABELS].isna().all(axis=None) and t.file.tolist() == bad


def test_blank_films_are_flagged(study, pngs, tmp_path):
    for v in (0, 130, 255): Image.new('L', (40, 40), v).save(tmp_path/f'{v}.png')
    assert (
        load(study)([tmp_path / '0.png', pngs[0], tmp_path / '130.png', tmp_path / '255.png']).flag.tolist()
        == ['nearly constant film', ''] + ['nearly constant film'] * 2
    )


# ---- finding films

def test_folders_are_searched(tmp_path, pngs):
    for name in ('b.PNG', 'a/z.jpeg', 'a/B/q.JPG', 'a/x.dcm', 'a/notes.txt', '.hidden.png', 'A.png', 'name with spaces, and commas.png'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes(b'x')
    (tmp_path/'a'/'loop').symlink_to(tmp_path)
    expected = ['A.png', 'a/B/q.JPG', 'a/x.dcm', 'a/z.jpeg', 'b.PNG', 'name with spaces, and commas.png']
    assert [os.path.relpath(f, tmp_path) for f in find_films(tmp_path)] == expected
    (tmp_path/'a'/'loop').unlink()
    assert find_films([str(tmp_path/'b.PNG'), tmp_path/'a']) == [str(tmp_path/f) for f in ('b.PNG', *expected[1:4])]
    for wrong, say in (([], 'no film is named'), ([tmp_path, 'lost'], 'lost'), ([study_less(tmp_path)], 'holds no film')):
        with pytest.raises(DataError, match=say): find_films(wrong)


def study_less(folder):
    (folder/'void').mkdir()
    return folder/'void'


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, 'é.png') for form in ('NFC', 'NFD'))


def test_spellings_of_one_film(tmp_path, pngs, monkeypatch):
    assert film_key('./0000.png ') == film_key(b'0000.png') == film_key(Path('a/../0000.png')) == '0000.png'
    assert film_key(COMPOSED) == film_key(DECOMPOSED) and film_key('7.png') != film_key('007.png')
    for name in (DECOMPOSED, '0000.png'): shutil.copy(pngs[0], tmp_path/name)
    monkeypatch.chdir(tmp_path)
    assert (
        find_films(COMPOSED) == [DECOMPOSED]
        and find_films('0000.png ') == ['0000.png']
        and find_films([b'./0000.png']) == ['./0000.png']
    )
    shutil.copy(pngs[0], tmp_path/COMPOSED)
    assert find_films(COMPOSED) == [COMPOSED]
    with pytest.raises(DataError, match='there is no file'): find_films('000.png')


def test_films_without_an_ending_are_known_by_their_content(tmp_path, pngs):
    data = Path(pngs[0]).read_bytes()
    for name in ('IM000001', '1.2.840.113619.7', 'a.ima', 'README', 'notes.txt', 'DICOMDIR', '.hidden', 'film.png '):
        (tmp_path / name).write_bytes(data)
    (tmp_path/'README').write_text('no film')
    (tmp_path/'dicom').write_bytes(b'\0'*128 + b'DICM')
    assert [os.path.basename(f) for f in find_films(tmp_path)] == ['1.2.840.113619.7', 'IM000001', 'a.ima', 'dicom', 'film.png ']


def test_folders_that_link_to_each_other(tmp_path, pngs):
    for k in 'ab':
        (tmp_path/k).mkdir()
        shutil.copy(pngs[0], tmp_path/k/f'{k}.png')
        (tmp_path/k/'other').symlink_to(tmp_path/('b' if k == 'a' else 'a'))
    assert len(find_films(tmp_path)) == 2 and len(find_films(tmp_path/'a')) == 2


# ---- studies that cannot be used

def test_the_arm(study, tmp_path):
    assert load(study).arm == 'none' and load(study, arm='prox').arm == 'prox'
    for arm in ('l1', 'prox'): write_fold(tmp_path/f'{arm}/seed1/fold0', graph=True)
    with pytest.raises(DataError, match='choose one of l1, prox'): load(tmp_path)
    shutil.rmtree(tmp_path/'l1')
    assert load(tmp_path).arm == 'prox'
    write_fold(tmp_path/'none/seed1/fold0', done=False)
    with pytest.raises(DataError, match='no finished fold of arm none'): load(tmp_path)


def test_the_summary_names_arm_and_missing_folds(copy, capsys):
    (copy/'none/seed42/fold1/done.json').unlink()
    Predictor(copy)
    assert capsys.readouterr().out.splitlines() == [
        'copy, arm none: 1 models, 3 findings, 32 px (squash); probabilities raw (no calibration.json of arm none in the study)',
        'none/seed42/fold1 is not finished: the ensemble goes without it',
    ]


BROKEN = {
    'labels': (lambda p: write_fold(p, labels=LABELS[::-1]), 'has labels'),
    'size': (lambda p: write_fold(p, size=48), 'has size 48'),
    'mode': (lambda p: write_fold(p, data_args={'mode': 'pad'}), "has mode 'pad'"),
    'two sizes': (
        lambda p: (p / 'config.json').write_text(json.dumps(dict(size=64, data='nih', n_splits=2))),
        '64 in config.json and 32 in model.json',
    ),
    'no config': (lambda p: (p / 'config.json').unlink(), 'config.json or model.json cannot be read'),
    'config cut': (lambda p: (p / 'config.json').write_text('{"size": 3'), 'config.json or model.json cannot be read'),
    'config empty': (lambda p: (p / 'config.json').write_text('{}'), 'lacks size'),
    'no weights': (lambda p: (p / 'model.safetensors').unlink(), 'holds no model.safetensors'),
    'weights cut': (lambda p: os.truncate(p / 'model.safetensors', 5000), 'damaged model'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_folds_that_do_not_belong_together(copy, name):
    spoil, say = BROKEN[name]
    spoil(copy/'none/seed42/fold1')
    with pytest.raises(DataError, match=say) as e: load(copy)
    assert 'fold1' in str(e.value) and '\n' not in str(e.value)


def test_diverged_weights_give_no_numbers(copy, pngs):
    model = load_model(copy/'none/seed42/fold1')
    with torch.no_grad(): model.backbone.get_classifier().bias.fill_(float('nan'))
    save_model(model, copy/'none/seed42/fold1', size=32)
    with pytest.raises(DataError, match='not in'): load(copy)(pngs)


# ---- class-activation maps

def test_explain_averages_models_and_mirror_images(tmp_path, pngs):
    for k in range(2): write_fold(tmp_path/f'none/seed42/fold{k}', seed=k, size=96)
    predictor = load(tmp_path)
    x = torch.tensor(read_film(pngs[0], 96))[None, None] / 255
    maps = predictor.explain(pngs[0])
    assert maps.shape == (3, 96, 96) and maps.dtype == np.float32 and np.ptp(maps, axis=(1, 2)).min() > .01
    with torch.inference_mode(): z = np.mean([m.logits(o).numpy()[0] for m in predictor.models for o in (x, x.flip(-1))], 0)
    bias = np.mean([m.backbone.get_classifier().bias.detach().numpy() for m in predictor.models], 0)
    np.testing.assert_allclose(maps.mean((1, 2)) + bias, z, atol=1e-4)
    assert np.array_equal(predictor.explain(pngs[0], 'Mass'), maps[1])
    mirrored = predictor.explain(np.ascontiguousarray(read_film(pngs[0], 96)[:, ::-1]))
    np.testing.assert_allclose(mirrored[:, :, ::-1], maps, atol=1e-4)
    with pytest.raises(DataError, match="did you mean 'Edema'"): predictor.explain(pngs[0], 'Oedema')
    with pytest.raises(DataError, match='is not there'): predictor.explain('lost.png')


def test_maps_of_many_films(predictor, pngs, monkeypatch):
    pixels = np.stack([predictor.read(f) for f in pngs])
    maps = predictor.maps(pixels)
    assert maps.shape[:2] == (len(pngs), 3) and maps.dtype == np.float32
    np.testing.assert_allclose(predictor.maps(pixels, bs=3), maps, atol=1e-5)
    np.testing.assert_allclose(predictor.explain(pngs[3]).mean((1, 2)), maps[3].mean((1, 2)), atol=.05)
    monkeypatch.setattr('cxrlg.maps._BATCH_PIXELS', 1)
    np.testing.assert_allclose(predictor.maps(pixels[:2]), maps[:2], atol=1e-5)


# ---- the command

@pytest.fixture(scope='module')
def command(tmp_path_factory):
    "Runs the command in a process of its own, as the installed script does"
    script = tmp_path_factory.mktemp('bin')/'cxrlg_predict'
    script.write_text("import sys\nfrom cxrlg.predict import main\nif __name__ == '__main__': sys.exit(main())\n")
    def run(*args, cwd=None):
        return subprocess.run(
            [sys.executable, script, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=os.environ | {'OMP_NUM_THREADS': '1'},
        )

    return run


def test_command_predicts_a_folder(command, study, pngs, tmp_path):
    folder, out = os.path.dirname(pngs[0]), tmp_path/'new'/'p.csv'
    run = command(study, '--out', out, '--bs', 5, folder, pngs[1], '--heatmaps', tmp_path/'maps')
    assert run.returncode == 0, run.stderr
    t, expected = pd.read_csv(out), load(study)([*pngs, pngs[1]])
    assert t.file.tolist() == [*pngs, pngs[1]] and list(t) == ['file', *LABELS, 'flag', 'error'] and t.error.isna().all()
    np.testing.assert_allclose(numbers(t), numbers(expected), atol=1e-5)
    assert 'arm none: 2 models' in run.stdout and str(out) in run.stdout and 'film' in run.stderr
    maps = sorted((tmp_path/'maps').iterdir())
    assert (
        len(maps) == len(t)
        and Image.open(maps[0]).size == (1000, 280)
        and maps[-1].name == f'{len(t) - 1:05d}_{os.path.basename(pngs[1])}'
    )
    assert os.listdir(out.parent) == ['p.csv']


def test_command_bad_films_make_status_1(study, pngs, tmp_path, capsys, monkeypatch):
    (tmp_path/'in').mkdir()
    monkeypatch.chdir(tmp_path)
    bad = bad_files(tmp_path/'in', pngs[0])
    with pytest.raises(SystemExit) as e: main(str(study), [pngs[0], str(tmp_path/'in'), pngs[1]], arm='prox', no_flip=True)
    err = capsys.readouterr().err
    assert e.value.code == 1 and err.splitlines()[-1].startswith('cxrlg_predict: 5 of 7 films could not be read') and bad[0] in err
    t = pd.read_csv(tmp_path/'predictions.csv')
    assert t.error.notna().tolist() == [False] + [True]*5 + [False] and t[LABELS].isna().any(axis=1).tolist() == t.error.notna().tolist()
    np.testing.assert_allclose(numbers(t)[[0, 6]], numbers(load(study, arm='prox')(pngs[:2], flip=False)), atol=1e-5)


def test_command_says_whether_it_calibrated(copy, pngs, tmp_path, capsys):
    calibrate(copy)
    main(str(copy), pngs[:2], out=str(tmp_path/'scaled.csv'))
    assert 'probabilities calibrated' in capsys.readouterr().out.splitlines()[0]
    main(str(copy), pngs[:2], out=str(tmp_path/'raw.csv'), raw=True, seeds='42')
    assert 'probabilities raw, as asked for' in capsys.readouterr().out.splitlines()[0]
    np.testing.assert_allclose(numbers(pd.read_csv(tmp_path/'scaled.csv')), numbers(load(copy)(pngs[:2])), atol=1e-5)
    np.testing.assert_allclose(numbers(pd.read_csv(tmp_path/'raw.csv')), numbers(load(copy, raw=True)(pngs[:2])), atol=1e-5)


def test_command_films_of_one_name_in_two_folders(study, pngs, tmp_path, capsys):
    for k in 'ab': (tmp_path/k).mkdir(), shutil.copy(pngs['ab'.index(k)], tmp_path/k/'film.png')
    main(str(study), [str(tmp_path/'b'), str(tmp_path/'a')], out=str(tmp_path/'p.csv'), heatmaps=str(tmp_path/'maps'))
    t = pd.read_csv(tmp_path/'p.csv')
    assert t.file.tolist() == [str(tmp_path / k / 'film.png') for k in 'ba'] and sorted(
        os.listdir(tmp_path / 'maps')
    ) == ['00000_film.png', '00001_film.png']
    np.testing.assert_allclose(numbers(t), numbers(load(study)([pngs[1], pngs[0]])), atol=1e-5)


def test_command_all_films_bad(study, pngs, tmp_path, capsys):
    (tmp_path/'in').mkdir()
    bad = bad_files(tmp_path/'in', pngs[0])
    with pytest.raises(SystemExit) as e: main(str(study), [str(tmp_path/'in')], out=str(tmp_path/'p.csv'), heatmaps=str(tmp_path/'maps'))
    assert e.value.code == 1 and '5 of 5 films could not be read' in capsys.readouterr().err
    assert pd.read_csv(tmp_path/'p.csv').file.tolist() == bad and os.listdir(tmp_path/'maps') == []


def test_command_a_film_that_vanishes_before_its_heatmap(study, pngs, tmp_path, capsys, monkeypatch):
    films = [shutil.copy(f, tmp_path/f'{i}.png') for i, f in enumerate(pngs[:3])]
    real = room._write_csv
    def write_then_remove(path, make):
        table = real(path, make)
        os.remove(films[1])
        return table
    monkeypatch.setattr(room, '_write_csv', write_then_remove)
    with pytest.raises(SystemExit) as e: main(str(study), [str(f) for f in films], out=str(tmp_path/'p.csv'), heatmaps=str(tmp_path/'maps'))
    assert e.value.code == 1 and '1 heatmaps could not be drawn' in capsys.readouterr().err.splitlines()[-1]
    assert pd.read_csv(tmp_path/'p.csv').error.isna().all() and sorted(os.listdir(tmp_path/'maps')) == ['00000_0.png', '00002_2.png']


def test_command_on_a_full_disk(study, pngs, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(SystemExit) as e: main(str(study), pngs, out=str(tmp_path/'new'/'p.csv'))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.code == 2 and 'it was not written' in capsys.readouterr().err.splitlines()[-1] and os.listdir(tmp_path/'new') == []


REFUSED = {
    'no study': (lambda s, f, t: dict(study_dir=t / 'nothing'), 'there is no study'),
    'no fold': (lambda s, f, t: dict(study_dir=t), 'holds no finished fold'),
    'no film': (lambda s, f, t: dict(films=[t]), 'holds no film'),
    'missing film': (lambda s, f, t: dict(films=[f, t / 'lost.png']), 'lost.png'),
    'no arm': (lambda s, f, t: dict(arm='l1'), 'choose one of none, prox'),
    'bs': (lambda s, f, t: dict(bs=0), 'at least one film a batch'),
    'out is a film': (lambda s, f, t: dict(out=f), 'is one of the films'),
    'out is a folder': (lambda s, f, t: dict(out=t), 'is a folder'),
    'out below a file': (lambda s, f, t: dict(out=f'{f}/p.csv'), 'it was not written'),
    'out too long a name': (lambda s, f, t: dict(out='p' * 250), 'it was not written'),
    'maps below a file': (lambda s, f, t: dict(heatmaps=f'{f}/maps'), 'it was not written'),
    'no film named': (lambda s, f, t: dict(films=[]), 'no film is named'),
    'seeds': (lambda s, f, t: dict(seeds='42,x'), '--seeds 42,x: give whole numbers'),
    'no such seed': (lambda s, f, t: dict(seeds='43'), 'has no seed 43: choose among 42'),
    'template alone': (lambda s, f, t: dict(template='sample.csv'), 'belong to --submission'),
    'one file for both': (lambda s, f, t: dict(submission='p.csv', out='./p.csv'), 'are both'),
    'submission over its template': (
        lambda s, f, t: dict(submission='s.csv', template='s.csv'),
        '--submission and --template are both s.csv',
    ),
    'id alone': (lambda s, f, t: dict(id='image'), 'belong to --submission'),
    'maps of a submission': (
        lambda s, f, t: dict(submission='s.csv', heatmaps='maps'),
        '--heatmaps belongs to a table',
    ),
    'submission is a film': (lambda s, f, t: dict(submission=f), 'is one of the films'),
    'no template': (lambda s, f, t: dict(submission='s.csv', template='lost.csv'), 'lost.csv cannot be read'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refusals_are_one_line_and_status_2(study, pngs, tmp_path, name, capsys, monkeypatch):
    spoil, say = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(**dict(study_dir=study, films=pngs[:1]) | spoil(study, pngs[0], tmp_path))
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and say in err[0]
    assert os.listdir(tmp_path) == [] and Image.open(pngs[0]).size == (48, 48)


# ---- real films

def test_real_films(study, films):
    files = sorted((films/'nih256'/'images').glob('*.jpg'))[:12]
    t = load(study)(files)
    assert (t.error == '').all() and (t.flag == '').all() and np.ptp(numbers(t), axis=0).min() > 1e-4


# ---- submissions

def sample_of(path, ids, columns=('Image_name', 'Mass', 'Edema')):
    pd.DataFrame([[i] + ['0.5']*(len(columns) - 1) for i in ids], columns=columns).to_csv(path, index=False)
    return path


@pytest.mark.parametrize('ending', [True, False])
def test_submission_has_the_form_of_the_sample(study, pngs, tmp_path, ending):
    order = [5, 0, 3]
    ids = [Path(pngs[i]).name if ending else Path(pngs[i]).stem for i in order]
    predictor = load(study)
    t = predictor.submission(pngs, sample_of(tmp_path/'s.csv', ids), bs=2)
    assert list(t) == ['Image_name', 'Mass', 'Edema'] and t.Image_name.tolist() == ids
    np.testing.assert_allclose(t[['Mass', 'Edema']], predictor(pngs)[['Mass', 'Edema']].to_numpy()[order], atol=1e-5)
    pd.DataFrame(dict(Edema=[.5], id=ids[:1], Mass=[.5])).to_csv(tmp_path/'m.csv', index=False)
    middle = predictor.submission(pngs, tmp_path/'m.csv', id='id')
    assert list(middle) == ['Edema', 'id', 'Mass'] and middle.id.tolist() == ids[:1]


def test_submission_without_a_sample(study, pngs):
    t = load(study).submission(pngs, id='image')
    assert list(t) == ['image', *LABELS] and t.image.tolist() == [os.path.basename(f) for f in pngs]
    assert list(load(study).submission(pngs[0])) == ['Image_name', *LABELS]


def test_submission_ids_stay_as_they_are(study, pngs, tmp_path):
    for name in ('007.png', '1e5.png', 'NA.png'): shutil.copy(pngs[0], tmp_path/name)
    t = load(study).submission(find_films(tmp_path), sample_of(tmp_path/'s.csv', ['1e5', '007', 'NA']))
    assert t.Image_name.tolist() == ['1e5', '007', 'NA']


ASKED = {
    'lost id': (
        lambda f, t: sample_of(t, [Path(f[0]).name, 'a.png', 'b.png']),
        '2 of the 3 ids of .* have no film: a.png, b.png',
    ),
    'strange column': (
        lambda f, t: sample_of(t, ['x'], ('Image_name', 'Oedema')),
        "asks for 'Oedema', which the study does not predict; did you mean 'Edema'",
    ),
    'id twice': (lambda f, t: sample_of(t, [Path(f[0]).name] * 2), 'more than once'),
    'no row': (lambda f, t: sample_of(t, []), 'a header and no id'),
    'empty': (lambda f, t: (t.write_text(''), t)[1], 'cannot be read as CSV'),
    'no text': (lambda f, t: (t.write_bytes(bytes(range(256))), t)[1], 'cannot be read as CSV'),
    'a folder': (lambda f, t: t.parent, 'cannot be read as CSV'),
}


@pytest.mark.parametrize('name', ASKED)
def test_samples_that_cannot_be_served(study, pngs, tmp_path, name):
    make, say = ASKED[name]
    with pytest.raises(DataError, match=say) as e: load(study).submission(pngs, make(pngs, tmp_path/'s.csv'))
    assert '\n' not in str(e.value)


def test_submission_with_two_films_of_one_id_or_a_bad_one(study, pngs, tmp_path):
    for k in 'ab': (tmp_path/k).mkdir(), shutil.copy(pngs[0], tmp_path/k/'film.png')
    both = find_films(tmp_path)
    for template in (None, sample_of(tmp_path/'s.csv', ['film'])):
        with pytest.raises(DataError, match='belong to two films or more: film'): load(study).submission(both, template)
    assert load(study).submission([both[0], pngs[1]], sample_of(tmp_path/'s.csv', ['film'])).shape == (1, 3)
    (tmp_path/'b'/'film.png').write_text('no film')
    with pytest.raises(DataError, match='1 of 2 films could not be read, and a submission needs them all'):
        load(study).submission([both[1], pngs[1]])


def test_command_writes_a_submission(study, pngs, tmp_path, capsys, monkeypatch):
    (tmp_path/'out').mkdir()
    monkeypatch.chdir(tmp_path/'out')
    sample, folder = sample_of(tmp_path/'s.csv', [Path(f).stem for f in pngs[:3]]), os.path.dirname(pngs[0])
    main(str(study), [folder], submission='sub.csv', id='Image_name', template=str(sample))
    assert 'sub.csv: 3 rows' in capsys.readouterr().out and os.listdir() == ['sub.csv']
    np.testing.assert_allclose(pd.read_csv('sub.csv')[['Mass', 'Edema']], load(study)(pngs[:3])[['Mass', 'Edema']], atol=1e-5)
    with pytest.raises(SystemExit) as e: main(str(study), pngs[:1], submission='never.csv', template=str(sample))
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and '2 of the 3 ids' in err[0] and os.listdir() == ['sub.csv']
    main(str(study), [folder], submission='all.csv', out='p.csv')
    assert len(pd.read_csv('all.csv')) == len(pd.read_csv('p.csv')) == len(pngs)


SPELT = {'plain': 'Image_name,Mass\n{a}.png,0\n{b}.png,0\n', 'BOM': '\ufeffImage_name,Mass\n{a},0\n{b},0\n',
         'blanks': 'Image_name, Mass\n{a}.png ,0\n./{b}.png,0\n', 'quotes': '"Image_name","Mass"\n"{a}","0"\n"{b}","0"\n'}


@pytest.mark.parametrize('name', SPELT)
def test_samples_however_they_are_spelt(predictor, pngs, expected, tmp_path, name):
    a, b = (Path(f).stem for f in pngs[:2])
    (tmp_path/'s.csv').write_text(SPELT[name].format(a=a, b=b), encoding='utf-8')
    t = predictor.submission(pngs, tmp_path/'s.csv')
    np.testing.assert_allclose(t.iloc[:, 1], expected[:2, 1], atol=1e-6)
    header = SPELT[name].lstrip('\ufeff').splitlines()[0].replace('"', '')
    assert ','.join(t.columns) == header


UNREADABLE = {
    'semicolons': ('Image_name;Mass\n1.png;0\n', 'is not separated by commas'),
    'tabs': ('Image_name\tMass\n1.png\t0\n', 'is not separated by commas'),
    'row numbers': (',Image_name,Mass\n0,1.png,0\n', 'column 1 has no name, .* save it without them'),
    'row numbers at the end': ('Image_name,Mass,\n1.png,0,0\n', 'column 3 has no name'),
    'a longer row': ('Image_name,Mass\n1.png,0,0\n', 'cannot be read as CSV'),
    'no id': ('Mass,Edema\n0,0\n', "'Mass' is called like a finding"),
    'one film twice': ('Image_name,Mass\n1.png,0\n./1.png ,0\n', 'more than once'),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_samples_that_are_no_tables_of_ids(predictor, pngs, tmp_path, name):
    text, say = UNREADABLE[name]
    (tmp_path/'s.csv').write_text(text)
    with pytest.raises(DataError, match=say) as e: predictor.submission(pngs, tmp_path/'s.csv')
    assert one_line(e)


def test_a_submission_has_each_film_once(predictor, pngs, tmp_path, monkeypatch):
    shutil.copy(pngs[0], tmp_path/DECOMPOSED)
    (tmp_path/'s.csv').write_text(f'id,Mass\n{COMPOSED},0\n', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    assert len(predictor.submission([DECOMPOSED, f'./{DECOMPOSED}', tmp_path/DECOMPOSED])) == 1
    assert predictor.submission([DECOMPOSED, f'./{DECOMPOSED}'], 's.csv').id.tolist() == [COMPOSED]


# ---- hostile names

def test_names_that_are_no_utf8_formulas_and_mathematics(study, pngs, tmp_path, monkeypatch, capsys):
    names = [b'caf\xe9.png', b'=1+1.png', b'$\\frac$.png', b'a\nb\x1b[2J.png', '日'.encode()*60 + b'.png', b'..png']
    (tmp_path/'films').mkdir()
    monkeypatch.chdir(tmp_path/'films')
    for n in names: shutil.copy(pngs[0], n)
    main(str(study), [os.fsdecode(n) for n in names], out='../p.csv', heatmaps='../maps')
    t = pd.read_csv('../p.csv')
    assert t.error.isna().all() and t.file[0] == 'caf\\udce9.png' and t.file[1] == './=1+1.png'
    assert len(names_in('../maps')) == len(names) and len(os.listdir()) == len(names)
    assert '\x1b' not in capsys.readouterr().out


def test_what_becomes_text():
    assert printable('a\nb \x1b[31m\udce9é') == 'a b \\x1b[31m\\udce9é'
    t = for_spreadsheets(pd.DataFrame({'=x': ['-1+1', 'a', '@b'], 'y': [-1., 2, np.nan]}))
    assert list(t) == ["'=x", 'y'] and t["'=x"].tolist() == ["'-1+1", 'a', "'@b"] and t.y.dtype == float


def test_a_submission_by_study(study, pngs, tmp_path):
    listed = pd.DataFrame(dict(film=[Path(f).name for f in pngs], patient=[f'p{i//4}' for i in range(len(pngs))]))
    listed.assign(study=[f's{i//2}' for i in range(len(pngs))], view='PA').to_csv(tmp_path/'list.csv', index=False)
    pd.DataFrame(dict(StudyID=['s1', 's0'], Mass=0, Edema=0)).to_csv(tmp_path/'sample.csv', index=False)
    where = dict(listed=str(tmp_path/'list.csv'), unit='study', template=str(tmp_path/'sample.csv'))
    room.main(str(study), pngs, submission=str(tmp_path/'sent.csv'), out=str(tmp_path/'cases.csv'), **where)
    sent, cases = pd.read_csv(tmp_path/'sent.csv'), pd.read_csv(tmp_path/'cases.csv').set_index('case')
    each = load(study)(pngs)
    assert sent.columns.tolist() == ['StudyID', 'Mass', 'Edema'] and sent.StudyID.tolist() == ['s1', 's0']
    assert sent.Edema.tolist() == pytest.approx([each.Edema[2:4].mean(), each.Edema[:2].mean()], abs=1e-6)
    assert cases.n_films.tolist() == [2]*len(cases) and cases.Mass['s1'] == pytest.approx(sent.Mass[0], abs=1e-6)


@pytest.mark.parametrize('options, says', [
    (dict(unit='study'), '--unit needs --listed FILE'),
    (dict(listed='x.csv'), '--listed and --views belong to --unit'),
    (dict(unit='study', listed='nowhere.csv'), 'there is no file nowhere.csv'),
])
def test_half_of_what_cases_need_is_refused(study, pngs, tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as e: room.main(str(study), pngs[:1], out=str(tmp_path/'out.csv'), **options)
    assert e.value.code == 2 and says in capsys.readouterr().err and not (tmp_path/'out.csv').exists()


# ---- what is no file

def test_pipes_links_and_folders(predictor, pngs, tmp_path):
    os.mkfifo(tmp_path/'x.png')
    os.mkfifo(tmp_path/'IM000001')
    (tmp_path/'gone.png').symlink_to('lost.png')
    (tmp_path/'a.png').write_bytes(Path(pngs[0]).read_bytes())
    assert find_films(tmp_path) == [str(tmp_path/'a.png'), str(tmp_path/'gone.png')]
    t = predictor([tmp_path, tmp_path/'gone.png', tmp_path/'x.png', tmp_path/'a.png'])
    reasons = ('is a folder: name a film in it', 'is a link to lost.png, which is not there', 'is a device or a pipe', '')
    for error, say in zip(t.error, reasons):
        assert say in error and bool(say) == bool(error)


def test_an_output_that_is_a_pipe(study, pngs, tmp_path, capsys):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(SystemExit) as e: main(str(study), pngs[:1], out=str(tmp_path/'pipe'))
    assert e.value.code == 2 and 'is a device or a pipe, no file' in capsys.readouterr().err and (tmp_path/'pipe').is_fifo()


def test_arguments_of_the_predictor_that_cannot_be_used(study, predictor):
    film = np.zeros((8, 8), np.uint8)
    for call, say in ((lambda: Predictor(None), 'None is no folder of a study'),
                      (lambda: Predictor(study, device='nope'), 'device=nope cannot be used'),
                      (lambda: predictor.submission(film), 'give paths of files, not arrays'), (lambda: predictor(film, bs=2.5), 'bs=2.5')):
        with pytest.raises(DataError, match=say) as e: call()
        assert '\n' not in str(e.value)
