"Localisation: planted maps are found, every figure equals a plain loop, and no model is asked about a patient that it has seen."
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cxrlg.localise as room
from cxrlg.core import DataError
from cxrlg.data import NIH, read_table
from cxrlg.localise import held_out, hit_table, localisation, localise, main, overlay_sheet, plot_boxes, read_boxes, write_localisation
from cxrlg.films import PixelCache
from cxrlg.model import CXRNet, save_model
from cxrlg.predict import Predictor
from small_studies import one_thread

LABELS = ['Mass', 'Effusion', 'Infiltration']


def write_study(path, folds, arms=('none',), arch='test_resnet', **arch_args):
    "A study of random models; `folds`: DataFrame of image, patient, fold"
    for arm in arms:
        for k in range(2):
            torch.manual_seed(k + 10*len(arm))
            save_model(CXRNet(arch, LABELS, arch_args=arch_args), path/f'{arm}/seed1/fold{k}', size=64)
            (path/f'{arm}/seed1/fold{k}/config.json').write_text(json.dumps(dict(data='nih', size=64, n_splits=2)))
            (path/f'{arm}/seed1/fold{k}/done.json').write_text('{}')
    folds.to_csv(path/'folds.csv', index=False)
    return path


FOLDS = pd.DataFrame(dict(image=['a.png', 'b.png', 'c.png', 'd.png'], patient=['1', '1', '02', '3'], fold=[0, 0, 1, -1]))


@pytest.fixture(scope='module')
def study(tmp_path_factory): return write_study(tmp_path_factory.mktemp('study'), FOLDS, ('none', 'prox'), output_stride=8)


@pytest.fixture
def predictor(study): return Predictor(study, arm='none', verbose=False)


@pytest.fixture
def films():
    "Twelve films of six patients, two of them in folds, and boxes on all"
    rng = np.random.default_rng(0)
    patients = ['1', '1', '02', '02', '3', '3', 'x', 'x', 'y', 'y', 'z', 'z']
    table = pd.DataFrame(dict(image=[f'images/f{i}.jpg' for i in range(12)], patient=patients) | {l: np.float32(1) for l in LABELS})
    rows = [
        (f'f{i}.png', LABELS[(i + k) % 3], *rng.uniform(0, 0.6, 2), *rng.uniform(0.1, 0.4, 2))
        for i in range(12)
        for k in range(1 + i % 3)
    ] + [('f3.png', 'Mass', 0.5, 0.5, 0.2, 0.2)]
    return table, rng.integers(0, 256, (12, 64, 64), dtype=np.uint8), pd.DataFrame(rows, columns=['image', 'finding', 'x', 'y', 'w', 'h'])


@pytest.fixture
def real(): return Path(os.environ.get('CXRLG_DATA', Path(__file__).resolve().parents[2]/'shared'/'data'))/'nih256'


class Planted(Predictor):
    "A predictor whose maps are given: [n, L, h, w], in the order of the films; a film's first pixel holds its number"
    def __init__(self, study, maps):
        self.path, self.arm, self.labels, self.size, self.mode, self.folders, self.given = (
            Path(study),
            'none',
            LABELS,
            64,
            'squash',
            {(1, 0): None, (1, 1): None},
            maps,
        )

    def only(self, folds): return self
    def maps(self, pixels, bs=64): return self.given[pixels[:, 0, 0]]


def numbered(pixels):
    pixels = pixels.copy()
    pixels[:, 0, 0] = range(len(pixels))
    return pixels


def box_list(path, rows, header='Image Index,Finding Label,Bbox [x,y,w,h],,,'):
    path.write_text('\n'.join([header, *(','.join(map(str, r)) for r in rows)]) + '\n')
    return path


# ---- boxes

def test_read_boxes(tmp_path):
    b = read_boxes(
        box_list(
            tmp_path / 'b.csv',
            [('a.png', 'Infiltrate', 0, 512, 102.4, 51.2), ('b.png', ' Mass', 10, 20, 1014, 1004, '', '', '')],
        )
    )
    assert b.finding.tolist() == ['Infiltration', 'Mass'] and np.allclose(
        b[['x', 'y', 'w', 'h']], [[0, 0.5, 0.1, 0.05], [10 / 1024, 20 / 1024, 1014 / 1024, 1004 / 1024]]
    )
    assert len(read_boxes(box_list(tmp_path/'none.csv', []))) == 0


