"Films and tables: what is wrong is named, what is large stays fast, what was ended goes on"
import gzip, importlib.util, io, math, os, pickle, shutil, signal, struct, subprocess, sys, threading, zlib
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

import cxrlg.data as data
from cxrlg.data import CHEXPERT, NIH, DataError, PixelCache, atomic_write, audit, fold_dls, labels_of, read_film, read_table

GOOD = dict(image='image', patient='patient', labels=['Edema', 'Mass'])


def write_films(root, names, size=(40, 32), seed=0):
    "Small films of noise"
    rng = np.random.default_rng(seed)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, size[::-1], dtype='uint8')).save(root / name)


def write_rows(root, rows, header='image,patient,Edema,Mass'):
    (root / 'labels.csv').write_text('\n'.join([header, *rows]) + '\n')
    return root


@pytest.fixture
def good(tmp_path):
    "Six films of three patients"
    write_films(tmp_path, [f'f{i}.png' for i in range(6)])
    return write_rows(tmp_path, [f'f{i}.png,p{i//2},{i%2},0' for i in range(6)])


@pytest.fixture
def table(good): return read_table('csv', good, verbose=False, **GOOD)


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

ok, nih, chex, slam = 'f0.png,p0,0,1', 'Image Index,Finding Labels,Patient ID', 'Path,Sex,Age,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT), 'Image_name,' + ','.join(CHEXPERT)
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
    'gzip truncated': (bytes_case(gzip.compress(b'image,patient,Edema,Mass\n' + os.urandom(3000).hex().encode())[:900], 'labels.csv.gz'), 'cannot be read'),
    'gzip with a changed byte': (bytes_case(b''.join(bytes([b ^ (255 if i == 40 else 0)]) for i, b in enumerate(gzip.compress(b'image,patient,Edema,Mass\n' + os.urandom(3000).hex().encode()))), 'labels.csv.gz'), 'cannot be read'),
    'gzip only by name': (bytes_case(b'image,patient,Edema,Mass\n', 'labels.csv.gz'), 'cannot be read'),
    'missing column': (rows_case('f0.png,p0,0', header='image,patients,Edema', labels=['Edema']), "no column 'patient'; did you mean 'patients'"),
    'column twice': (rows_case('f0.png,p0,0,1,0', header='image,patient,Edema,Mass,Mass'), "column 'Mass' is there twice"),
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
    'a folder in front of every film': (rows_case('films/f0.png,p0,0,1'), 'under another folder or suffix there is f0.png'),
    'names without a suffix': (rows_case('f0,p0,0,1'), 'under another folder or suffix there is f0.png'),
    'unknown policy': (rows_case(ok, uncertain='one'), "uncertain='one' for Edema: choose 'ignore'"),
    'policy for a misspelt finding': (rows_case(ok, uncertain={'Oedema': 'ones'}), "lacks: 'Oedema'; did you mean 'Edema'"),
    'nih: no list': (files_case('nih', {}), 'holds no file Data_Entry_2017*.csv'),
    'nih: two lists': (files_case('nih', {'Data_Entry_2017.csv': nih, 'Data_Entry_2017_v2020.csv': nih}), 'holds 2 files'),
    'nih: missing column': (files_case('nih', {'Data_Entry_2017.csv': 'Image Index,Finding Label,Patient ID\na.png,Mass,1\n'}), "no column 'Finding Labels'; did you mean 'Finding Label'"),
    'nih: misspelt finding': (files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,Mass|Hernai,1\n'}), "unknown finding 'Hernai'; did you mean 'Hernia'"),
    'nih: blank findings': (files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,,1\n'}), 'not all filled in in 1 rows (row 0)'),
    'nih: list that is no text': (files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,Mass,1\n', 'test_list.txt': b'\xff\xfe'}), 'test_list.txt is not UTF-8'),
    'nih: one stem twice': (files_case('nih', {'Data_Entry_2017.csv': nih + '\nf0.png,Mass,1\n', 'f0.jpg': 'x'}), 'share their name with another (f0.jpg, f0.png)'),
    'chexpert: nothing': (files_case('chexpert', {}), 'holds no train.csv or valid.csv'),
    'chexpert: other path': (files_case('chexpert', {'train.csv': chex + '\nf0.png,Male,60,Frontal,AP' + ',' * 14 + '\n'}), "Path is 'f0.png' in row 0"),
    'chexpert: blank policy': (files_case('chexpert', {'train.csv': chex + '\na/train/patient1/study1/v.jpg,Male,60,Frontal,AP' + ',' * 14 + '\n'}, blank='zero'), "blank='zero'"),
    'chexpert: missing column': (files_case('chexpert', {'train.csv': 'Path,Edema\na,1\n'}), "no column 'No Finding'"),
    'slam: other name': (files_case('slam', {'train1.csv': slam + '\nf0.png' + ',0' * 14 + '\n'}), "Image_name is 'f0.png' in row 0"),
    'slam: missing column': (files_case('slam', {'train1.csv': 'image,Edema\nf0.png,0\n'}), "no column 'Image_name'"),
    'chestmnist: truncated': (files_case('chestmnist', {'chestmnist.npz': npz(**mnist)[:400]}), 'chestmnist.npz cannot be read'),
    'chestmnist: no split': (files_case('chestmnist', {'chestmnist.npz': npz(train_labels=mnist['train_labels'])}), 'holds no val_labels'),
    'chestmnist: 13 labels': (files_case('chestmnist', {'chestmnist.npz': npz(**{k: v[:, 1:] for k, v in mnist.items()})}), 'expected [n, 14]'),
    'chestmnist: pickled': (files_case('chestmnist', {'chestmnist.npz': pickle.dumps({})}), 'chestmnist.npz cannot be read'),
    'mimic: no split': (files_case('mimic', {}), 'holds no file mimic-cxr-*-split.csv.gz'),
    'mimic: study twice': (files_case('mimic', {'mimic-cxr-2.0.0-split.csv': mimic_ids + 'dicom_id,split\n1,2,a,train\n',
                                                'mimic-cxr-2.0.0-chexpert.csv': mimic_ids + ','.join(CHEXPERT) + ('\n1,2' + ',' * 14) * 2 + '\n'}), 'list study 2 more than once'),
    'mimic: film twice': (files_case('mimic', {'mimic-cxr-2.0.0-split.csv': mimic_ids + 'dicom_id,split\n1,2,a,train\n', 'mimic-cxr-2.0.0-chexpert.csv': mimic_ids + ','.join(CHEXPERT) + '\n1,2' + ',' * 14 + '\n',
                                               'mimic-cxr-2.0.0-metadata.csv': mimic_ids + 'dicom_id,ViewPosition\n1,2,a,AP\n1,2,a,PA\n'}), 'list film a more than once'),
    'padchest: a number': (files_case('padchest', {'PADCHEST.csv': 'ImageID,PatientID,Labels\nf0.png,1,5\n'}), "Labels is '5'"),
    'padchest: a list of numbers': (files_case('padchest', {'PADCHEST.csv': 'ImageID,PatientID,Labels\nf0.png,1,[1]\n'}), "Labels is '[1]'"),
    'padchest: not a list': (files_case('padchest', {'PADCHEST.csv': 'ImageID,PatientID,Labels\nf0.png,1,normal\n'}), "Labels is 'normal'"),
    'padchest: unknown finding': (files_case('padchest', {'PADCHEST.csv': "ImageID,PatientID,Labels\nf0.png,1,['nodule']\n"}, labels=['nodules']), "unknown finding 'nodules'; did you mean 'nodule'"),
    'padchest: rare': (files_case('padchest', {'PADCHEST.csv': "ImageID,PatientID,Labels\nf0.png,1,['nodule']\n"}), 'lower min_films'),
    'vindr: blank class': (files_case('vindr', {'train.csv': 'image_id,class_name,rad_id\nf0,Mass,R1\nf1,,R1\n'}), 'not filled in in 1 rows (row 1)'),
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


def test_line_says_what_was_left_out(good, capsys):
    write_rows(good, ['f0.png,p0,0,-1', 'f1.png,p0,0,1', 'f7.png,p1,1,1'])
    read_table('csv', good, **GOOD)
    assert capsys.readouterr().out == 'csv: 2 films of 1 patients, 2 findings, 1 uncertain labels; left out 1 listed films that are not there\n'


def test_ages():
    assert np.allclose(data._years(pd.Series(['058Y', 58, '006M', '0014D', '2W', None, 'x'], dtype=object)), [58, 58, .5, 14 / 365.25, 2 / 52.18, np.nan, np.nan], equal_nan=True)


def test_labels_survive_a_mask_or_come_from_the_columns(table):
    assert labels_of(table[table.Edema == 1].reset_index(drop=True)) == ['Edema', 'Mass'] == labels_of(pd.DataFrame(table.to_dict()))


def test_mimic(tmp_path):
    head = mimic_ids + ','.join(CHEXPERT)
    (tmp_path / 'mimic-cxr-2.0.0-split.csv').write_text('dicom_id,study_id,subject_id,split\nabc-1,500,10000032,train\ndef-2,501,10000032,validate\nghi-3,502,11000000,test\n')
    (tmp_path / 'mimic-cxr-2.0.0-metadata.csv').write_text('dicom_id,subject_id,study_id,ViewPosition\nabc-1,10000032,500,PA\ndef-2,10000032,501,LATERAL\n')
    for labeler, value in dict(chexpert=1.0, negbio=-1.0).items():
        (tmp_path / f'mimic-cxr-2.0.0-{labeler}.csv').write_text(f'{head}\n10000032,500,{value}' + ',' * 13 + '\n10000032,501,,,1.0' + ',' * 11 + '\n')
    t = read_table('mimic', tmp_path, exists=False, verbose=False)
    assert t.image[0] == 'files/p10/p10000032/s500/abc-1.jpg' and t.split.tolist() == ['train', 'valid', 'test'] and t['view'].tolist()[:2] == ['PA', 'LATERAL']
    assert t.loc[0, CHEXPERT].fillna(9).tolist() == [1] + [0] * 12 + [9] and t.loc[1, 'No Finding'] == 0 and t.loc[2, CHEXPERT].isna().all()
    assert read_table('mimic', tmp_path, exists=False, labeler='negbio', uncertain='ones', verbose=False)['No Finding'].tolist()[0] == 1


# ---- real label tables, complete

@pytest.fixture(scope='module')
def real():
    spec = importlib.util.find_spec('torchxrayvision')
    if spec is None: pytest.skip('the label tables come with torchxrayvision: pip install torchxrayvision')
    return Path(spec.submodule_search_locations[0]) / 'data'


def test_nih_full_size(real, tmp_path):
    t, raw = read_table('nih', tmp_path, csv=real / 'Data_Entry_2017_v2020.csv.gz', exists=False, no_finding=True, verbose=False), pd.read_csv(real / 'Data_Entry_2017_v2020.csv.gz')
    assert (len(t), t.patient.nunique(), len(labels_of(t))) == (112120, 30805, 15)
    for c in labels_of(t): assert t[c].sum() == raw['Finding Labels'].str.contains(rf'(?:^|\|){c}(?:\||$)').sum()
    assert (t.Hernia.sum(), t['No Finding'].sum(), t.age.max()) == (227, 60361, raw['Patient Age'].max())


def test_chexpert_full_size(real, tmp_path):
    raw = pd.read_csv(real / 'chexpert_train.csv.gz')
    t = {b: read_table('chexpert', tmp_path, csv=real / 'chexpert_train.csv.gz', exists=False, blank=b, verbose=False) for b in ('absent', 'unknown')}
    assert (len(t['absent']), t['absent'].patient.nunique(), labels_of(t['absent'])) == (223414, 64540, CHEXPERT)
    for c in CHEXPERT:
        assert (t['absent'][c] == 1).sum() == (raw[c] == 1).sum() and t['absent'][c].isna().sum() == (raw[c] == -1).sum()
        if c != 'No Finding': assert (t['unknown'][c] == 0).sum() == ((raw[c] == 0) | (raw[c].isna() & (raw['No Finding'] == 1) & (c != 'Support Devices'))).sum()
    assert t['absent']['view'].value_counts()['L'] == (raw['Frontal/Lateral'] == 'Lateral').sum()
    ones = read_table('chexpert', tmp_path, csv=real / 'chexpert_train.csv.gz', exists=False, uncertain='ones', verbose=False)
    assert ones.Edema.sum() == (raw.Edema.abs() == 1).sum() and not ones[CHEXPERT].isna().any().any()


def test_padchest_full_size(real, tmp_path):
    path = real / 'PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz'
    t, raw = read_table('padchest', tmp_path, csv=path, exists=False, verbose=False), pd.read_csv(path, low_memory=False, usecols=['Labels', 'PatientID'])
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


# ---- films in every format

def png16(a, bits=16):
    "A PNG of 16 bits and 1 to 4 channels"
    raw = b''.join(b'\0' + r.astype('>u2').tobytes() for r in a)
    part = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
    head = struct.pack('>IIBBBBB', a.shape[1], a.shape[0], 16, {1: 0, 2: 4, 3: 2, 4: 6}[a.shape[2]], 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + part(b'IHDR', head) + part(b'IDAT', zlib.compress(raw)) + part(b'IEND', b'')


def ramp(h=64, w=64): return np.linspace(0, 255, h * w).reshape(h, w).round().astype('uint8')


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P', 'LA', 'I;16', 'CMYK', 'progressive', 'YCbCr'])
def test_modes_agree_with_the_grey_film(tmp_path, mode):
    grey, path = Image.fromarray(ramp()), tmp_path / ('f.jpg' if mode in ('CMYK', 'progressive', 'YCbCr') else 'f.png')
    if mode == 'I;16': Image.fromarray(ramp().astype('uint16') * 16).save(path)
    elif mode == 'progressive': grey.save(path, quality=100, progressive=True)
    elif mode in ('CMYK', 'YCbCr'): grey.convert('RGB').convert(mode).save(path, quality=100)
    else: grey.convert(mode).save(path)
    assert np.abs(read_film(path, 64).astype(int) - ramp()).max() <= 3


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_twelve_bits_in_sixteen_keep_their_contrast(tmp_path, channels):
    a = np.repeat(np.linspace(0, 4095, 64 * 64).round().astype('uint16').reshape(64, 64, 1), channels, 2)
    if channels in (2, 4): a[..., -1] = 65535
    (tmp_path / 'f.png').write_bytes(png16(a))
    film = read_film(tmp_path / 'f.png', 64)
    assert len(np.unique(film)) > 250 and np.abs(film.astype(int) - ramp()).max() <= 3


def test_one_bit_and_transparent(tmp_path):
    Image.fromarray(ramp() > 127).save(tmp_path / 'bit.png')
    assert set(np.unique(read_film(tmp_path / 'bit.png', 64))) == {0, 255}
    a = np.dstack([np.full((64, 64, 3), 200, 'uint8'), np.where(np.arange(64) < 32, 255, 0)[None].repeat(64, 0).astype('uint8')])
    Image.fromarray(a).save(tmp_path / 'alpha.png')
    film = read_film(tmp_path / 'alpha.png', 64)
    assert (film[:, :32] == 200).all() and (film[:, 32:] == 0).all()


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(ramp(48, 64))).save(tmp_path / 'f.jpg', quality=100, exif=exif)
    assert np.abs(read_film(tmp_path / 'f.jpg', 64, 'pad')[8:56].astype(int) - ramp(48, 64)).max() <= 3


def test_extension_does_not_matter(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / 'f.jpg', format='PNG')
    assert (read_film(tmp_path / 'f.jpg', 64) == ramp()).all()


def test_squash_and_pad(tmp_path):
    Image.fromarray(np.full((100, 50), 77, 'uint8')).save(tmp_path / 'f.png')
    assert (read_film(tmp_path / 'f.png', 20) == 77).all()
    pad = read_film(tmp_path / 'f.png', 20, 'pad')
    assert (pad[:, 5:15] == 77).all() and pad[:, :5].max() == pad[:, 15:].max() == 0
    Image.fromarray(np.full((1, 500), 77, 'uint8')).save(tmp_path / 'line.png')
    assert (read_film(tmp_path / 'line.png', 20, 'pad') > 0).any()


def dicom(path, a, bits=12, photometric='MONOCHROME2', rle=False, **tags):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = pydicom.uid.DigitalXRayImageStorageForPresentation, '1.2.3', pydicom.uid.ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0' * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = *a.shape[-2:], 16 if bits > 8 else 8, bits, bits - 1
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, photometric, 0
    for k, v in tags.items(): setattr(ds, k, v)
    ds.PixelData = a.astype('uint16' if bits > 8 else 'uint8').tobytes()
    if rle: ds.compress(pydicom.uid.RLELossless)
    if tags.get('PixelData', 1) is None: del ds.PixelData
    ds.save_as(path)
    return path


def test_dicom(tmp_path):
    twelve, f = np.linspace(0, 4095, 64 * 64).reshape(64, 64).round(), tmp_path / 'f.dcm'
    close = lambda b, tol=3: np.abs(read_film(f, 64).astype(int) - b).max() <= tol
    dicom(f, twelve); assert close(ramp())
    dicom(f, twelve, photometric='MONOCHROME1'); assert close(255 - ramp().astype(int))
    dicom(f, twelve, rle=True); assert close(ramp())
    dicom(f, ramp(), bits=8); assert close(ramp(), 0)
    dicom(f, twelve, WindowCenter=2048, WindowWidth=1024)
    assert close(np.clip((twelve - 1536) / 1024, 0, 1) * 255, 2)
    dicom(f, twelve, RescaleSlope=2, RescaleIntercept=-100); assert close(ramp())
    assert np.array_equal(read_film(f, 32, 'pad'), read_film(f.rename(tmp_path / 'no_suffix'), 32, 'pad'))


def bad_png(make):
    def write(p):
        f = io.BytesIO()
        Image.fromarray(ramp()).save(f, format='PNG')
        p.write_bytes(make(f.getvalue()))
        return p
    return write
def as_jpeg(cut):
    def write(p):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200), dtype='uint8')).save(p, format='JPEG')
        p.write_bytes(p.read_bytes()[:cut])
        return p
    return write
