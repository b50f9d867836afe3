"One file and its card: the numbers of the command without this library, and what the study says of itself."
import hashlib
import importlib.util
import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import cxrlg.export as room
from cxrlg.core import DataError
from cxrlg.export import export_folder, export_onnx, main, model_card, onnx_example
from cxrlg.films import read_film
from cxrlg.tree import TiedTree
from small_studies import LABELS, copy, load, names_in, numbers, one_thread, predictor, study, write_fold

SCALE = {'Edema': dict(temperature=.3, bias=-1.), 'Mass': dict(temperature=2., bias=.5), 'Pneumonia': dict(temperature=1., bias=0.)}


def needs_onnx():
    for m in ('onnx', 'onnxscript', 'onnxruntime'): pytest.importorskip(m)


# ---- the file

@pytest.mark.parametrize('arm, in_chans, flip, scaled', [('prox', 1, True, True), ('none', 3, False, False), ('tied', 1, False, True)])
def test_onnx_gives_the_numbers_of_the_command(tmp_path, arm, in_chans, flip, scaled):
    needs_onnx()
    import onnxruntime
    tree = TiedTree(LABELS, {'Pneumonia': 'Edema'}).fit_(torch.tensor([[1., 0, 1], [0, 1, 0], [1, 0, 0]]))
    graph = dict(none=False, prox=True, tied=tree)[arm]
    for k in range(2 if flip else 1): write_fold(tmp_path/f's/{arm}/seed1/fold{k}', seed=k, in_chans=in_chans, graph=graph)
    if scaled: (tmp_path/'s'/'calibration.json').write_text(json.dumps({arm: SCALE}))
    predictor = load(tmp_path/'s')
    file = export_onnx(predictor, tmp_path/'new'/'m.onnx', flip)
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['labels']) == LABELS and about['size'] == '32' and about['mode'] == 'squash'
    assert ('calibrated' in about['probabilities']) == scaled
    pixels = np.random.default_rng(0).integers(0, 256, (17, 32, 32), dtype=np.uint8)
    expected = numbers(predictor(pixels, flip=flip))
    assert np.ptp(expected, 0).min() > .005
    for n in (1, 3, 17):
        p, = session.run(['probabilities'], {'film': pixels[:n, None].astype(np.float32) / 255})
        assert p.shape == (n, 3) and p.dtype == np.float32
        np.testing.assert_allclose(p, expected[:n], atol=1e-5)
    assert names_in(file.parent) == ['m.onnx', 'model_card.md']
    text = (file.parent/'model_card.md').read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in text and str(tmp_path) not in text and ('mirror image' in text) == flip


@pytest.mark.parametrize('mode', ['squash', 'pad'])
def test_the_cards_example_gives_the_numbers_of_the_command(tmp_path, mode, monkeypatch, capsys):
    needs_onnx()
    write_fold(tmp_path/'s/none/seed1/fold0', data_args=dict(mode=mode))
    predictor = load(tmp_path/'s')
    assert predictor.mode == mode
    predictor.export('onnx', tmp_path/'m.onnx')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90), dtype=np.uint8)).save(tmp_path/'film.png')
    monkeypatch.chdir(tmp_path)
    example = re.search(r'```python\n(.*?)\n```', (tmp_path/'model_card.md').read_text(), re.S)[1]
    assert example == onnx_example('m.onnx', mode)
    exec(example, {})
    shown = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(shown, numbers(predictor(['film.png']))[0], atol=6e-4)


def example_input(example, film, folder):
    "What the card's example feeds to the model, or its refusal"
    film.save(folder/'film.png')
    lines = example.split('session = ')[0] + "labels, size = [], 32\nfilm = " + example.split('\nfilm = ', 1)[1].split('p = session')[0]
    scope = {}
    try: exec(lines, scope)
    except SystemExit as e: return str(e)
    return scope['x'][0, 0]*255


GREY = np.clip(np.random.default_rng(0).normal(120, 40, (61, 90)), 0, 255).astype(np.uint8)
KINDS = {
    'grey': Image.fromarray(GREY),
    'colour': Image.fromarray(np.stack([GREY] * 3, -1)),
    'sixteen bits': Image.fromarray(GREY.astype(np.uint16) * 257),
    'twelve of sixteen bits': Image.fromarray(GREY.astype(np.uint16) * 16),
    'flat, sixteen bits': Image.fromarray(np.full((20, 20), 999, np.uint16)),
    'one bit': Image.fromarray(GREY > 100),
    'palette': Image.fromarray(GREY).convert('P'),
}