BAD_BOXES = {
    'text': ('a.png', 'Mass', 'left', 1, 1, 1),
    'blank': ('a.png', 'Mass', '', 1, 1, 1),
    'no width': ('a.png', 'Mass', 1, 1, 0, 1),
    'negative': ('a.png', 'Mass', -3, 1, 1, 1),
    'outside': ('a.png', 'Mass', 1, 1025, 1, 1),
    'infinite': ('a.png', 'Mass', 1, 1, 'inf', 1),
    'no finding': ('a.png', '', 1, 1, 1, 1),
    'no film': ('', 'Mass', 1, 1, 1, 1),
}


@pytest.mark.parametrize('name', BAD_BOXES)
def test_bad_boxes_are_named(tmp_path, name):
    with pytest.raises(DataError, match='row 3 is no box on a film of 1024 pixels') as e:
        read_boxes(box_list(tmp_path / 'b.csv', [('a.png', 'Mass', 1, 1, 1, 1), BAD_BOXES[name]]))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'make',
    [
        lambda p: p,
        lambda p: p.parent,
        lambda p: (p.write_text(''), p)[1],
        lambda p: box_list(p, [], 'a,b'),
        lambda p: (p.write_bytes(bytes(range(256))), p)[1],
    ],
    ids=['lost', 'folder', 'empty', 'two columns', 'bytes'],
)
def test_files_that_are_no_boxes(tmp_path, make):
    with pytest.raises(DataError, match='cannot be read as a list of boxes') as e: read_boxes(make(tmp_path/'b.csv'))
    assert '\n' not in str(e.value)


def test_the_real_boxes(real):
    if not real.is_dir(): pytest.skip('no real films: set CXRLG_DATA')
    b, table = read_boxes(real/'BBox_List_2017.csv'), read_table('nih', real, verbose=False)
    assert len(b) == 984 and b.image.nunique() == 880 and set(b.finding) <= set(NIH) and ((b.x + b.w <= 1) & (b.y + b.h <= 1)).mean() > .99
    stems = {Path(i).stem: r for r, i in enumerate(table.image)}
    there = b[b.image.map(lambda f: Path(f).stem).isin(stems)]
    assert there.image.nunique() == 834
    assert all(table[f][stems[Path(i).stem]] == 1 for i, f in zip(there.image, there.finding))


ROWS = {
    'by name': 'finding,w,h,x,y,image\nMass,30,40,10,20,a.png\n',
    'corners': 'image_id,rad_id,class_name,x_min,y_min,x_max,y_max\na.png,R1,Mass,10,20,40,60\nb,R1,No finding,,,,\n',
    'BOM': '\ufeffimage,finding,x,y,w,h\na.png,Mass,10,20,30,40\n',
}


@pytest.mark.parametrize('name', ROWS)
def test_lists_of_ones_own(tmp_path, name):
    (tmp_path/'b.csv').write_text(ROWS[name], encoding='utf-8')
    assert read_boxes(tmp_path/'b.csv', side=None).values.tolist() == [['a.png', 'Mass', 10, 20, 30, 40]]
    assert read_boxes(tmp_path/'b.csv', side=100)[['x', 'y', 'w', 'h']].values.tolist() == [[.1, .2, .3, .4]]


def test_lists_with_semicolons(tmp_path):
    (tmp_path/'b.csv').write_text(ROWS['by name'].replace(',', ';').replace('10', '10,5'))
    assert read_boxes(tmp_path/'b.csv', side=None).values.tolist() == [['a.png', 'Mass', 10.5, 20, 30, 40]]


# ---- who may be asked

def test_held_out(predictor, study, tmp_path):
    assert held_out(predictor, ['1', '02', '3', 'new', '2', 1]).tolist() == [0, 1, -1, -1, -1, 0]
    assert held_out(predictor.only(0), ['1', '02', '3']).tolist() == [0, -2, -1]
    both = write_study(tmp_path/'by_image', FOLDS.assign(fold=[0, 1, 1, -1]))
    assert held_out(Predictor(both, verbose=False), ['1', '02']).tolist() == [-2, 1]
    (both/'folds.csv').unlink()
    with pytest.raises(DataError, match='folds.csv is not there'): held_out(Predictor(both, verbose=False), ['1'])