def bomb(p):
    p.write_bytes(png16(np.zeros((1, 1, 1))).replace(struct.pack('>II', 1, 1), struct.pack('>II', 60_000, 60_000), 1))
    raw = bytearray(p.read_bytes())
    raw[29:33] = struct.pack('>I', zlib.crc32(raw[12:29]))
    p.write_bytes(raw)
    return p
def wide_bomb(p):
    Image.new('1', (30_000, 2_800)).save(p, format='PNG')
    return p
def animated(p):
    Image.new('L', (9, 9)).save(p, format='PNG', save_all=True, append_images=[Image.new('L', (9, 9), 200)])
    return p

FILMS = {
    'not there': (lambda p: p, 'is not there'),
    'empty file': (lambda p: (p.write_bytes(b''), p)[1], 'is empty'),
    'text': (lambda p: (p.write_text('image,label\n'), p)[1], 'is not a PNG, JPEG or DICOM film'),
    'GIF': (lambda p: (Image.new('L', (9, 9)).save(p, format='GIF'), p)[1], 'is not a PNG, JPEG or DICOM film'),
    'web page': (lambda p: (p.write_text('<!DOCTYPE html><html>log in</html>'), p)[1], 'is not a PNG, JPEG or DICOM film'),
    'folder': (lambda p: (p.mkdir(), p)[1], 'cannot be decoded'),
    'PNG header only': (bad_png(lambda b: b[:40]), 'cannot be decoded'),
    'PNG truncated': (bad_png(lambda b: b[:len(b) // 2]), 'cannot be decoded'),
    'PNG damaged': (bad_png(lambda b: b[:60] + bytes(40) + b[100:]), 'cannot be decoded'),
    'JPEG truncated': (as_jpeg(5000), 'image file is truncated'),
    'JPEG header only': (as_jpeg(300), 'cannot be decoded'),
    'bomb by its header': (bomb, 'pixels allowed'),
    'bomb of one bit': (wide_bomb, 'is 30000 x 2800 pixels, more than the 80,000,000 allowed'),
    'two pictures': (animated, 'holds 2 pictures'),
    'DICOM of 3 frames': (lambda p: dicom(p, np.zeros((3, 8, 8)), NumberOfFrames=3), 'is DICOM with 3 frames'),
    'DICOM without picture': (lambda p: dicom(p, np.zeros((8, 8)), PixelData=None), 'is DICOM without a picture'),
    'DICOM truncated': (lambda p: (dicom(p, np.zeros((64, 64))), p.write_bytes(p.read_bytes()[:-4000]), p)[2], 'cannot be decoded'),
    'DICOM bomb': (lambda p: dicom(p, np.zeros((8, 8)), Rows=60000, Columns=60000), 'is 60000 x 60000 pixels'),
}


@pytest.mark.parametrize('name', FILMS)
@pytest.mark.filterwarnings('ignore')
def test_wrong_films(tmp_path, name):
    write, message = FILMS[name]
    path = write(tmp_path / 'film.png')
    with pytest.raises(DataError) as e: read_film(path, 32)
    assert str(path) in str(e.value) and message in str(e.value) and '\n' not in str(e.value)


LOSSLESS = ['RLELossless', 'JPEGLosslessProcess14', 'JPEGLosslessProcess14_1', 'JPEGLSLossless', 'JPEG2000Lossless', 'DeflatedExplicitVRLittleEndian']
LOSSY = ['JPEGBaselineProcess1', 'JPEGExtendedProcess2_4', 'JPEGLSNearLossless', 'JPEG2000']


def transcode(source, target, syntax):
    "Compress a DICOM file with GDCM; False where the syntax has no room for that many bits"
    gdcm = pytest.importorskip('gdcm')
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source)); assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax))); change.SetInput(reader.GetImage())
    if not change.Change(): return False
    writer.SetFileName(str(target)); writer.SetFile(reader.GetFile()); writer.SetImage(change.GetOutput())
    return writer.Write()


