"Prediction of new films: the numbers of the training, whatever stands beside them, and clear refusals."
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cxrlg.data import DataError, read_film
from cxrlg.graph import LabelGraph
from cxrlg.model import CXRNet, load_model, predict_logits, save_model
from cxrlg.phantom import make_phantom
from cxrlg.predict import Predictor, class_maps, find_films, main, plot_map
from cxrlg.train import train_fold

TINY = dict(study='t', data_args={'n_patients': 40}, size=32, n_splits=3, arch='test_resnet', arch_args={}, bs=8, epochs=2, threads=1)
LABELS = ['Edema', 'Mass', 'Pneumonia']


def write_fold(path, seed=0, labels=LABELS, size=32, arch='test_resnet', done=True, graph=False, **config):
    "A finished fold of a model with random weights"
    torch.manual_seed(seed)
    model = CXRNet(arch, labels, LabelGraph(len(labels)) if graph else None, in_chans=config.pop('in_chans', 1))
    with torch.no_grad():
        if graph: model.graph.A.copy_(torch.randn(len(labels), len(labels)))
        model.backbone.get_classifier().weight.mul_(30)
    save_model(model, path, size=size)
    (path/'config.json').write_text(json.dumps(dict(data='nih', size=size, n_splits=2, data_args={}) | config))
    if done: (path/'done.json').write_text('{}')


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp('study')
    for k in range(2): write_fold(path/f'none/seed42/fold{k}', seed=k)
    for k in range(2): write_fold(path/f'prox/seed42/fold{k}', seed=k, graph=True)
    return path


@pytest.fixture
def copy(study, tmp_path): return shutil.copytree(study, tmp_path/'copy')


@pytest.fixture(scope='module')
def pngs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('films')
    table, pixels, _ = make_phantom(n_patients=12, size=48, seed=5)
    for name, a in zip(table.image, pixels): Image.fromarray(a).save(folder/name)
    return sorted(str(f) for f in folder.iterdir())


def load(study, **kw): return Predictor(study, verbose=False, **kw)
def numbers(table): return table[LABELS].to_numpy()


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
    assert predictor.arm == arm and [n.split(' ')[0] for n in predictor.notes[:2]] == [f'{arm}/seed42/fold1', f'{arm}/seed42/fold2'] and 'phantom' in predictor.notes[2]
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


def test_the_graph_comes_before_the_sigmoid(study, pngs):
    x = torch.from_numpy(np.stack([read_film(f, 32) for f in pngs]))[:, None] / 255
    models = [load_model(study/f'prox/seed42/fold{k}') for k in range(2)]
    with torch.inference_mode(): expected = torch.stack([m.graph(m.logits(o)).sigmoid() for m in models for o in (x, x.flip(-1))]).mean(0)
    got = numbers(load(study, arm='prox')(pngs))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert np.abs(got - numbers(load(study)(pngs))).max() > .01


@pytest.mark.parametrize('bs', [1, 2, 5, 1000])
def test_the_batch_size_changes_nothing(study, pngs, bs):
    predictor = load(study)
    np.testing.assert_allclose(numbers(predictor(pngs, bs=bs)), numbers(predictor(pngs)), atol=1e-5, rtol=0)


def test_large_films_go_in_small_batches(study, pngs, monkeypatch):
    import cxrlg.predict as room
    seen, predictor = [], load(study)
    monkeypatch.setattr(room, '_BATCH_PIXELS', 3*32*32)
    monkeypatch.setattr(room, '_probs', lambda m, pixels, flip, real=room._probs: (seen.append(len(pixels)), real(m, pixels, flip))[1])
    predictor(pngs[:7], bs=64)
    assert seen == [3, 3, 3, 3, 1, 1]
    monkeypatch.setattr(room, '_BATCH_PIXELS', 1)
    assert len(predictor(pngs[:2])) == 2


def test_order_and_duplicates_are_kept(study, pngs):
    order = [3, 0, 0, 5, 3]
    all_, some = load(study)(pngs), load(study)([pngs[i] for i in order], bs=2)
    assert some.file.tolist() == [pngs[i] for i in order] and list(some) == ['file', *LABELS, 'flag', 'error']
    np.testing.assert_allclose(numbers(some), numbers(all_)[order], atol=1e-5)
    assert (some[LABELS].dtypes == np.float32).all()