def test_films_are_asked_of_models_that_have_not_seen_the_patient(predictor, study, films):
    table, pixels, boxes = films
    found = localise(predictor, table, pixels, boxes, verbose=False)
    expected = dict(zip(['1', '02', '3', 'x', 'y', 'z'], [[0], [1], [0, 1], [0, 1], [0, 1], [0, 1]]))
    for r in found.itertuples():
        m = Predictor(study, arm='none', folds=expected[r.patient], verbose=False).maps(pixels[[r.row]])[0, LABELS.index(r.finding)]
        i, j = divmod(int(m.argmax()), m.shape[1])
        np.testing.assert_allclose((r.x, r.y), ((j + .5)/m.shape[1], (i + .5)/m.shape[0]))
    assert found.fold.tolist() == [dict(zip(('1', '02'), (0, 1))).get(p, -1) for p in found.patient]


def test_patients_that_every_model_has_seen_are_left_out(predictor, films, capsys):
    table, pixels, boxes = films
    found = localise(predictor.only(0), table, pixels, boxes)
    gone = boxes.image.isin(['f2.png', 'f3.png']).sum()
    assert (
        '02' not in set(found.patient)
        and f'left out: {gone} boxes on films of patients that every model has seen' in capsys.readouterr().out
    )
    with pytest.raises(DataError, match='every model has seen'):
        localise(predictor.only(0), table, pixels, boxes[boxes.image.isin(['f2.png', 'f3.png'])], verbose=False)


# ---- pointing and overlap

def slow_rows(table, pixels, boxes, maps, tolerance, threshold):
    "What `localise` says, by plain loops"
    pairs = [
        (r, f)
        for r in range(len(table))
        for f in sorted(set(boxes.finding))
        if len(boxes[(boxes.image == f'f{r}.png') & (boxes.finding == f)])
    ]
    of = lambda r, f: boxes[(boxes.image == f'f{r}.png') & (boxes.finding == f)][['x', 'y', 'w', 'h']].to_numpy()
    n, out = room._GRID, []
    def mask(bs, m=0.0):
        return np.array(
            [
                [
                    any(x - m < (j + 0.5) / n < x + w + m and y - m < (i + 0.5) / n < y + h + m for x, y, w, h in bs)
                    for j in range(n)
                ]
                for i in range(n)
            ]
        )

    def large(m):
        m = F.interpolate(torch.tensor(m, dtype=torch.float32)[None, None], (n, n), mode='bilinear', align_corners=False)[0, 0].numpy()
        return (m - m.min()) / (m.max() - m.min())
    masks, larges = {p: mask(of(*p)) for p in pairs}, {(r, f): large(maps[r, LABELS.index(f)]) for r, f in pairs}
    def hit(x, y, bs):
        return float(
            any(
                a - tolerance <= x <= a + w + tolerance and b - tolerance <= y <= b + h + tolerance for a, b, w, h in bs
            )
        )

    for r, f in pairs:
        m, others = maps[r, LABELS.index(f)], [larges[q] for q in pairs if q[1] == f and table.patient[q[0]] != table.patient[r]]
        i, j = np.argwhere(m == m.max())[0]
        row = dict(
            row=r,
            finding=f,
            hit=hit((j + 0.5) / m.shape[1], (i + 0.5) / m.shape[0], of(r, f)),
            chance=mask(of(r, f), tolerance).mean(),
            iou=((larges[r, f] >= threshold) & masks[r, f]).sum() / ((larges[r, f] >= threshold) | masks[r, f]).sum(),
        )
        if others:
            mean = np.mean(others, axis=0)
            i, j = np.argwhere(mean == mean.max())[0]
            row |= dict(mean_map=hit((j + .5)/n, (i + .5)/n, of(r, f)))
        out.append(row)
    return pd.DataFrame(out)


@pytest.mark.parametrize('tolerance, threshold', [(0, .5), (.067, .7)])
def test_every_figure_equals_a_plain_loop(study, films, tolerance, threshold):
    table, pixels, boxes = films
    maps = np.random.default_rng(1).normal(size=(12, 3, 5, 4)).astype(np.float32)
    found = localise(Planted(study, maps), table, numbered(pixels), boxes, tolerance, threshold, verbose=False)
    slow = slow_rows(table, pixels, boxes, maps, tolerance, threshold)
    assert found[['row', 'finding']].equals(slow[['row', 'finding']])
    for k in ('hit', 'chance', 'iou'): np.testing.assert_allclose(found[k], slow[k], atol=1e-6, err_msg=k)
    assert (found.mean_map == slow.mean_map).mean() > .9 and found.hit.nunique() == 2


