"Tables: what is wrong is named, and what is large stays fast"
import gzip
import importlib.util
import io
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxrlg.core import DataError, labels_of
from cxrlg.data import CHEXPERT, audit, read_table
from cxrlg.eval import macro_auc
from cxrlg.films import PixelCache, read_film
from cxrlg.label_values import training_targets
from cxrlg.readers import years
from folders import GOOD, good, table, write_films, write_rows  # noqa: F401 (fixtures)


# ---- label files that are wrong: each gives one line that names what is wrong

def rows_case(*rows, header='image,patient,Edema,Mass', **options): return lambda r: (write_rows(r, rows, header), 'csv', GOOD | options)
def bytes_case(content, name='labels.csv', **options):
    def make(r):
        (r / name).write_bytes(content)
        return r, 'csv', GOOD | dict(csv=name) | options
    return make
def files_case(reader, files, **options):
    def make(r):
        for name, text in files.items():
            (r / name).parent.mkdir(parents=True, exist_ok=True)
            (r / name).write_bytes(text) if isinstance(text, bytes) else (r / name).write_text(text)
        return r, reader, options
    return make
def npz(**arrays):
    f = io.BytesIO()
    np.savez_compressed(f, **arrays)
    return f.getvalue()

ok, nih, chex, slam = (
    'f0.png,p0,0,1',
    'Image Index,Finding Labels,Patient ID',
    'Path,Sex,Age,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT),
    'Image_name,' + ','.join(CHEXPERT),
)
mnist = {f'{s}_labels': np.zeros((2, 14), 'uint8') for s in ('train', 'val', 'test')}
mimic_ids = 'subject_id,study_id,'
TABLES = {
    'missing folder': (lambda r: (r / 'nowhere', 'csv', GOOD), 'there is no folder'),
    'folder is a file': (lambda r: (r / 'f0.png', 'csv', GOOD), 'there is no folder'),
    'unknown reader': (lambda r: (r, 'nhi', {}), "no reader 'nhi'; did you mean 'nih'"),
    'unknown option': (lambda r: (r, 'csv', GOOD | dict(lables=['Mass'])), "no option 'lables'; did you mean 'labels'"),
    'missing csv': (lambda r: (r, 'csv', GOOD | dict(csv='lables.csv')), 'there is no file'),
    'csv is a folder': (lambda r: ((r / 'labels.csv').mkdir(), (r, 'csv', GOOD))[1], 'cannot be read'),
    'empty csv': (bytes_case(b''), 'labels.csv is empty'),
    'header without rows': (rows_case(), 'has a header and no rows'),
    'not UTF-8': (bytes_case('image,patient,Edema,Mass\nf0.png,Müller,0,1\n'.encode('latin-1')), 'is not UTF-8'),
    'UTF-16': (bytes_case('image,patient,Edema,Mass\nf0.png,p,0,1\n'.encode('utf-16')), 'is not UTF-8'),
    'semicolons': (rows_case('f0.png;p0;0;1', header='image;patient;Edema;Mass'), 'is not separated by commas'),
    'tabs': (rows_case('f0.png\tp0\t0\t1', header='image\tpatient\tEdema\tMass'), 'is not separated by commas'),
    'a cell too many in every row': (rows_case(ok + ',9'), 'has a broken row'),
    'a cell too many in one row': (rows_case(ok, 'f1.png,p0,0,1,9'), 'has a broken row'),
    'open quote': (rows_case('"f0.png,p0,0,1'), 'has a broken row'),
    'gzip truncated': (
        bytes_case(
            gzip.compress(b'image,patient,Edema,Mass\n' + os.urandom(3000).hex().encode())[:900], 'labels.csv.gz'
        ),
        'cannot be read',
    ),
    'gzip with a changed byte': (
        bytes_case(
            b''.join(
                bytes([b ^ (255 if i == 40 else 0)])
                for i, b in enumerate(gzip.compress(b'image,patient,Edema,Mass\n' + os.urandom(3000).hex().encode()))
            ),
            'labels.csv.gz',
        ),
        'cannot be read',
    ),
    'gzip only by name': (bytes_case(b'image,patient,Edema,Mass\n', 'labels.csv.gz'), 'cannot be read'),
    'missing column': (
        rows_case('f0.png,p0,0', header='image,patients,Edema', labels=['Edema']),
        "no column 'patient'; did you mean 'patients'",
    ),
    'column twice': (
        rows_case('f0.png,p0,0,1,0', header='image,patient,Edema,Mass,Mass'),
        "column 'Mass' is there twice",
    ),
    'misspelt finding': (rows_case(ok, labels=['Oedema']), "no column 'Oedema'; did you mean 'Edema'"),
    'findings as text': (rows_case(ok, labels='Mass'), 'needs the columns that are findings'),
    'no findings': (rows_case(ok, labels=[]), 'needs the columns that are findings'),
    'label 2': (rows_case(ok, 'f1.png,p0,2,0'), 'Edema is 2 for f1.png (row 1; 1 such rows)'),
    'label yes': (rows_case(ok, 'f1.png,p0,0,yes'), "Mass is 'yes' for f1.png (row 1"),
    'label 0.5': (rows_case(ok, 'f1.png,p0,0.5,0', 'f2.png,p0,0.5,0'), 'Edema is 0.5 for f1.png (row 1; 2 such rows)'),
    'label -2': (rows_case('f0.png,p0,-2,0'), 'Edema is -2'),
    'label inf': (rows_case('f0.png,p0,inf,0'), 'Edema is inf'),
    'mixed labels': (rows_case(ok, 'f1.png,p0,1.0,0', 'f2.png,p0,one,0'), "Edema is 'one' for f2.png"),
    'image blank': (rows_case(ok, ',p0,0,1'), 'image is blank in 1 rows (row 1)'),
    'patient NaN': (rows_case(ok, 'f1.png,,0,1', 'f2.png,nan,0,1'), 'patient is blank in 2 rows (row 1, 2)'),
    'duplicate rows': (rows_case(ok, ok), 'listed more than once (f0.png)'),
    'duplicate image, other labels': (rows_case(ok, 'f0.png,p0,1,1'), 'listed more than once (f0.png)'),
    'path leaves the root': (rows_case('../f0.png,p0,0,1'), '1 image paths leave the root (../f0.png)'),
    'path leaves the root inside': (rows_case('a/../../f0.png,p0,0,1'), 'leave the root'),
    'absolute path': (rows_case('/etc/f0.png,p0,0,1'), 'leave the root (/etc/f0.png)'),
    'drive letter': (rows_case('C:\\films\\f0.png,p0,0,1'), 'leave the root (C:/films/f0.png)'),
    'home folder': (rows_case('~/f0.png,p0,0,1'), 'leave the root'),
    'no film found': (rows_case('g0.png,p0,0,1'), 'none of the 1 films listed is under'),
    'a folder in front of every film': (
        rows_case('films/f0.png,p0,0,1'),
        'under another folder or suffix there is f0.png',
    ),
    'names without a suffix': (rows_case('f0,p0,0,1'), 'under another folder or suffix there is f0.png'),
    'unknown policy': (rows_case(ok, uncertain='one'), "uncertain='one' for Edema: choose 'ignore'"),
    'policy for a misspelt finding': (
        rows_case(ok, uncertain={'Oedema': 'ones'}),
        "lacks: 'Oedema'; did you mean 'Edema'",
    ),
    'nih: no list': (files_case('nih', {}), 'holds no file Data_Entry_2017*.csv'),
    'nih: two lists': (
        files_case('nih', {'Data_Entry_2017.csv': nih, 'Data_Entry_2017_v2020.csv': nih}),
        'holds 2 files',
    ),
    'nih: missing column': (
        files_case('nih', {'Data_Entry_2017.csv': 'Image Index,Finding Label,Patient ID\na.png,Mass,1\n'}),
        "no column 'Finding Labels'; did you mean 'Finding Label'",
    ),
    'nih: misspelt finding': (
        files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,Mass|Hernai,1\n'}),
        "unknown finding 'Hernai'; did you mean 'Hernia'",
    ),
    'nih: blank findings': (
        files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,,1\n'}),
        'not all filled in in 1 rows (row 0)',
    ),
    'nih: list that is no text': (
        files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,Mass,1\n', 'test_list.txt': b'\xff\xfe'}),
        'test_list.txt is not UTF-8',
    ),
    'nih: one stem twice': (
        files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.dcm,Mass,1\n', 'f0.jpg': 'x'}),
        'share their name with another (f0.jpg, f0.png)',
    ),
    'chexpert: nothing': (files_case('chexpert', {}), 'holds no train.csv or valid.csv'),
    'chexpert: other path': (
        files_case('chexpert', {'train.csv': chex + '\nf0.png,Male,60,Frontal,AP' + ',' * 14 + '\n'}),
        "Path is 'f0.png' in row 0",
    ),
    'chexpert: blank policy': (
        files_case(
            'chexpert',
            {'train.csv': chex + '\na/train/patient1/study1/v.jpg,Male,60,Frontal,AP' + ',' * 14 + '\n'},
            blank='zero',
        ),
        "blank='zero'",
    ),
    'chexpert: missing column': (files_case('chexpert', {'train.csv': 'Path,Edema\na,1\n'}), "no column 'No Finding'"),
    'slam: other name': (
        files_case('slam', {'train1.csv': slam + '\nf0.png' + ',0' * 14 + '\n'}),
        "Image_name is 'f0.png' in row 0",
    ),
    'slam: missing column': (files_case('slam', {'train1.csv': 'image,Edema\nf0.png,0\n'}), "no column 'Image_name'"),
    'chestmnist: truncated': (
        files_case('chestmnist', {'chestmnist.npz': npz(**mnist)[:400]}),
        'chestmnist.npz cannot be read',
    ),
    'chestmnist: no split': (
        files_case('chestmnist', {'chestmnist.npz': npz(train_labels=mnist['train_labels'])}),
        'holds no val_labels',
    ),
    'chestmnist: 13 labels': (
        files_case('chestmnist', {'chestmnist.npz': npz(**{k: v[:, 1:] for k, v in mnist.items()})}),
        'expected [n, 14]',
    ),
    'chestmnist: pickled': (
        files_case('chestmnist', {'chestmnist.npz': pickle.dumps({})}),
        'chestmnist.npz cannot be read',
    ),
    'mimic: no split': (files_case('mimic', {}), 'holds no file mimic-cxr-*-split.csv.gz'),
    'mimic: study twice': (
        files_case(
            'mimic',
            {
                'mimic-cxr-2.0.0-split.csv': mimic_ids + 'dicom_id,split\n1,2,a,train\n',
                'mimic-cxr-2.0.0-chexpert.csv': mimic_ids + ','.join(CHEXPERT) + ('\n1,2' + ',' * 14) * 2 + '\n',
            },
        ),
        'list study 2 more than once',
    ),
    'mimic: film twice': (
        files_case(
            'mimic',
            {
                'mimic-cxr-2.0.0-split.csv': mimic_ids + 'dicom_id,split\n1,2,a,train\n',
                'mimic-cxr-2.0.0-chexpert.csv': mimic_ids + ','.join(CHEXPERT) + '\n1,2' + ',' * 14 + '\n',
                'mimic-cxr-2.0.0-metadata.csv': mimic_ids + 'dicom_id,ViewPosition\n1,2,a,AP\n1,2,a,PA\n',
            },
        ),
        'list film a more than once',
    ),
    'padchest: a number': (
        files_case('padchest', {'PADCHEST.csv': 'ImageID,PatientID,Labels\nf0.png,1,5\n'}),
        "Labels is '5'",
    ),
    'padchest: a list of numbers': (
        files_case('padchest', {'PADCHEST.csv': 'ImageID,PatientID,Labels\nf0.png,1,[1]\n'}),
        "Labels is '[1]'",
    ),
    'padchest: not a list': (
        files_case('padchest', {'PADCHEST.csv': 'ImageID,PatientID,Labels\nf0.png,1,normal\n'}),
        "Labels is 'normal'",
    ),
    'padchest: unknown finding': (
        files_case('padchest', {'PADCHEST.csv': "ImageID,PatientID,Labels\nf0.png,1,['nodule']\n"}, labels=['nodules']),
        "unknown finding 'nodules'; did you mean 'nodule'",
    ),
    'padchest: rare': (
        files_case('padchest', {'PADCHEST.csv': "ImageID,PatientID,Labels\nf0.png,1,['nodule']\n"}),
        'lower min_films',
    ),
    'vindr: blank class': (
        files_case('vindr', {'train.csv': 'image_id,class_name,rad_id\nf0,Mass,R1\nf1,,R1\n'}),
        'not filled in in 1 rows (row 1)',
    ),
    'vindr: no class': (files_case('vindr', {'train.csv': 'image_id,rad_id\na,R1\n'}), "no column 'class_name'"),
}