def test_one_film_none_and_arrays(study, pngs):
    predictor = load(study)
    one, a = predictor(pngs[0]), np.asarray(Image.open(pngs[0]))
    assert len(one) == 1 and len(predictor([])) == 0 and list(predictor([])) == list(one)
    for films in (a, [a], a[None]): np.testing.assert_allclose(numbers(predictor(films)), numbers(one), atol=1e-6)
    assert predictor(a).file.tolist() == ['array 0']
    mixed = predictor([a.astype(float), pngs[0], np.zeros((0, 5), np.uint8), np.stack([a]*3, -1)])
    assert mixed.error.str.contains('give uint8').tolist() == [True, False, True, True] and mixed[LABELS].isna().all(axis=1).tolist() == [True, False, True, True]


def test_in_chans_3(tmp_path, pngs):
    write_fold(tmp_path/'none/seed1/fold0', in_chans=3)
    predictor = load(tmp_path)
    assert predictor(pngs[0]).error[0] == '' and predictor.explain(pngs[0]).shape == (3, 32, 32)


# ---- kinds of files

def dicom(path, a):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = pydicom.uid.DigitalXRayImageStorageForPresentation, '1.2.3', pydicom.uid.ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0'*128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Rows, ds.Columns = meta.MediaStorageSOPClassUID, '1.2.3', *a.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 8, 8, 7, 1, 'MONOCHROME1', 0
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
    flipped = bytearray(data); flipped[len(data)//2] ^= 255
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


def test_blank_films_are_flagged(study, pngs, tmp_path):
    for v in (0, 130, 255): Image.new('L', (40, 40), v).save(tmp_path/f'{v}.png')
    assert load(study)([tmp_path/'0.png', pngs[0], tmp_path/'130.png', tmp_path/'255.png']).flag.tolist() == ['nearly constant film', ''] + ['nearly constant film']*2


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
    assert capsys.readouterr().out.splitlines() == ['copy, arm none: 1 models, 3 findings, 32 px (squash)', 'none/seed42/fold1 is not finished: the ensemble goes without it']


BROKEN = {
    'labels': (lambda p: write_fold(p, labels=LABELS[::-1]), 'has labels'),
    'size': (lambda p: write_fold(p, size=48), 'has size 48'),
    'mode': (lambda p: write_fold(p, data_args={'mode': 'pad'}), "has mode 'pad'"),
    'two sizes': (lambda p: (p/'config.json').write_text(json.dumps(dict(size=64, data='nih', n_splits=2))), '64 in config.json and 32 in model.json'),
    'no config': (lambda p: (p/'config.json').unlink(), 'config.json or model.json cannot be read'),
    'config cut': (lambda p: (p/'config.json').write_text('{"size": 3'), 'config.json or model.json cannot be read'),
    'config empty': (lambda p: (p/'config.json').write_text('{}'), 'lacks size'),
    'no weights': (lambda p: (p/'model.safetensors').unlink(), 'holds no model.safetensors'),
    'weights cut': (lambda p: os.truncate(p/'model.safetensors', 5000), 'damaged model'),
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

@pytest.mark.parametrize('arch, size', [('test_resnet', 64), ('densenet121', 64), ('efficientnet_lite0', 64), ('seresnext26d_32x4d', 64), ('test_resnet', 50)])
def test_the_mean_of_a_map_is_the_logit_without_the_bias(arch, size):
    torch.manual_seed(0)
    model = CXRNet(arch, LABELS).eval()
    x = torch.rand(2, 1, size, size)
    maps, z = class_maps(model, x), model.logits(x)
    assert maps.ndim == 4 and maps.shape[:2] == (2, 3)
    torch.testing.assert_close(maps.mean((2, 3)) + model.backbone.get_classifier().bias, z.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('arch', ['test_vit', 'mobilenetv3_small_050', 'test_convnext'])
def test_other_heads_have_no_map(arch):
    size = 160
    with pytest.raises(DataError, match=f'{arch} does not end in') as e: class_maps(CXRNet(arch, LABELS).eval(), torch.rand(1, 1, size, size))
    assert '\n' not in str(e.value)


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


def test_plot_map_shows_nothing_where_a_map_is_negative():
    film = np.full((8, 8), 100, np.uint8)
    assert len(plot_map(film, -np.ones((8, 8))).images) == len(plot_map(film, None).images) == 1
    heat = np.zeros((8, 8)); heat[2, 3] = 5; heat[4, 4] = -5
    over = plot_map(film, heat, 'title').images[1].get_array()
    assert over[2, 3, 3] > .5 and over[..., 3].sum() == over[2, 3, 3]


# ---- the command

@pytest.fixture(scope='module')
def command(tmp_path_factory):
    "Runs the command in a process of its own, as the installed script does"
    script = tmp_path_factory.mktemp('bin')/'cxrlg_predict'
    script.write_text("import sys\nfrom cxrlg.predict import main\nif __name__ == '__main__': sys.exit(main())\n")
    def run(*args, cwd=None): return subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ | {'OMP_NUM_THREADS': '1'})
    return run


def test_command_predicts_a_folder(command, study, pngs, tmp_path):
    folder, out = os.path.dirname(pngs[0]), tmp_path/'new'/'p.csv'
    run = command(study, folder, pngs[1], '--out', out, '--heatmaps', tmp_path/'maps', '--bs', 5)
    assert run.returncode == 0, run.stderr
    t, expected = pd.read_csv(out), load(study)([*pngs, pngs[1]])
    assert t.file.tolist() == [*pngs, pngs[1]] and list(t) == ['file', *LABELS, 'flag', 'error'] and t.error.isna().all()
    np.testing.assert_allclose(numbers(t), numbers(expected), atol=1e-5)
    assert 'arm none: 2 models' in run.stdout and str(out) in run.stdout and 'film' in run.stderr
    maps = sorted((tmp_path/'maps').iterdir())
    assert len(maps) == len(t) and Image.open(maps[0]).size == (1000, 280) and maps[-1].name == f'{len(t) - 1:05d}_{os.path.basename(pngs[1])}'
    assert os.listdir(out.parent) == ['p.csv']


def test_command_bad_films_make_status_1(command, study, pngs, tmp_path):
    (tmp_path/'in').mkdir()
    bad = bad_files(tmp_path/'in', pngs[0])
    run = command(study, pngs[0], tmp_path/'in', pngs[1], '--arm', 'prox', '--no_flip', cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f'cxrlg_predict: 5 of 7 films could not be read') and bad[0] in run.stderr
    t = pd.read_csv(tmp_path/'predictions.csv')
    assert t.error.notna().tolist() == [False] + [True]*5 + [False] and t[LABELS].isna().any(axis=1).tolist() == t.error.notna().tolist()
    np.testing.assert_allclose(numbers(t)[[0, 6]], numbers(load(study, arm='prox')(pngs[:2], flip=False)), atol=1e-5)


REFUSED = {
    'no study': (lambda s, f, t: dict(study_dir=t/'nothing'), 'there is no study'),
    'no fold': (lambda s, f, t: dict(study_dir=t), 'holds no finished fold'),
    'no film': (lambda s, f, t: dict(films=[t]), 'holds no film'),
    'missing film': (lambda s, f, t: dict(films=[f, t/'lost.png']), 'lost.png'),
    'no arm': (lambda s, f, t: dict(arm='l1'), 'choose one of none, prox'),
    'bs': (lambda s, f, t: dict(bs=0), 'at least one film a batch'),
    'out is a film': (lambda s, f, t: dict(out=f), 'is one of the films'),
    'out is a folder': (lambda s, f, t: dict(out=t), 'is a folder'),
    'out below a file': (lambda s, f, t: dict(out=f'{f}/p.csv'), 'nothing was written'),
    'out too long a name': (lambda s, f, t: dict(out='p'*250), 'nothing was written'),
    'maps below a file': (lambda s, f, t: dict(heatmaps=f'{f}/maps'), 'nothing was written'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refusals_are_one_line_and_status_2(study, pngs, tmp_path, name, capsys, monkeypatch):
    spoil, say = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(**dict(study_dir=study, films=pngs[:1]) | spoil(study, pngs[0], tmp_path))
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and say in err[0]
    assert os.listdir(tmp_path) == [] and Image.open(pngs[0]).size == (48, 48)


def test_command_refuses_in_a_process_of_its_own(command, study, pngs, tmp_path):
    run = command(study, pngs[0], 'lost.png', '--out', tmp_path/'p.csv')
    assert run.returncode == 2 and run.stderr.count('\n') == 1 and 'lost.png' in run.stderr and run.stdout == '' and os.listdir(tmp_path) == []


# ---- real films

def test_real_films(study, films):
    files = sorted((films/'nih256'/'images').glob('*.jpg'))[:12]
    t = load(study)(files)
    assert (t.error == '').all() and (t.flag == '').all() and np.ptp(numbers(t), axis=0).min() > 1e-4