def planted(table, boxes, shift=(0, 0)):
    "Maps with one high cell, in the middle of the first box of each film and finding"
    maps = np.zeros((len(table), 3, 32, 32), np.float32)
    for b in boxes.drop_duplicates(['image', 'finding']).itertuples():
        i, j = int((b.y + b.h/2 + shift[1])*32), int((b.x + b.w/2 + shift[0])*32)
        maps[int(Path(b.image).stem[1:]), LABELS.index(b.finding), i, j] = 1
    return maps


def test_planted_maps_hit_and_shifted_ones_miss(study, films):
    table, pixels, _ = films
    boxes = pd.DataFrame(
        [(f'f{i}.png', LABELS[i % 3], 0.1 + 0.02 * i, 0.3, 0.2, 0.2) for i in range(12)],
        columns=['image', 'finding', 'x', 'y', 'w', 'h'],
    )
    on = localise(Planted(study, planted(table, boxes)), table, numbered(pixels), boxes, verbose=False)
    off = localise(Planted(study, planted(table, boxes, (.15, 0))), table, numbered(pixels), boxes, verbose=False)
    assert on.hit.eq(1).all() and off.hit.eq(0).all() and on.iou.min() > 0
    assert (
        localise(
            Planted(study, planted(table, boxes, (0.15, 0))),
            table,
            numbered(pixels),
            boxes,
            tolerance=0.1,
            verbose=False,
        )
        .hit.eq(1)
        .all()
    )
    np.testing.assert_allclose(on.chance, .04, atol=.003)


def test_a_point_between_two_boxes_is_outside(study, films):
    table, pixels, _ = films
    boxes = pd.DataFrame(
        [('f0.png', 'Mass', 0.1, 0.1, 0.2, 0.8), ('f0.png', 'Mass', 0.7, 0.1, 0.2, 0.8)],
        columns=['image', 'finding', 'x', 'y', 'w', 'h'],
    )
    maps = np.zeros((12, 3, 32, 32), np.float32)
    maps[0, 0, 16, 16] = 1
    found = localise(Planted(study, maps), table, numbered(pixels), boxes, verbose=False)
    assert len(found) == 1 and found.hit[0] == 0 and len(found.boxes[0]) == 2 and abs(found.chance[0] - .32) < .01


def test_the_others_boxes_point_where_most_of_them_are(study, films):
    table, pixels, _ = films
    boxes = pd.DataFrame(
        [(f'f{i}.png', 'Mass', 0.6 if i < 10 else 0.1, 0.6, 0.3, 0.3) for i in range(12)],
        columns=['image', 'finding', 'x', 'y', 'w', 'h'],
    )
    found = localise(
        Planted(study, np.random.default_rng(0).random((12, 3, 8, 8), dtype=np.float32)),
        table,
        numbered(pixels),
        boxes,
        verbose=False,
    )
    assert found.mean_box.tolist() == [1]*10 + [0]*2


def test_a_patient_is_no_rival_of_itself(study, films):
    table, pixels, _ = films
    boxes = pd.DataFrame(
        [
            ('f0.png', 'Mass', 0.1, 0.1, 0.2, 0.2),
            ('f1.png', 'Mass', 0.1, 0.1, 0.2, 0.2),
            ('f6.png', 'Effusion', 0.5, 0.5, 0.3, 0.3),
            ('f8.png', 'Effusion', 0.5, 0.5, 0.3, 0.3),
        ],
        columns=['image', 'finding', 'x', 'y', 'w', 'h'],
    )
    found = localise(Planted(study, planted(table, boxes)), table, numbered(pixels), boxes, verbose=False)
    assert (
        found.mean_box.isna().tolist()
        == found.mean_map.isna().tolist()
        == found.iou_mean_map.isna().tolist()
        == [True, True, False, False]
    )
    t = hit_table(found, n_boot=50).set_index('finding')
    assert np.isnan(t.mean_box['Mass']) and np.isnan(t.gain['Mass']) and t.hit['Mass'] == 1 and t.mean_box['all'] == 1