@pytest.mark.parametrize('name', TABLES)
def test_wrong_tables(good, name):
    make, message = TABLES[name]
    if make.__qualname__.startswith('files_case'): (good / 'labels.csv').unlink()
    if name == 'csv is a folder': (good / 'labels.csv').unlink()
    root, reader, options = make(good)
    with pytest.raises(DataError) as e: read_table(reader, root, verbose=False, **options)
    assert message in str(e.value) and '\n' not in str(e.value).strip()


# ---- tables that are right

def test_extra_columns_bom_crlf_and_windows_paths(good):
    (good / 'sub').mkdir()
    shutil.move(good / 'f0.png', good / 'sub' / 'f0.png')
    (good / 'labels.csv').write_bytes('\ufeffimage,patient,Edema,Mass,note\r\nsub\\f0.png,007,1,,"a, b"\r\nf9.png,008,0,1,\r\n'.encode())
    table = read_table('csv', good, verbose=False, **GOOD)
    assert table.image.tolist() == ['sub/f0.png'] and table.patient.tolist() == ['007'] and table.attrs['left_out'] == 1
    assert table.Edema.tolist() == [1] and table.Mass.isna().all() and table.dtypes['Mass'] == 'float32'


def test_uncertain_policies(good):
    write_rows(good, [f'f{i}.png,p,{v},-1' for i, v in enumerate([1, 0, -1, ''])])
    read = lambda u: read_table('csv', good, uncertain=u, verbose=False, **GOOD)[['Edema', 'Mass']].fillna(9).to_numpy().T.tolist()
    assert read('ignore') == [[1, 0, 9, 9], [9, 9, 9, 9]]
    assert read('zeros') == [[1, 0, 0, 9], [0, 0, 0, 0]]
    assert read({'Edema': 'ones'}) == [[1, 0, 1, 9], [9, 9, 9, 9]]
    assert read('soft') == read('ignore')