def drawn(bits, size=96): return (ramp(size).astype(float) ** 1.5 / 255 ** 1.5 * (2 ** bits - 1)).round()


@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
@pytest.mark.parametrize('bits', [8, 12, 16])
@pytest.mark.parametrize('syntax', LOSSLESS)
def test_dicom_compressed_without_loss(tmp_path, syntax, bits, photometric):
    pydicom, plain = pytest.importorskip('pydicom'), dicom(tmp_path / 'plain.dcm', drawn(bits), bits, photometric, RescaleSlope=1, RescaleIntercept=-100)
    assert transcode(plain, tmp_path / 'small.dcm', syntax)
    assert pydicom.dcmread(tmp_path / 'small.dcm').file_meta.TransferSyntaxUID != pydicom.uid.ExplicitVRLittleEndian
    for size in (96, 33): assert np.array_equal(read_film(tmp_path / 'small.dcm', size), read_film(plain, size))


@pytest.mark.parametrize('bits', [8, 12, 16])
@pytest.mark.parametrize('syntax', LOSSY)
def test_dicom_compressed_with_loss(tmp_path, syntax, bits):
    plain = dicom(tmp_path / 'plain.dcm', drawn(bits), bits)
    if not transcode(plain, tmp_path / 'small.dcm', syntax):
        assert (syntax, bits) in [('JPEGBaselineProcess1', 12), ('JPEGBaselineProcess1', 16), ('JPEGExtendedProcess2_4', 16)]
    elif (syntax, bits) == ('JPEGExtendedProcess2_4', 12):
        with pytest.raises(DataError, match='12-bit precision') as e: read_film(tmp_path / 'small.dcm', 96)
        assert '\n' not in str(e.value)
    else: assert np.abs(read_film(tmp_path / 'small.dcm', 96).astype(int) - read_film(plain, 96)).max() <= 4