def test_one_film_and_a_constant_map(study, films):
    table, pixels, _ = films
    boxes = pd.DataFrame([('f7.png', 'Mass', .5, .5, .3, .3)], columns=['image', 'finding', 'x', 'y', 'w', 'h'])
    t = localisation(Planted(study, np.ones((12, 3, 2, 2), np.float32)), table, numbered(pixels), boxes, n_boot=20, verbose=False)
    assert (
        t.finding.tolist() == ['Mass', 'all']
        and t.hit.tolist() == [0, 0]
        and t.films.tolist() == [1, 1]
        and t[['hit_low', 'hit_high']].isna().all(axis=None)
    )


def test_a_box_that_leaves_the_film(study, films):
    table, pixels, _ = films
    boxes = pd.DataFrame([('f7.png', 'Mass', .9, .9, .5, .5)], columns=['image', 'finding', 'x', 'y', 'w', 'h'])
    found = localise(
        Planted(
            study, np.eye(8, dtype=np.float32)[None, None].repeat(12, 0).repeat(3, 1) * np.arange(8, dtype=np.float32)
        ),
        table,
        numbered(pixels),
        boxes,
        verbose=False,
    )
    assert found.hit[0] == 1 and abs(found.chance[0] - .01) < .003


REFUSED = {
    'pixels of another size': (lambda t, p, b: (t, p[:, :32, :32], b), 'the models take 64 x 64'),
    'pixels of another table': (lambda t, p, b: (t, p[:3], b), 'the table has 12 films'),
    'unknown findings': (lambda t, p, b: (t, p, b.assign(finding='Efusion')), "did you mean 'Effusion'"),
    'other films': (lambda t, p, b: (t, p, b.assign(image='q' + b.image)), 'none of the 25 boxes is on a film of the table'),
    'no box': (lambda t, p, b: (t, p, b[:0]), 'there is no box'),
    'two films of one name': (lambda t, p, b: (t.assign(image='f1.png'), p, b), 'two films of one name'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refusals(predictor, films, name):
    make, say = REFUSED[name]
    with pytest.raises(DataError, match=say) as e: localise(predictor, *make(*films), verbose=False)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('options', [dict(tolerance=-.1), dict(threshold=0), dict(threshold=1), dict(tolerance=float('nan'))])
def test_options_out_of_range(predictor, films, options):
    with pytest.raises(DataError, match='a tolerance is not negative'): localise(predictor, *films, verbose=False, **options)


def test_what_is_left_out_is_said(predictor, films, capsys):
    table, pixels, boxes = films
    more = pd.concat(
        [
            boxes,
            pd.DataFrame(
                [('f1.png', 'Nodule', 0.1, 0.1, 0.1, 0.1), ('lost.png', 'Mass', 0.1, 0.1, 0.1, 0.1)],
                columns=boxes.columns,
            ),
        ]
    )
    localise(predictor, table, pixels, more)
    assert capsys.readouterr().out.splitlines() == [
        '25 boxes on 12 films of 6 patients',
        'left out: 1 boxes of findings that the study does not know (Nodule)',
        'left out: 1 boxes on films that are not in the table',
    ]


# ---- the table

def test_intervals_equal_a_plain_bootstrap():
    rng = np.random.default_rng(0)
    patient = np.repeat([f'p{i}' for i in range(60)], rng.integers(1, 6, 60))
    v = rng.random((len(patient), 2)) < .3
    v = v.astype(float)
    v[5, 1] = np.nan
    fast = room._resampled(v, patient, 4000, 0)
    np.testing.assert_allclose(fast[0], np.nanmean(v, 0))
    groups, slow = [np.flatnonzero(patient == p) for p in pd.unique(patient)], []
    for _ in range(4000):
        rows = np.concatenate([groups[k] for k in rng.integers(0, 60, 60)])
        slow.append(np.nanmean(v[rows], 0))
    np.testing.assert_allclose(np.quantile(fast[1:], [.025, .5, .975], axis=0), np.quantile(slow, [.025, .5, .975], axis=0), atol=.008)


def test_the_interval_of_the_gain_is_paired():
    found = pd.DataFrame(
        dict(
            finding='Mass',
            patient=[f'p{i}' for i in range(40)],
            row=range(40),
            boxes=[np.zeros((1, 4))] * 40,
            hit=[0.0, 1.0] * 20,
            chance=0.1,
            mean_map=0.0,
            mean_box=[0.0, 1.0] * 20,
            iou=0.2,
            iou_mean_map=0.1,
        )
    )
    t = hit_table(found).iloc[0]
    assert t.gain == t.gain_low == t.gain_high == 0 and t.hit_low < .5 < t.hit_high


# ---- files and pictures

@pytest.fixture
def nih_folder(tmp_path, films):
    "The films in the layout of an NIH download, with boxes on films of 1024 pixels"
    table, pixels, boxes = films
    (tmp_path/'films'/'images').mkdir(parents=True)
    for i, a in enumerate(pixels): Image.fromarray(a).resize((100, 100)).save(tmp_path/'films'/'images'/f'f{i}.png')
    table.assign(
        **{
            'Image Index': [f'f{i}.png' for i in range(12)],
            'Finding Labels': 'Mass|Effusion',
            'Patient ID': table.patient.replace({'02': '2', 'x': '10', 'y': '11', 'z': '12'}),
            'Follow-up #': 0,
            'Patient Age': 50,
            'Patient Gender': 'F',
            'View Position': 'PA',
        }
    )[
        ['Image Index', 'Finding Labels', 'Patient ID', 'Follow-up #', 'Patient Age', 'Patient Gender', 'View Position']
    ].to_csv(
        tmp_path / 'films' / 'Data_Entry_2017.csv', index=False
    )
    box_list(
        tmp_path / 'films' / 'BBox_List_2017.csv',
        [
            (b.image, b.finding.replace('Infiltration', 'Infiltrate'), b.x * 1024, b.y * 1024, b.w * 1024, b.h * 1024)
            for b in boxes.itertuples()
        ],
    )
    return tmp_path/'films'


def test_write_localisation_and_its_command(nih_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('CXRLG_CACHE', str(tmp_path/'cache'))
    study = write_study(tmp_path/'study', FOLDS, ('none', 'prox'), output_stride=8)
    t = write_localisation(study, nih_folder, nih_folder/'BBox_List_2017.csv', n_boot=50, progress=False)
    main(str(study), str(nih_folder), arm='prox', n_boot=50, tolerance=.05)
    out = capsys.readouterr().out
    assert '25 boxes on 12 films of 6 patients' in out and 'localisation.png' in out
    saved = pd.read_csv(study/'localisation.csv')
    assert saved.arm.tolist() == ['none']*len(t) + ['prox']*len(t) and saved.columns.tolist() == ['arm', *t.columns]
    np.testing.assert_allclose(saved.hit[:len(t)], t.hit, atol=1e-6)
    each = pd.read_csv(study/'localisation_films.csv', dtype={'patient': str})
    assert (
        set(each.arm) == {'none', 'prox'}
        and each.groupby('arm').boxes.sum().tolist() == [25, 25]
        and set(each.fold[each.patient == '1']) == {0}
    )
    assert Image.open(study/'localisation.png').size[0] > 500 and not list(study.glob('*.tmp-*'))
    write_localisation(
        study,
        nih_folder,
        read_boxes(nih_folder / 'BBox_List_2017.csv'),
        n_boot=50,
        progress=False,
        out_dir=tmp_path / 'elsewhere',
    )
    assert sorted(p.name for p in (tmp_path/'elsewhere').iterdir()) == ['localisation.csv', 'localisation.png', 'localisation_films.csv']
    main(str(study), str(nih_folder), arm='prox', n_boot=50)
    assert pd.read_csv(study/'localisation.csv').arm.tolist() == saved.arm.tolist()
    each.assign(patient='00' + each.patient).to_csv(study/'localisation_films.csv', index=False)
    main(str(study), str(nih_folder), arm='prox', n_boot=50)
    again = pd.read_csv(study/'localisation_films.csv', dtype={'patient': str})
    assert again.patient[again.arm == 'none'].str.startswith('00').all()
    (study/'localisation.csv').write_bytes(b'')
    with pytest.raises(SystemExit): main(str(study), str(nih_folder), arm='prox', n_boot=50)
    assert 'localisation.csv cannot be read' in capsys.readouterr().err


@pytest.mark.parametrize(
    'wrong, say',
    [
        (dict(boxes='lost.csv'), 'lost.csv cannot be read'),
        (dict(study_dir='nothing'), 'there is no study'),
        (dict(root='nowhere'), 'cannot be read'),
        (dict(arm='l1'), 'choose one of none, prox'),
        (dict(dataset='nhi'), 'did you mean'),
    ],
)
def test_command_refuses_in_one_line(study, nih_folder, tmp_path, monkeypatch, capsys, wrong, say):
    monkeypatch.setenv('CXRLG_CACHE', str(tmp_path/'cache'))
    with pytest.raises(SystemExit) as e: main(**dict(study_dir=str(study), root=str(nih_folder)) | wrong)
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and say in err[0] and not (study/'localisation.csv').exists()


def test_pictures(predictor, films):
    table, pixels, boxes = films
    fig = overlay_sheet(predictor, pixels, localise(predictor, table, pixels, boxes, verbose=False), most=3)
    assert len(fig.axes) == 9 and all(ax.patches for ax in fig.axes if ax.images)
    ax = plot_boxes(pixels[0], np.eye(4), [[.25, .25, .5, .5], [0, 0, .1, .1]], (.5, .5), 'title')
    assert (
        len(ax.patches) == 2
        and ax.patches[0].get_xy() == (15.5, 15.5)
        and ax.patches[0].get_width() == 32
        and ax.lines[0].get_xdata()[0] == 31.5
        and ax.patches[0].get_linestyle() == '-'
    )
    assert plot_boxes(pixels[0], None, [[.25, .25, .5, .5]], (.9, .9)).patches[0].get_linestyle() == '--'


# ---- films and boxes of one's own

@pytest.mark.parametrize('mode', ['squash', 'pad'])
def test_boxes_in_pixels_of_films_of_ones_own(tmp_path, monkeypatch, mode):
    monkeypatch.setenv('CXRLG_CACHE', str(tmp_path/'cache'))
    study, films = write_study(tmp_path/'study', FOLDS, output_stride=8), tmp_path/'films'
    for k in range(2):
        config = dict(data='csv', size=64, n_splits=2, data_args=dict(labels=LABELS, mode=mode, csv='mine.csv'))
        (study/f'none/seed1/fold{k}/config.json').write_text(json.dumps(config))
    films.mkdir()
    sizes = {'a.png': (120, 60), 'b.png': (50, 50), 'c.png': (40, 80)}
    for i, (name, (w, h)) in enumerate(sizes.items()):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w), dtype=np.uint8)).save(films / name)
    FOLDS[:3].assign(**dict.fromkeys(LABELS, 1)).drop(columns='fold').to_csv(films/'mine.csv', index=False)
    (tmp_path/'boxes.csv').write_text('image,finding,x,y,w,h\na.png,Mass,60,30,30,15\n./b.png ,Mass,10,20,5,10\nc,Effusion,20,40,10,20\n')
    main(str(study), str(films), str(tmp_path/'boxes.csv'), n_boot=20)
    found = localise_again(study, films, tmp_path/'boxes.csv', mode)
    squash = {'a.png': [.5, .5, .25, .25], 'b.png': [.2, .4, .1, .2], 'c.png': [.5, .5, .25, .25]}
    pad = squash | {'a.png': [.5, .5, .25, .125], 'c.png': [.5, .5, .125, .25]}
    for r in found.itertuples(): np.testing.assert_allclose(r.boxes[0], (pad if mode == 'pad' else squash)[r.image])
    saved = pd.read_csv(study/'localisation_films.csv')
    np.testing.assert_allclose(saved.chance, [room._mask(b).mean() for b in found.boxes], atol=1e-6)