@pytest.mark.parametrize('policy, edema, mass', [
    ('ignore', [1, 0, 9, 9], [9, 9, 9, 9]),
    ('zeros', [1, 0, 0, 9], [0, 0, 0, 0]),
    ('ones', [1, 0, 1, 9], [1, 1, 1, 1]),
    ('soft', [1, 0, .7, 9], [.7, .7, .7, .7]),
    ({'Edema': 'soft', 'Mass': 'zeros'}, [1, 0, .7, 9], [0, 0, 0, 0]),
])
def test_definite_labels_are_judged_and_the_policy_trains(good, policy, edema, mass):
    write_rows(good, [f'f{i}.png,p,{v},-1' for i, v in enumerate([1, 0, -1, ''])])
    table = read_table('csv', good, uncertain=policy, definite=True, verbose=False, **GOOD)
    assert table[['Edema', 'Mass']].fillna(9).to_numpy().T.tolist() == [[1, 0, 9, 9], [9, 9, 9, 9]]
    assert training_targets(table).fillna(9).round(6).to_numpy().T.tolist() == pytest.approx(np.array([edema, mass]))
    assert labels_of(table) == ['Edema', 'Mass'] and (policy == 'ignore') == (not any(c.startswith('train:') for c in table))


def test_a_soft_finding_among_others_is_unknown_when_judged(good):
    write_rows(good, ['f0.png,p,-1,-1', 'f1.png,q,1,0'])
    table = read_table('csv', good, uncertain={'Edema': 'soft', 'Mass': 'zeros'}, verbose=False, **GOOD)
    assert table[['Edema', 'Mass', 'train:Edema']].fillna(9).round(6).to_numpy().tolist() == [[9, 0, pytest.approx(.7)], [1, 0, 1]]
    assert 'train:Mass' not in table
    with pytest.raises(DataError, match='only 0, 1 and NaN are allowed'): macro_auc(training_targets(table).to_numpy(), np.zeros((2, 2)))