def test_dicom_colour(tmp_path):
    pydicom, grey, jpeg = pytest.importorskip('pydicom'), drawn(8, 64).astype('uint8'), io.BytesIO()
    plain = dicom(tmp_path / 'plain.dcm', np.stack([grey] * 3, -1), 8, 'RGB', SamplesPerPixel=3, PlanarConfiguration=0, Rows=64, Columns=64)
    for syntax in ('RLELossless', 'JPEGLosslessProcess14_1', 'JPEGLSLossless', 'JPEG2000Lossless'):
        assert transcode(plain, tmp_path / 'small.dcm', syntax) and np.array_equal(read_film(tmp_path / 'small.dcm', 64), grey)
    ds = pydicom.dcmread(plain)
    Image.fromarray(np.stack([grey] * 3, -1)).save(jpeg, 'JPEG', quality=98)
    ds.file_meta.TransferSyntaxUID, ds.PhotometricInterpretation, ds.PixelData = pydicom.uid.JPEGBaseline8Bit, 'YBR_FULL_422', pydicom.encaps.encapsulate([jpeg.getvalue()])
    ds.save_as(tmp_path / 'jpeg.dcm')
    assert np.abs(read_film(tmp_path / 'jpeg.dcm', 64).astype(int) - grey).max() <= 4