def localise_again(study, films, boxes, mode):
    "What the command compares, from its parts"
    predictor = Predictor(study, verbose=False)
    table = read_table('csv', films, csv='mine.csv', labels=LABELS, verbose=False)
    boxes = room._shares(read_boxes(boxes, None), table, films, True, mode)
    return localise(predictor, table, PixelCache(table, films, 64, mode, progress=False), boxes, verbose=False)


def test_boxes_outside_the_films_own_size(tmp_path, films):
    Image.new('L', (30, 20)).save(tmp_path/'a.png')
    boxes = pd.DataFrame([('a.png', 'Mass', 31., 5., 4., 4.)], columns=['image', 'finding', 'x', 'y', 'w', 'h'])
    with pytest.raises(DataError, match='a box of a.png lies outside its 30 x 20 pixels: give the side'):
        room._shares(boxes, pd.DataFrame(dict(image=['a.png'])), tmp_path, True, 'squash')


def test_films_without_a_list_keep_the_patients_of_the_study(tmp_path, monkeypatch, capsys):
    "Boxes alone: films are found by name below the folder; one of the study is shown only to models that have not seen its patient"
    monkeypatch.setenv('CXRLG_CACHE', str(tmp_path/'cache'))
    study, films = write_study(tmp_path/'study', FOLDS, output_stride=8), tmp_path/'films'
    (films/'below').mkdir(parents=True)
    known = FOLDS[FOLDS.fold >= 0].iloc[0]
    for i, name in enumerate((Path(known.image).stem, 'new')):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 40), dtype=np.uint8)).save(films/'below'/f'{name}.png')
    (tmp_path/'boxes.csv').write_text(f'image,finding,x,y,w,h\n{known.image},Mass,4,5,20,10\nnew.png,Mass,10,5,20,10\n')
    main(str(study), str(films), str(tmp_path/'boxes.csv'), dataset='films', n_boot=20)
    saved = pd.read_csv(study/'localisation_films.csv', dtype=dict(patient=str)).set_index('patient')
    assert saved.fold.to_dict() == {str(known.patient): known.fold, 'new': -1}
    with pytest.raises(SystemExit): main(str(study), str(tmp_path/'study'), str(tmp_path/'boxes.csv'), dataset='films')
    assert 'holds none of the films that have boxes' in capsys.readouterr().err.splitlines()[-1]