def test_line_says_what_was_left_out(good, capsys):
    write_rows(good, ['f0.png,p0,0,-1', 'f1.png,p0,0,1', 'f7.png,p1,1,1'])
    read_table('csv', good, **GOOD)
    assert (
        capsys.readouterr().out
        == 'csv: 2 films of 1 patients, 2 findings, 1 uncertain labels; left out 1 listed films that are not there\n'
    )


@pytest.mark.filterwarnings('ignore:1 ages cannot be read')
def test_ages():
    assert np.allclose(
        years(pd.Series(['058Y', 58, '006M', '0014D', '2W', None, 'x'], dtype=object)),
        [58, 58, 0.5, 14 / 365.25, 2 / 52.18, np.nan, np.nan],
        equal_nan=True,
    )


def test_mimic(tmp_path):
    head = mimic_ids + ','.join(CHEXPERT)
    (tmp_path / 'mimic-cxr-2.0.0-split.csv').write_text(
        'dicom_id,study_id,subject_id,split\nabc-1,500,10000032,train\ndef-2,501,10000032,validate\nghi-3,502,11000000,test\n'
    )
    (tmp_path / 'mimic-cxr-2.0.0-metadata.csv').write_text(
        'dicom_id,subject_id,study_id,ViewPosition\nabc-1,10000032,500,PA\ndef-2,10000032,501,LATERAL\n'
    )
    for labeler, value in dict(chexpert=1.0, negbio=-1.0).items():
        (tmp_path / f'mimic-cxr-2.0.0-{labeler}.csv').write_text(
            f'{head}\n10000032,500,{value}' + ',' * 13 + '\n10000032,501,,,1.0' + ',' * 11 + '\n'
        )
    t = read_table('mimic', tmp_path, exists=False, verbose=False)
    assert (
        t.image[0] == 'files/p10/p10000032/s500/abc-1.jpg'
        and t.split.tolist() == ['train', 'valid', 'test']
        and t['view'].tolist()[:2] == ['PA', 'LATERAL']
    )
    assert t.loc[0, CHEXPERT].fillna(9).tolist() == [1] + [0] * 12 + [9] and t.loc[1, 'No Finding'] == 0 and t.loc[2, CHEXPERT].isna().all()
    assert read_table('mimic', tmp_path, exists=False, labeler='negbio', uncertain='ones', verbose=False)['No Finding'].tolist()[0] == 1