@pytest.mark.parametrize('mode', ['squash', 'pad'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_cards_example_sees_what_the_command_sees(tmp_path, kind, mode, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = example_input(onnx_example('m.onnx', mode), KINDS[kind], tmp_path)
    seen = read_film('film.png', 32, mode)
    if kind.startswith('flat'): assert np.ptp(x[x > 0]) == 0 if (x > 0).any() else np.ptp(x) == 0
    else: np.testing.assert_allclose(x, seen, atol=1)


def test_the_cards_example_refuses_what_it_cannot_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clear = Image.fromarray(np.dstack([GREY]*3 + [GREY]))
    assert 'use cxrlg_predict' in example_input(onnx_example('m.onnx'), clear, tmp_path)


def test_hostile_names_are_text_in_the_card(tmp_path):
    labels = ['<script>alert(1)</script>', '[x](javascript:y)', 'a|b\nc']
    write_fold(tmp_path/'<b>s\n# x'/'none/seed1/fold0', labels=labels)
    text = model_card(load(tmp_path/'<b>s\n# x'))
    assert '<script>' not in text and '<b>' not in text and '](javascript' not in text and '\n# x' not in text
    assert '| a/b c |' in text and stands_alone(text)
    assert 'InferenceSession("m\'x.onnx")' in onnx_example("m'x.onnx")


def test_a_file_that_differs_or_is_too_large_is_not_written(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(room, '_to_onnx', lambda whole, size, metadata, path: path.write_bytes(b'x'))
    for error, shown in ((.01, '1.0e-02'), (float('nan'), 'nan')):
        monkeypatch.setattr(room, '_onnx_error', lambda *args: error)
        with pytest.raises(DataError, match=f'differ by {shown}'): export_onnx(predictor, tmp_path/'m.onnx')
    monkeypatch.setattr(room._Whole, 'parameters', lambda self: [torch.empty(10**9, device='meta')])
    with pytest.raises(DataError, match='a file of 4.0 GB, and ONNX allows 2: choose fewer seeds or folds'):
        export_onnx(predictor, tmp_path/'m.onnx')
    assert names_in(tmp_path) == []


def test_what_export_needs_is_named(predictor, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(room.importlib.util, 'find_spec', lambda name: None if name in ('onnxscript', 'onnxruntime') else real(name))
    with pytest.raises(DataError) as e: export_onnx(predictor, tmp_path/'m.onnx')
    assert str(e.value) == "export needs onnxscript, onnxruntime: pip install 'cxrlg[onnx]'" and names_in(tmp_path) == []


def test_command_exports(study, tmp_path, capsys, monkeypatch):
    needs_onnx()
    monkeypatch.setattr(room, '_to_onnx', lambda whole, size, metadata, path: path.write_bytes(b'x'*10**6))
    monkeypatch.setattr(room, '_onnx_error', lambda *args: 1e-7)
    main(str(study), str(tmp_path/'m.onnx'), arm='prox', seeds='42')
    assert 'm.onnx: 1.0 MB written' in capsys.readouterr().out and names_in(tmp_path) == ['m.onnx', 'model_card.md']
    below = str(tmp_path/'m.onnx'/'n.onnx')
    wrongs = (dict(seeds='1'), 'no seed 1'), (dict(out=str(tmp_path)), 'is there already'), (dict(out=below), 'it was not written')
    for wrong, say in wrongs:
        with pytest.raises(SystemExit) as e: main(**dict(study_dir=str(study)) | wrong)
        err = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and len(err) == 1 and err[0].startswith('cxrlg_export: ') and say in err[0]


# ---- the card

def locked_row(arm, value):
    return dict(arm=arm, positives='all', labels=3, films=9, patients=5, locked=value, low=.7, high=.73, out_of_fold=.72, oof_low=.71,
                oof_high=.74, difference=value - .72, difference_low=-.03, difference_high=.04, change=None)


RESULTS = dict(
    arms=[dict(arm='none', seeds=2, folds=2, mean=.8123456, low=.7, high=.9, pooled=.81, pooled_low=.71, pooled_high=.91),
          dict(arm='prox', seeds=2, folds=2, mean=.5555, low=.5, high=.6, pooled=None, pooled_low=None, pooled_high=None)],
    labels=[dict(arm='none', label='Mass', auc=.66, low=.6, high=.7), dict(arm='prox', label='Mass', auc=.11, low=.1, high=.2)],
    frequent=[dict(arm='none', labels=2, mean=.77, low=.75, high=.79, pooled=.76, pooled_low=.7, pooled_high=.8)],
    locked=[locked_row('none', .7171), locked_row('prox', .2222)],
    locked_labels=[dict(arm='none', label='Mass', auc=.6161, low=.6, high=.7, n_pos=7.),
                   dict(arm='none', label='macro', auc=.65, low=.6, high=.7, n_pos=7),
                   dict(arm='prox', label='Mass', auc=.2323, low=.1, high=.2, n_pos=7)],
    locked_calibration=[dict(arm='none', probabilities='scaled', ece=.0123, low=.01, high=.02, log_loss=.2, brier=.1)],
    calibration=[dict(label='Mass', ece=.1234)])

SAID = ['Not a medical device', '2 models (seed 42 fold 0, seed 42 fold 1)', '80 films of 40 patients', '2 further films of 1 patients',
        '0.8123 (0.7000 to 0.9000)', '2 with 30 positives or more | 0.7700', '| Mass | 0.6600 (0.6000 to 0.7000) |',
        '| all | 3 | 9 | 5 | 0.7171 (0.7000 to 0.7300) | 0.7200 (0.7100 to 0.7400) | -0.0029 (-0.0300 to 0.0400) |',
        '| Mass | 7 | 0.6161 (0.6000 to 0.7000) |', '| macro | – | 0.6500', '| scaled | 0.2000 | 0.1000 | 0.0123 (0.0100 to 0.0200) |',
        '| Mass | 9 | 0.4321 (0.1000 to 0.9000) | 0.0500 | 0.2000 |', 'raw (no calibration.json']
NOT_SAID = ['0.5555', '0.1100', '0.2222', '0.2323', '0.3333', '0.1234', 'phantom', 'None', 'nan']


@pytest.fixture
def evaluated(copy):
    "A study with results, folds and boxes"
    (copy/'results.json').write_text(json.dumps(RESULTS))
    pd.DataFrame(dict(image=['a', 'b', 'c'], patient=['07', '7', '7'], fold=[0, -1, -1])).to_csv(copy/'folds.csv', index=False)
    rates = dict(finding='Mass', films=9, hit_low=.1, hit_high=.9, chance=.05, mean_box=.2, iou=.3, iou_low=.2, iou_high=.4)
    pointed = [dict(arm='none', hit=.4321) | rates, dict(arm='prox', hit=.3333) | rates]
    pd.DataFrame(pointed).to_csv(copy/'localisation.csv', index=False)
    return copy


def stands_alone(text):
    "Do headings and tables have blank lines around them?"
    blocks = text.split('\n\n')
    above = [b for b in blocks if re.search(r'\n(#|\|)', b) and not b.startswith('|')]
    below = [b for b in blocks if b.startswith('|') and re.search(r'\n[^|]', b.strip())]
    return not above + below


def test_the_card_says_what_the_study_says(evaluated):
    predictor = load(evaluated)
    text = model_card(predictor)
    assert [part for part in SAID if part not in text] == []
    assert [part for part in NOT_SAID if part in text] == []
    assert stands_alone(text)
    oof = pd.concat([pd.read_parquet(f/'oof.parquet') for f in predictor.folders.values()])
    for l in LABELS:
        has = oof['y:' + l] == 1
        assert f'| {l} | {int(has.sum())} | {oof.patient[has].nunique()} |' in text
    for f in predictor.folders.values(): assert hashlib.sha256((f/'model.safetensors').read_bytes()).hexdigest() in text
    other = model_card(load(evaluated, arm='prox'))
    assert '0.5555' in other and '0.8123' not in other and 'label graph, ' in other


def test_the_card_counts_the_films_of_the_study_not_of_the_fold_left_out(evaluated):
    text, alone = model_card(load(evaluated)), model_card(load(evaluated, folds=0))
    assert 'An ensemble of 1 model (seed 42 fold 0)' in alone and '80 films of 40 patients' in alone and 'in 2 folds by patient' in alone
    (evaluated/'none/seed42/fold1/done.json').unlink()
    part = model_card(load(evaluated))
    assert '40 films of 20 patients' in part and 'The study has 2 folds' in part and 'The study has' not in text


def test_the_card_of_a_study_without_results(copy):
    text = model_card(load(copy))
    assert 'it has not been evaluated' in text and stands_alone(text)
    (copy/'results.json').write_text(json.dumps(dict(arms=[RESULTS['arms'][1]])))
    assert 'has nothing on this arm' in model_card(load(copy))
    (copy/'results.json').write_text('{"arms": [')
    with pytest.raises(DataError, match='results.json cannot be read'): model_card(load(copy))