CORNERS = ('x_min,y_min,x_max,y_max', 'xmin,ymin,xmax,ymax', 'x1,y1,x2,y2', 'left,top,right,bottom', 'xMin,yMin,xMax,yMax')
SIZES = ('x,y,w,h', 'x,y,width,height', 'left,top,width,height')


@pytest.mark.parametrize('sides', CORNERS + SIZES)
@pytest.mark.parametrize('about', ['image,finding', 'Image Index,Finding Label', 'file_name,label'])
def test_spellings_of_boxes(tmp_path, about, sides):
    (tmp_path/'b.csv').write_text(f'{about},{sides}\n007,A,{"10,20,40,60" if sides in CORNERS else "10,20,30,40"}\n')
    assert read_boxes(tmp_path/'b.csv', side=None).values.tolist() == [['007', 'A', 10, 20, 30, 40]]


@pytest.mark.parametrize('text,side,say', [
    ('image,finding,a,b,c,d\na.png,A,1,2,3,4', 48, 'name them image, finding, and x, y, w, h or x_min'),
    ('image,finding,x,y,w,h\na.png,A,.1,.1,.5,.5', None, 'holds shares of the film.s side, and pixels are expected: give side=1'),
    ('image,finding,x,y,w,h\na.png,A,10,10,2000,20', 48, r'row 2 is no box on a film of 48 pixels \(a.png, A, 10, 10, 2000, 20\)'),
    ('image,finding,x1,y1,x2,y2\na.png,A,10,10,5,20', 48, r'row 2 is no box on a film of 48 pixels \(a.png, A, 10, 10, 5, 20\)')])