def test_a_sex_or_a_year_that_is_missing_everywhere(tmp_path):
    write_films(tmp_path / 'train/patient1/study1', ['v.jpg'])
    (tmp_path / 'train.csv').write_text(chex + '\ntrain/patient1/study1/v.jpg,,60,Frontal,AP' + ',' * 14 + '\n')
    assert 'sex' not in read_table('chexpert', tmp_path, verbose=False)
    write_films(tmp_path, ['f0.png'])
    (tmp_path / 'PADCHEST.csv').write_text("ImageID,PatientID,Labels,StudyDate_DICOM,PatientBirth\nf0.png,1,['nodule'],20100101,l960\n")
    assert 'age' not in read_table('padchest', tmp_path, verbose=False, min_films=1)


# ---- real label tables, complete

@pytest.fixture(scope='module')
def real():
    spec = importlib.util.find_spec('torchxrayvision')
    if spec is None: pytest.skip('the label tables come with torchxrayvision: pip install torchxrayvision')
    return Path(spec.submodule_search_locations[0]) / 'data'


def test_nih_full_size(real, tmp_path):
    t, raw = read_table(
        'nih', tmp_path, csv=real / 'Data_Entry_2017_v2020.csv.gz', exists=False, no_finding=True, verbose=False
    ), pd.read_csv(real / 'Data_Entry_2017_v2020.csv.gz')
    assert (len(t), t.patient.nunique(), len(labels_of(t))) == (112120, 30805, 15)
    for c in labels_of(t): assert t[c].sum() == raw['Finding Labels'].str.contains(rf'(?:^|\|){c}(?:\||$)').sum()
    assert (t.Hernia.sum(), t['No Finding'].sum(), t.age.max()) == (227, 60361, raw['Patient Age'].max())