def test_dicom_without_a_decoder(tmp_path, monkeypatch):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.pixels import get_decoder
    assert transcode(dicom(tmp_path / 'plain.dcm', drawn(12)), tmp_path / 'small.dcm', 'JPEGLosslessProcess14_1')
    decoder = get_decoder(pydicom.uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, '_available', {})
    with pytest.raises(DataError, match=r"small.dcm is DICOM compressed as JPEG Lossless.*which needs a decoder: pip install 'cxrlg\[dicom\]'") as e: read_film(tmp_path / 'small.dcm')
    assert '\n' not in str(e.value)
    assert transcode(tmp_path / 'plain.dcm', tmp_path / 'part2.dcm', 'JPEG2000Part2Lossless')
    with pytest.raises(DataError, match='has no decoder here: save it uncompressed') as e: read_film(tmp_path / 'part2.dcm')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('syntax', [s for s in LOSSLESS + LOSSY if 'JPEG' in s or 'RLE' in s])
def test_dicom_truncated_when_compressed(tmp_path, syntax):
    pydicom, small = pytest.importorskip('pydicom'), tmp_path / 'small.dcm'
    bits = 8 if 'Baseline' in syntax or 'Extended' in syntax else 12
    assert transcode(dicom(tmp_path / 'plain.dcm', np.random.default_rng(0).integers(0, 2 ** bits, (96, 96)), bits), small, syntax)
    whole, ds = small.read_bytes(), pydicom.dcmread(small)
    frame = next(pydicom.encaps.generate_frames(ds.PixelData))
    ds.PixelData = pydicom.encaps.encapsulate([frame[:len(frame) * 9 // 10]])
    ds.save_as(tmp_path / 'frame.dcm')
    (tmp_path / 'file.dcm').write_bytes(whole[:len(whole) * 9 // 10])
    for name, say in (('frame', 'that cannot be decoded'), ('file', 'with one that is cut off')):
        with pytest.raises(DataError, match=say) as e: read_film(tmp_path / f'{name}.dcm')
        assert '\n' not in str(e.value)


def test_dicom_without_pydicom(tmp_path, monkeypatch):
    path = dicom(tmp_path / 'f.dcm', np.zeros((8, 8)))
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    with pytest.raises(DataError, match=r"needs pydicom: pip install 'cxrlg\[dicom\]'"): read_film(path)


@pytest.mark.parametrize('options', [dict(mode='stretch'), dict(size=0), dict(size=64.5), dict(size='64'), dict(size=100_000)])
def test_wrong_shapes(good, table, options):
    with pytest.raises(DataError, match='choose|whole number'): read_film(good / 'f0.png', **options)
    with pytest.raises(DataError, match='choose|whole number'): PixelCache(table, good, cache_dir=good / 'c', **options)


# ---- the cache

def cache(table, root, size=16, **kw): return PixelCache(table, root, size, cache_dir=root / 'cache', progress=False, **kw)
def finished(root): return sorted((root / 'cache').glob('**/*.npy'))
@pytest.fixture
def counted(monkeypatch):
    "Counts the films that are decoded"
    calls, real = [], data.read_film
    monkeypatch.setattr(data, 'read_film', lambda *a: (calls.append(a[0]), real(*a))[1])
    return calls


def test_cache_is_the_films(good, table, counted):
    px = cache(table, good)
    assert px.shape == (6, 16, 16) and len(px) == 6 and px.dtype == np.uint8 and px.nbytes == 6 * 256
    want = np.stack([read_film(good / f, 16) for f in table.image])
    for i in (2, slice(1, 4), np.array([5, 0]), [1, 1], table.Edema.to_numpy() == 1): assert np.array_equal(px[i], want[i])
    assert np.array_equal(np.asarray(px), want) and np.array_equal(np.load(px.path), want)
    again, copy = cache(table, good), pickle.loads(pickle.dumps(px))
    assert again.hash == copy.hash == px.hash and len(counted) == 6 and len(pickle.dumps(px)) < 2000
    assert cache(table, good, mode='pad').hash != px.hash and cache(table, good, size=17).shape == (6, 17, 17)


def test_hash_is_of_the_pixels_not_the_place(good, table, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    for f in table.image: shutil.copyfile(good / f, other / f)
    assert cache(table, good).hash == cache(table, other).hash and cache(table, good).key != cache(table, other).key


def test_changed_film_makes_another_cache(good, table, counted):
    before = cache(table, good)
    write_films(good, ['f3.png'], seed=9)
    after = cache(table, good)
    assert after.hash != before.hash and len(counted) == 7 and np.array_equal(after[3], read_film(good / 'f3.png', 16))


def test_grown_or_cut_table_decodes_what_is_new_only(good, table, counted):
    first = cache(table.iloc[[4, 1, 2]].reset_index(drop=True), good)
    whole = cache(table, good)
    assert len(counted) == 6 and np.array_equal(whole[[4, 1, 2]], np.asarray(first))
    assert np.array_equal(np.asarray(cache(table.iloc[::-1].reset_index(drop=True), good)), np.asarray(whole)[::-1]) and len(counted) == 6


def test_unreadable_films_are_named_counted_and_can_be_dropped(good, table, counted):
    for f in ('f1.png', 'f4.png'): (good / f).write_bytes((good / f).read_bytes()[:200])
    with pytest.raises(DataError, match=r'2 of 6 films cannot be read: .*f[14]\.png cannot be decoded.*f[14]\.png') as e: cache(table, good)
    assert e.value.films == ['f1.png', 'f4.png'] and not finished(good) and len(counted) == 6
    assert cache(table[~table.image.isin(e.value.films)].reset_index(drop=True), good).shape[0] == 4 and len(counted) == 6


def test_every_film_unreadable_names_five(good, table):
    for f in table.image: (good / f).write_bytes(b'x')
    with pytest.raises(DataError, match=r'6 of 6 films cannot be read: .*; \.\.\.'): cache(table, good)
    assert not finished(good)


def test_missing_film(good, table):
    (good / 'f2.png').unlink()
    with pytest.raises(DataError, match='f2.png is not there'): cache(table, good)
    assert not (good / 'cache').exists()


def test_empty_table(good, table):
    with pytest.raises(DataError, match='no rows'): cache(table.iloc[:0], good)


@pytest.mark.parametrize('damage', ['truncated', 'no description', 'of another table', 'not an array', 'description damaged'])
def test_damaged_cache_is_refused(good, table, damage):
    px, other = cache(table, good), cache(table.iloc[:3], good)
    if damage == 'truncated': os.truncate(px.path, 300)
    if damage == 'no description': px._path('json').unlink()
    if damage == 'of another table': [shutil.copy(other._path(s), px._path(s)) for s in ('npy', 'json')]
    if damage == 'not an array': px.path.write_bytes(b'films')
    if damage == 'description damaged': px._path('json').write_text('{"key"')
    with pytest.raises(DataError, match='is damaged|is of another table') as e: cache(table, good)
    assert 'delete it' in str(e.value) and px.path.name in str(e.value)


def test_folder_that_cannot_be_written(good, table):
    (good / 'cache').write_text('a file')
    with pytest.raises(DataError, match='cannot write the cache in .*cache_dir='): cache(table, good)


def test_read_only_folder(good, table, monkeypatch):
    px = cache(table, good)
    def refuse(*a, **k): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(data, 'open', refuse, raising=False)
    assert cache(table, good).hash == px.hash
    with pytest.raises(DataError, match='Permission denied.*give a folder that can be written'): cache(table, good, size=20)
    assert len(finished(good)) == 1


def test_no_room_for_the_cache(good, table, monkeypatch):
    monkeypatch.setattr(data.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match='needs 0.00 GB and .* has 0.00 GB free'): cache(table, good)
    assert not finished(good)


def test_disk_full_while_caching(good, table):
    code = '''import resource, sys; sys.path[:0] = [sys.argv[3]]
from cxrlg.data import *
table = read_table('csv', sys.argv[1], image='image', patient='patient', labels=['Edema'], verbose=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try: PixelCache(table, sys.argv[1], 64, cache_dir=sys.argv[2], progress=False)
except DataError as e: print(e)'''
    out = subprocess.run([sys.executable, '-c', code, good, good / 'cache', Path(data.__file__).parents[1]], capture_output=True, text=True)
    assert 'cannot write the cache in' in out.stdout and 'free some space' in out.stdout, out.stderr
    assert not finished(good)


def test_write_error_leaves_no_cache_and_the_next_run_goes_on(good, table, monkeypatch, counted):
    real, n = PixelCache._write, []
    def full(self, rows, block):
        n.append(1)
        if len(n) == 1: raise OSError(28, 'No space left on device')
        return real(self, rows, block)
    monkeypatch.setattr(PixelCache, '_write', full)
    with pytest.raises(DataError, match='No space left on device.*free some space'): cache(table, good)
    assert not finished(good)
    assert np.array_equal(cache(table, good)[5], read_film(good / 'f5.png', 16))


def test_killed_run_goes_on(tmp_path, counted):
    n = 600
    write_films(tmp_path, [f'f{i}.png' for i in range(n)], (8, 8))
    write_rows(tmp_path, [f'f{i}.png,p,0,1' for i in range(n)])
    code = '''import os, signal, sys; sys.path[:0] = [sys.argv[2]]
import cxrlg.data as d
real, seen = d.read_film, []
def dying(*a):
    seen.append(1)
    if len(seen) == 400: os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
d.read_film = dying
table = d.read_table('csv', sys.argv[1], image='image', patient='patient', labels=['Edema'], verbose=False)
d.PixelCache(table, sys.argv[1], 8, cache_dir=sys.argv[1] + '/cache', n_jobs=1, progress=False)'''
    out = subprocess.run([sys.executable, '-c', code, tmp_path, Path(data.__file__).parents[1]], capture_output=True, text=True)
    assert out.returncode == -signal.SIGKILL, out.stderr
    assert not finished(tmp_path)
    table = read_table('csv', tmp_path, verbose=False, **GOOD)
    px = cache(table, tmp_path, 8)
    assert len(counted) == n - 256
    assert np.array_equal(np.asarray(px), np.stack([np.asarray(Image.open(tmp_path / f)) for f in table.image]))
    assert not list((tmp_path / 'cache').glob('**/*.part')) and not list((tmp_path / 'cache').glob('**/*.done'))


@pytest.mark.parametrize('state', ['no marks', 'empty marks', 'no room yet', 'part of the keys'])
def test_films_are_not_taken_from_a_cache_that_was_never_whole(good, table, state):
    "A run that was killed, or had no disk left, between the files of a new cache"
    whole, some = cache(table, good), table.iloc[:4].reset_index(drop=True)
    stem = whole.path.with_suffix('')
    stem.with_suffix('.npy').rename(part := stem.with_suffix('.part'))
    head = part.stat().st_size - whole.nbytes
    part.write_bytes(part.read_bytes()[:head] + bytes(whole.nbytes if state != 'no room yet' else 0))
    if state != 'no marks': stem.with_suffix('.done').write_bytes(bytes([1]*6) if state in ('no room yet', 'part of the keys') else b'')
    if state == 'part of the keys': (f := stem.with_suffix('.films')).write_bytes(f.read_bytes()[:24])
    assert np.array_equal(np.asarray(cache(some, good)), np.stack([read_film(good / f, 16) for f in some.image]))


def test_a_sex_or_a_year_that_is_missing_everywhere(tmp_path):
    write_films(tmp_path / 'train/patient1/study1', ['v.jpg'])
    (tmp_path / 'train.csv').write_text(chex + '\ntrain/patient1/study1/v.jpg,,60,Frontal,AP' + ',' * 14 + '\n')
    assert 'sex' not in read_table('chexpert', tmp_path, verbose=False)
    write_films(tmp_path, ['f0.png'])
    (tmp_path / 'PADCHEST.csv').write_text("ImageID,PatientID,Labels,StudyDate_DICOM,PatientBirth\nf0.png,1,['nodule'],20100101,l960\n")
    assert 'age' not in read_table('padchest', tmp_path, verbose=False, min_films=1)


def test_two_at_once_decode_once(good, table, counted):
    got = []
    threads = [threading.Thread(target=lambda: got.append(cache(table, good).hash)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 4 and len(set(got)) == 1 and len(counted) == 6


def test_archive(tmp_path):
    rng = np.random.default_rng(0)
    images = {f'{s}_images': rng.integers(0, 255, (m, 28, 28), dtype='uint8') for s, m in zip(('train', 'val', 'test'), (7, 3, 2))}
    np.savez_compressed(tmp_path / 'chestmnist.npz', **images, **{f'{s}_labels': rng.integers(0, 2, (m, 14)) for s, m in zip(('train', 'val', 'test'), (7, 3, 2))})
    t = read_table('chestmnist', tmp_path, verbose=False)
    assert np.array_equal(np.asarray(cache(t, tmp_path, 28)), np.concatenate(list(images.values())))
    some = t.iloc[[11, 8, 0, 3]].reset_index(drop=True)
    (tmp_path / 'cache').rename(tmp_path / 'gone')
    assert np.array_equal(np.asarray(cache(some, tmp_path, 28)), np.concatenate(list(images.values()))[[11, 8, 0, 3]])
    assert 'one film a patient' in set(audit(t, pixels=cache(t, tmp_path, 28), verbose=False, progress=False).check)
    assert 'films not looked at' in set(audit(t, tmp_path, verbose=False, progress=False).check)
    with pytest.raises(DataError, match='train:99 is not in the archive'): cache(some.assign(image=['chestmnist.npz#train:99', *some.image[1:]]), tmp_path, 28)
    raw = bytearray((tmp_path / 'chestmnist.npz').read_bytes())
    raw[300:1500] = bytes(1200)
    (tmp_path / 'chestmnist.npz').write_bytes(raw)
    with pytest.raises(DataError, match=r'chestmnist.npz \(train\)'): cache(t, tmp_path, 28)


# ---- audit

def checks(problems): return dict(zip(problems.check, problems.rows))


def test_audit_of_labels_and_ids(table):
    t = table.assign(Edema=table.Edema.astype(object), age=[40, 50, -3, 60, 200, 70.], split=['train', 'test', 'train', 'train', 'test', 'test'])
    t.attrs = table.attrs
    t.loc[2, 'Edema'], t.loc[5, 'image'] = 2, 'f4.png'
    found = audit(t, verbose=False)
    got = checks(found)
    assert got['label values'] == [2] and got['image twice, other labels'] == [4, 5] and got['age'] == [2, 4] and got['patient in both splits'] == [0]
    assert got['no positive'] == [0, 1, 2, 3, 4, 5] and found.severity.tolist() == sorted(found.severity, key=['fatal', 'warning', 'note'].index)
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
    problems = audit(table, good, picture=tmp_path / 'odd.png', verbose=False, progress=False)
    got = checks(problems)
    assert (got['missing film'], got['unreadable film'], got['nearly constant film']) == ([0], [2], [3]) and got['truncated film'] == [1]
    assert got['same picture, other labels'] == [4, 5] and (problems.severity == 'fatal').sum() == 3
    assert Image.open(tmp_path / 'odd.png').size[0] == 900


def test_audit_finds_nothing_in_good_films_and_writes_nothing(good, table, capsys):
    before = sorted(good.iterdir())
    found = audit(table.assign(Mass=[0, 1, 0, 1, 0, 1.]), good, progress=False)
    assert not len(found) and capsys.readouterr().out == 'audit of 6 films: 0 fatal, 0 warning, 0 note\n' and sorted(good.iterdir()) == before


# ---- loaders

@pytest.fixture
def loaders():
    "Pixels that tell their row, for 40 rows in 4 folds and one row in none"
    n = 41
    pixels = np.arange(n, dtype='uint8')[:, None, None].repeat(16, 1).repeat(16, 2)
    table = pd.DataFrame(dict(image=[str(i) for i in range(n)], patient=range(n), Mass=np.where(np.arange(n) % 3, np.arange(n) % 2, np.nan).astype('float32')))
    return lambda fold=1, folds=np.r_[np.arange(n - 1) % 4, -1], **kw: fold_dls(pixels, table, folds, fold, **dict(dict(bs=8, device='cpu'), **kw))


def seen(dl): return [(x[:, 0, 8, 8].mul(255).round().int().tolist(), y[:, 0].tolist(), dl.rows.tolist()) for x, y in dl]
PLAIN = dict(flip=0, rotate=0, crop=1.)


def test_loader_serves_the_right_rows(loaders):
    dls = loaders(**PLAIN)
    train, valid = seen(dls.train), seen(dls.valid)
    assert sum((rows for _, _, rows in valid), []) == list(range(1, 40, 4)) and len(train) == len(dls.train) == 3
    for got, y, rows in train + valid: assert got == rows and all((v != v) if r % 3 == 0 else v == r % 2 for r, v in zip(rows, y))
    assert not {r for _, _, rows in train for r in rows} & {*range(1, 40, 4), 40}
    assert [r for r, *_ in seen(dls.train)] != [r for r, *_ in train]


def test_batches_depend_on_seed_epoch_and_number_alone(loaders):
    a, b, c = loaders(jitter=.1), loaders(jitter=.1), loaders(jitter=.1, seed=43)
    seen(a.train)
    torch.rand(7), np.random.rand(7)
    next(iter(b.train))
    assert b.train.epoch == 0 and a.train.epoch == 1
    b.train.epoch = 1
    for (x, _), (z, _) in zip(a.train, b.train, strict=True): assert torch.equal(x, z)
    assert not torch.equal(a.one_batch()[0], c.one_batch()[0])
    state = torch.get_rng_state()
    seen(a.train)
    assert torch.equal(state, torch.get_rng_state())


def test_small_train_set_is_one_batch_and_valid_is_complete(loaders):
    assert [len(r) for r, *_ in seen(loaders(bs=64, **PLAIN).train)] == [30]
    assert [len(r) for r, *_ in seen(loaders(bs=30, valid_bs=4, **PLAIN).train)] == [30]
    assert [len(r) for r, *_ in seen(loaders(valid_bs=4, **PLAIN).valid)] == [4, 4, 2]


def test_augmentation_stays_in_range_and_on_device_is_the_same(loaders):
    x, z = loaders(jitter=.3).one_batch()[0], loaders(jitter=.3, on_device=True).one_batch()[0]
    assert torch.equal(x, z) and x.min() >= 0 and x.max() <= 1 and x.dtype == torch.float32
    assert loaders(**PLAIN).train.augment is None and loaders().valid.augment is None


def test_rotation_and_crop_against_a_direct_computation():
    gen = data._rng(0, 0, 0)
    theta, u = data.draw_affine(50, gen, .5, 10, .84), torch.rand(5, 50, generator=data._rng(0, 0, 0))
    for i in range(50):
        f, a, m = (.84 + .16 * u[0, i])**.5, math.radians(10) * (2 * u[1, i] - 1), -1 if u[2, i] < .5 else 1
        want = float(f) * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) @ np.diag([m, 1])
        assert np.allclose(theta[i, :, :2], want, atol=1e-6) and (theta[i, :, 2].abs() <= 1 - f + 1e-6).all()


LOADS = {
    'fold beyond': (dict(fold=4), 'fold=4 is beyond the folds, which are 0, 1, 2, 3'),
    'fold of the locked films': (dict(fold=-1), 'fold=-1 is beyond'),
    'other length': (dict(folds=np.zeros(7, int)), '41 pictures, 41 rows and 7 folds'),
    'nothing to train on': (dict(folds=np.r_[np.ones(40, int), -1]), 'leaves 0 films to train on'),
    'no fold at all': (dict(folds=np.full(41, -1)), 'fold=1 is beyond the folds'),
    'crop 0': (dict(crop=0.), 'crop in (0, 1]'),
    'flip 2': (dict(flip=2.), 'flip is in [0, 1]'),
    'negative seed': (dict(seed=-1), 'the others not negative'),
    'batch of none': (dict(bs=0), 'bs at least 1'),
}


@pytest.mark.parametrize('name', LOADS)
def test_wrong_loaders(loaders, name):
    options, message = LOADS[name]
    with pytest.raises(DataError) as e: loaders(**options)
    assert message in str(e.value)


def test_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'a' / 'f.txt'
    with atomic_write(path) as tmp: tmp.write_text('old')
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as tmp:
            tmp.write_text('ne')
            raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError):
        with atomic_write(path): pass
    assert path.read_text() == 'old' and [o.name for o in path.parent.iterdir()] == ['f.txt']


# ---- real films

def test_nih128(films):
    t = read_table('nih', films / 'nih128', verbose=False)
    assert (len(t), t.patient.nunique(), t.attrs['left_out'], t.Hernia.sum()) == (7709, 2000, 104411, 17)
    assert t.split.value_counts().to_dict() == dict(train=6363, test=1346) and not set(t.patient[t.split == 'test']) & set(t.patient[t.split == 'train'])


def test_nih256_by_stem_and_no_fatal_problem(films, tmp_path):
    t = read_table('nih', films / 'nih256', verbose=False)
    assert len(t) == 1575 and t.image.str.endswith('.jpg').all()
    t = t.iloc[:300].reset_index(drop=True)
    px = PixelCache(t, films / 'nih256', 64, cache_dir=tmp_path, progress=False)
    assert px[:].std() > 30 and not (audit(t, films / 'nih256', verbose=False, progress=False).severity == 'fatal').any()