def test_boxes_that_cannot_be_meant(tmp_path, text, side, say):
    (tmp_path/'b.csv').write_text(text + '\n')
    with pytest.raises(DataError, match=say) as e: read_boxes(tmp_path/'b.csv', side)
    assert '\n' not in str(e.value) and 'np.' not in str(e.value)


def test_shares_are_read_as_shares_when_asked(tmp_path):
    (tmp_path/'b.csv').write_text('image,finding,x,y,w,h\na.png,A,.1,.1,.5,.9\n')
    assert read_boxes(tmp_path/'b.csv', side=1)[['x', 'y', 'w', 'h']].values.tolist() == [[.1, .1, .5, .9]]


def test_boxes_in_pixels_are_no_shares(predictor, films):
    table, pixels, boxes = films
    for wrong, say in ((boxes.assign(x=boxes.x * 64), 'boxes are in pixels'), (boxes.drop(columns='w'), 'boxes lack columns w')):
        with pytest.raises(DataError, match=say): localise(predictor, table, pixels, wrong, verbose=False)


def test_one_patient_gives_no_interval():
    columns = dict(hit=1., chance=.2, mean_map=np.nan, mean_box=np.nan, iou=0., iou_mean_map=np.nan)
    found = pd.DataFrame([dict(finding='A', row=i, patient='p', boxes=np.zeros((1, 4)), **columns) for i in range(3)])
    t = hit_table(found, n_boot=50)
    assert (t.hit == 1).all() and t[['hit_low', 'hit_high', 'iou_low', 'iou_high']].isna().all(axis=None)
    with pytest.raises(DataError, match='level=95'): hit_table(found, level=95)