def test_chexpert_full_size(real, tmp_path):
    raw = pd.read_csv(real / 'chexpert_train.csv.gz')
    t = {
        b: read_table('chexpert', tmp_path, csv=real / 'chexpert_train.csv.gz', exists=False, blank=b, verbose=False)
        for b in ('absent', 'unknown')
    }
    assert (len(t['absent']), t['absent'].patient.nunique(), labels_of(t['absent'])) == (223414, 64540, CHEXPERT)
    for c in CHEXPERT:
        assert (t['absent'][c] == 1).sum() == (raw[c] == 1).sum() and t['absent'][c].isna().sum() == (raw[c] == -1).sum()
        if c != 'No Finding':
            assert (t['unknown'][c] == 0).sum() == (
                (raw[c] == 0) | (raw[c].isna() & (raw['No Finding'] == 1) & (c != 'Support Devices'))
            ).sum()
    assert t['absent']['view'].value_counts()['L'] == (raw['Frontal/Lateral'] == 'Lateral').sum()
    ones = read_table('chexpert', tmp_path, csv=real / 'chexpert_train.csv.gz', exists=False, uncertain='ones', verbose=False)
    assert ones.Edema.sum() == (raw.Edema.abs() == 1).sum() and not ones[CHEXPERT].isna().any().any()


def test_padchest_full_size(real, tmp_path):
    path = real / 'PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz'
    t, raw = read_table('padchest', tmp_path, csv=path, exists=False, verbose=False), pd.read_csv(
        path, low_memory=False, usecols=['Labels', 'PatientID']
    )
    assert (len(t), t.patient.nunique(), labels_of(t)[:3]) == (160861, 67625, ['normal', 'COPD signs', 'cardiomegaly'])
    unknown = raw.Labels.isna() | raw.Labels.str.contains("' *exclude *'")
    assert (t.cardiomegaly.isna() == unknown).all()
    for c in ('cardiomegaly', 'nodule', 'pacemaker'): assert t[c].sum() == (raw.Labels.str.contains(f"' *{c} *'") & ~unknown).sum()


def test_vindr_full_size(real, tmp_path):
    path = real / 'vinbigdata-train.csv.gz'
    raw = pd.read_csv(path).drop_duplicates(['image_id', 'class_name', 'rad_id']).value_counts(['class_name', 'image_id'])
    t = read_table('vindr', tmp_path, csv=path, exists=False, verbose=False)
    assert len(t) == 15000 and len(labels_of(t)) == 15
    for c in labels_of(t): assert (t[c].sum(), t[c].isna().sum()) == ((raw[c] >= 2).sum(), (raw[c] == 1).sum())


def test_slam_at_size(tmp_path):
    rng, n = np.random.default_rng(0), 107_374
    df = pd.DataFrame(rng.integers(0, 2, (n, 14)), columns=CHEXPERT)
    df.insert(0, 'Image_name', [f'{i//3:08}_{i%3:03}_001.jpg' for i in range(n)])
    df.to_csv(tmp_path / 'train1.csv', index=False)
    t = read_table('slam', tmp_path, exists=False, verbose=False)
    assert len(t) == n and t.patient.nunique() == -(-n // 3) and (t[CHEXPERT].to_numpy() == df[CHEXPERT].to_numpy()).all()


# ---- audit

def checks(problems): return dict(zip(problems.check, problems.rows))


def test_audit_of_labels_and_ids(table):
    t = table.assign(
        Edema=table.Edema.astype(object),
        age=[40, 50, -3, 60, 200, 70.0],
        split=['train', 'test', 'train', 'train', 'test', 'test'],
    )
    t.attrs = table.attrs
    t.loc[2, 'Edema'], t.loc[5, 'image'] = 2, 'f4.png'
    found = audit(t, verbose=False)
    got = checks(found)
    assert (
        got['label values'] == [2]
        and got['image twice, other labels'] == [4, 5]
        and got['age'] == [2, 4]
        and got['patient in both splits'] == [0]
    )
    assert got['no positive'] == [0, 1, 2, 3, 4, 5] and found.severity.tolist() == sorted(
        found.severity, key=['fatal', 'warning', 'note'].index
    )
    assert 'audit of 6 films: 3 fatal' in found.attrs['summary']


def test_audit_of_no_finding_beside_a_finding_and_of_blank_patients(table):
    t = table.rename(columns=dict(Mass='No Finding')).assign(**{'No Finding': 1., 'patient': ['a', None, 'a', 'b', 'b', ' ']})
    t.attrs['labels'] = ['Edema', 'No Finding']
    got = checks(audit(t, verbose=False))
    assert got['contradiction'] == [1, 3, 5] and got['patient blank'] == [1, 5] and got['no negative'] == list(range(6))


def test_audit_of_films(good, table, tmp_path):
    (good / 'f0.png').unlink()
    (good / 'f1.png').write_bytes((good / 'f1.png').read_bytes()[:500])
    (good / 'f2.png').write_text('not a film')
    Image.new('L', (30, 30), 128).save(good / 'f3.png')
    Image.open(good / 'f4.png').convert('RGB').save(good / 'f5.png')
    problems = audit(table, good, read=read_film, picture=tmp_path / 'odd.png', verbose=False, progress=False)
    got = checks(problems)
    assert (got['missing film'], got['unreadable film'], got['nearly constant film']) == ([0], [2], [3]) and got['truncated film'] == [1]
    assert got['same picture, other labels'] == [4, 5] and (problems.severity == 'fatal').sum() == 3
    assert Image.open(tmp_path / 'odd.png').size[0] == 900


def test_audit_finds_nothing_in_good_films_and_writes_nothing(good, table, capsys):
    before = sorted(good.iterdir())
    found = audit(table.assign(Mass=[0, 1, 0, 1, 0, 1.]), good, read=read_film, progress=False)
    assert (
        not len(found)
        and capsys.readouterr().out == 'audit of 6 films: 0 fatal, 0 warning, 0 note\n'
        and sorted(good.iterdir()) == before
    )


# ---- real films

def test_nih128(films):
    t = read_table('nih', films / 'nih128', verbose=False)
    assert (len(t), t.patient.nunique(), t.attrs['left_out'], t.Hernia.sum()) == (7709, 2000, 104411, 17)
    assert t.split.value_counts().to_dict() == dict(train=6363, test=1346) and not set(
        t.patient[t.split == 'test']
    ) & set(t.patient[t.split == 'train'])


def test_nih256_by_stem_and_no_fatal_problem(films, tmp_path):
    t = read_table('nih', films / 'nih256', verbose=False)
    assert len(t) == 1575 and t.image.str.endswith('.jpg').all()
    t = t.iloc[:300].reset_index(drop=True)
    px = PixelCache(t, films / 'nih256', 64, cache_dir=tmp_path, progress=False)
    assert px[:].std() > 30 and not (audit(t, films / 'nih256', read=read_film, verbose=False, progress=False).severity == 'fatal').any()


def test_a_list_beside_the_films_folder_is_told_how_to_be_given(tmp_path):
    "The commonest layout: a list, and the films in a folder beside it"
    films = tmp_path / 'images'
    films.mkdir()
    Image.new('L', (8, 8)).save(films / 'f0.png')
    (tmp_path / 'labels.csv').write_text('file,patient,Edema\nf0.png,1,0\n')
    how = dict(image='file', patient='patient', labels=['Edema'])
    with pytest.raises(
        DataError,
        match=r'images/f0.png; list it so, or give .*/images as the folder of the films, and the list by its full path',
    ):
        read_table('csv', tmp_path, **how)
    with pytest.raises(DataError, match=r'there is one in .*: give its full path, csv: .*/labels.csv'): read_table('csv', films, **how)
    assert list(read_table('csv', films, csv=str(tmp_path / 'labels.csv'), **how).image) == ['f0.png']


def test_studies_whose_films_have_other_labels_are_noted():
    y = dict(Edema=[1., 0, 1, np.nan, 0], Mass=[0., 0, 0, 0, 1])
    films = pd.DataFrame(dict(image=[f'{i}.png' for i in range(5)], patient=list('aabbb'), study=['1', '1', '1', '1', None]) | y)
    films.attrs['labels'] = ['Edema', 'Mass']
    found = audit(films, verbose=False).set_index('check')
    assert found.rows['study with other labels'] == [0, 1] and 'a/1' in found.what['study with other labels']
    assert 'study with other labels' not in audit(films.drop(columns='study'), verbose=False).check.tolist()


def test_lateral_films_among_frontal_ones_are_named():
    views = ['PA', 'L', 'AP', 'LATERAL', 'lateral', 'LL', 'LLD decubitus', None, ' AP_horizontal']
    table = pd.DataFrame(dict(image=[f'{i}.png' for i in range(9)], patient=list('abcdefghi'), view=views, Edema=[0, 1] * 4 + [1]))
    table.attrs['labels'] = ['Edema']
    row = audit(table, verbose=False).set_index('check').loc['lateral film among frontal ones']
    assert row.rows == [1, 3, 4, 5] and row.severity == 'note' and 'views: [AP, AP_horizontal, LLD decubitus, PA]' in row['do']
    for same in ('PA', 'L'):
        assert 'lateral film among frontal ones' not in audit(table.assign(view=same), verbose=False).check.tolist()


def test_an_audit_of_films_that_all_show_nothing_ends(tmp_path):
    for name in 'ab': Image.new('L', (20, 20), 90).save(tmp_path/f'{name}.png')
    table = pd.DataFrame(dict(image=['a.png', 'b.png'], patient=['1', '2'], A=[1., 0.]))
    table.attrs['labels'] = ['A']
    assert 'nearly constant film' in set(audit(table, tmp_path, progress=False, verbose=False).check)


@pytest.mark.parametrize('sep', [';', '\t'])
def test_cells_that_are_not_parted_by_commas_are_read_when_it_is_said(good, sep):
    rows = ['image,patient,age,Edema,Mass', 'f0.png,NA,"58,5",0,1', 'f1.png,007,60,1,']
    (good/'labels.csv').write_text('\n'.join(rows).replace('"58,5"', '58§5').replace(',', sep).replace('§', ',' if sep == ';' else '.'))
    t = read_table('csv', good, **GOOD, age='age', sep=sep, verbose=False)
    assert t.patient.tolist() == ['NA', '007'] and t.age.tolist() == [58.5, 60]
    assert t.Mass.fillna(-9).tolist() == [1, -9]
    for wrong, told in {None: f'give sep={sep!r}', ',': f'give sep={sep!r}', '|': 'cells are separated by'}.items():
        with pytest.raises(DataError, match=re.escape(told) if wrong != ',' else 'save it as comma-separated CSV'):
            read_table('csv', good, **GOOD, sep=wrong, verbose=False)
