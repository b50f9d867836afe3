"Films: every format is read or refused by name, and a cache that was ended goes on"
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cxrlg.films as films
from cxrlg.data import audit, read_table
from cxrlg.core import DataError
from cxrlg.films import PixelCache, read_film
from folders import GOOD, good, table, write_films, write_rows  # noqa: F401 (fixtures)


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
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        pydicom.uid.DigitalXRayImageStorageForPresentation,
        '1.2.3',
        pydicom.uid.ExplicitVRLittleEndian,
    )
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
    dicom(f, twelve)
    assert close(ramp())
    dicom(f, twelve, photometric='MONOCHROME1')
    assert close(255 - ramp().astype(int))
    dicom(f, twelve, rle=True)
    assert close(ramp())
    dicom(f, ramp(), bits=8)
    assert close(ramp(), 0)
    dicom(f, twelve, WindowCenter=2048, WindowWidth=1024)
    assert close(np.clip((twelve - 1536) / 1024, 0, 1) * 255, 2)
    dicom(f, twelve, RescaleSlope=2, RescaleIntercept=-100)
    assert close(ramp())
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


LOSSLESS = [
    'RLELossless',
    'JPEGLosslessProcess14',
    'JPEGLosslessProcess14_1',
    'JPEGLSLossless',
    'JPEG2000Lossless',
    'DeflatedExplicitVRLittleEndian',
]
LOSSY = ['JPEGBaselineProcess1', 'JPEGExtendedProcess2_4', 'JPEGLSNearLossless', 'JPEG2000']


def transcode(source, target, syntax):
    "Compress a DICOM file with GDCM; False where the syntax has no room for that many bits"
    gdcm = pytest.importorskip('gdcm')
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(source))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    if not change.Change(): return False
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    return writer.Write()


def drawn(bits, size=96): return (ramp(size).astype(float) ** 1.5 / 255 ** 1.5 * (2 ** bits - 1)).round()


@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
@pytest.mark.parametrize('bits', [8, 12, 16])
@pytest.mark.parametrize('syntax', LOSSLESS)
def test_dicom_compressed_without_loss(tmp_path, syntax, bits, photometric):
    pydicom, plain = pytest.importorskip('pydicom'), dicom(
        tmp_path / 'plain.dcm', drawn(bits), bits, photometric, RescaleSlope=1, RescaleIntercept=-100
    )
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
    ds.file_meta.TransferSyntaxUID, ds.PhotometricInterpretation, ds.PixelData = (
        pydicom.uid.JPEGBaseline8Bit,
        'YBR_FULL_422',
        pydicom.encaps.encapsulate([jpeg.getvalue()]),
    )
    ds.save_as(tmp_path / 'jpeg.dcm')
    assert np.abs(read_film(tmp_path / 'jpeg.dcm', 64).astype(int) - grey).max() <= 4


def test_dicom_without_a_decoder(tmp_path, monkeypatch):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.pixels import get_decoder
    assert transcode(dicom(tmp_path / 'plain.dcm', drawn(12)), tmp_path / 'small.dcm', 'JPEGLosslessProcess14_1')
    decoder = get_decoder(pydicom.uid.JPEGLosslessSV1)
    monkeypatch.setattr(decoder, '_available', {})
    with pytest.raises(
        DataError,
        match=r"small.dcm is DICOM compressed as JPEG Lossless.*which needs a decoder: pip install 'cxrlg\[dicom\]'",
    ) as e:
        read_film(tmp_path / 'small.dcm')
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
    calls, real = [], films.read_film
    monkeypatch.setattr(films, 'read_film', lambda *a: (calls.append(a[0]), real(*a))[1])
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


def test_a_copied_a_moved_and_a_renamed_folder_are_known_again(good, table, tmp_path_factory, counted):
    first, cache_dir = cache(table, good), good / 'cache'
    other = tmp_path_factory.mktemp('other') / 'site'
    shutil.copytree(good, other, ignore=shutil.ignore_patterns('cache'))
    renamed = table.assign(image=[f'new{f}' for f in table.image])
    assert PixelCache(table, other, 16, cache_dir=cache_dir, progress=False).key == first.key
    other.rename(other.with_name('moved'))
    for f in table.image: (other.with_name('moved') / f).rename(other.with_name('moved') / f'new{f}')
    again = PixelCache(renamed, other.with_name('moved'), 16, cache_dir=cache_dir, progress=False)
    assert again.key == first.key and again.hash == first.hash and len(counted) == 6


def flat(path, grey, when=315532800):
    "A film of one grey level; all of them agree in size and time"
    Image.fromarray(np.full((40, 40), grey, 'uint8')).save(path)
    os.utime(path, (when, when))


def test_two_folders_that_agree_in_name_size_and_time(tmp_path):
    t, caches = pd.DataFrame(dict(image=['a.png'], patient=['1'])), []
    for grey in (50, 200):
        (tmp_path / str(grey)).mkdir()
        flat(tmp_path / str(grey) / 'a.png', grey)
    for grey in (50, 200): caches.append(PixelCache(t, tmp_path / str(grey), 32, cache_dir=tmp_path / 'c', progress=False))
    assert [c[0].max() for c in caches] == [50, 200] and caches[0].hash != caches[1].hash


@pytest.mark.parametrize('settled', [False, True])
def test_a_film_replaced_by_one_of_the_same_size_and_time(tmp_path, settled, monkeypatch):
    "At once, and after its content was kept"
    if settled: monkeypatch.setattr(films, '_settling', -1)
    t = pd.DataFrame(dict(image=['a.png'], patient=['1']))
    for grey in (50, 200, 50):
        flat(tmp_path / 'a.png', grey)
        if settled: time.sleep(.02)
        assert PixelCache(t, tmp_path, 32, cache_dir=tmp_path / 'c', progress=False)[0].max() == grey


def test_only_the_middle_of_an_uncompressed_film_changes(tmp_path):
    a = np.random.default_rng(0).integers(0, 4096, (300, 300))
    b = a.copy()
    b[140:160, 140:160] = 0
    t, hashes = pd.DataFrame(dict(image=['a.dcm'], patient=['1'])), set()
    for film in (a, b):
        os.utime(dicom(tmp_path / 'a.dcm', film), (0, 0))
        hashes.add(PixelCache(t, tmp_path, 64, cache_dir=tmp_path / 'c', progress=False).hash)
    assert len(hashes) == 2


def test_contents_are_read_once(good, table, monkeypatch):
    read, real = [], films._content
    monkeypatch.setattr(films, '_content', lambda path, identity: (read.append(path), real(path, identity))[1])
    monkeypatch.setattr(films, '_settling', -1)
    first = cache(table, good)
    assert cache(table, good).key == first.key and len(read) == 6
    write_films(good, ['f3.png'], seed=9)
    assert cache(table, good).key != first.key and len(read) == 7
    (good / 'cache' / 'contents').write_bytes(b'damaged')
    assert cache(table, good, size=20).shape == (6, 20, 20) and len(read) == 13
    monkeypatch.setattr(films, '_settling', 3600.)
    (good / 'cache' / 'contents').unlink()
    for _ in range(2): cache(table, good)
    assert len(read) == 25 and not (good / 'cache' / 'contents').exists()


def test_a_hundred_thousand_films_are_known_soon(tmp_path, monkeypatch):
    "Links to one film: what is kept of it is found without a look into the files"
    monkeypatch.setattr(films, '_settling', -1)
    flat(tmp_path / 'a.png', 50)
    names = ['a.png'] * 100_000
    keys = films._film_keys(names[:1], tmp_path, tmp_path / 'c' / 'contents', 1)
    monkeypatch.setattr(films, '_content', lambda *a: pytest.fail('a film was read again'))
    many = np.stack([np.arange(100_000, dtype='uint64'), np.arange(100_000, dtype='uint64')], 1)
    films._keep(tmp_path / 'c' / 'contents', many)
    assert (films._film_keys(names, tmp_path, tmp_path / 'c' / 'contents', 1) == keys).all()


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
    monkeypatch.setattr(films, 'file_lock', refuse)
    assert cache(table, good).hash == px.hash
    with pytest.raises(DataError, match='Permission denied.*give a folder that can be written'): cache(table, good, size=20)
    assert len(finished(good)) == 1


def test_no_room_for_the_cache(good, table, monkeypatch):
    monkeypatch.setattr(films.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match='needs 0.00 GB and .* has 0.00 GB free'): cache(table, good)
    assert not finished(good)


def test_disk_full_while_caching(good, table):
    code = '''import resource, sys; sys.path[:0] = [sys.argv[3]]
from cxrlg.core import DataError
from cxrlg.data import read_table
from cxrlg.films import PixelCache
table = read_table('csv', sys.argv[1], image='image', patient='patient', labels=['Edema'], verbose=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try: PixelCache(table, sys.argv[1], 64, cache_dir=sys.argv[2], progress=False)
except DataError as e: print(e)'''
    out = subprocess.run(
        [sys.executable, '-c', code, good, good / 'cache', Path(films.__file__).parents[1]],
        capture_output=True,
        text=True,
    )
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
import cxrlg.films as d
from cxrlg.data import read_table
real, seen = d.read_film, []
def dying(*a):
    seen.append(1)
    if len(seen) == 400: os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
d.read_film = dying
table = read_table('csv', sys.argv[1], image='image', patient='patient', labels=['Edema'], verbose=False)
d.PixelCache(table, sys.argv[1], 8, cache_dir=sys.argv[1] + '/cache', n_jobs=1, progress=False)'''
    out = subprocess.run([sys.executable, '-c', code, tmp_path, Path(films.__file__).parents[1]], capture_output=True, text=True)
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


def test_two_at_once_decode_once(good, table, counted):
    got = []
    threads = [threading.Thread(target=lambda: got.append(cache(table, good).hash)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(got) == 4 and len(set(got)) == 1 and len(counted) == 6


def test_archive(tmp_path):
    rng = np.random.default_rng(0)
    images = {f'{s}_images': rng.integers(0, 255, (m, 28, 28), dtype='uint8') for s, m in zip(('train', 'val', 'test'), (7, 3, 2))}
    np.savez_compressed(
        tmp_path / 'chestmnist.npz',
        **images,
        **{f'{s}_labels': rng.integers(0, 2, (m, 14)) for s, m in zip(('train', 'val', 'test'), (7, 3, 2))},
    )
    t = read_table('chestmnist', tmp_path, verbose=False)
    assert np.array_equal(np.asarray(cache(t, tmp_path, 28)), np.concatenate(list(images.values())))
    some = t.iloc[[11, 8, 0, 3]].reset_index(drop=True)
    (tmp_path / 'cache').rename(tmp_path / 'gone')
    assert np.array_equal(np.asarray(cache(some, tmp_path, 28)), np.concatenate(list(images.values()))[[11, 8, 0, 3]])
    assert 'one film a patient' in set(audit(t, pixels=cache(t, tmp_path, 28), verbose=False, progress=False).check)
    assert 'films not looked at' in set(audit(t, tmp_path, read=read_film, verbose=False, progress=False).check)
    with pytest.raises(DataError, match='train:99 is not in the archive'):
        cache(some.assign(image=['chestmnist.npz#train:99', *some.image[1:]]), tmp_path, 28)
    raw = bytearray((tmp_path / 'chestmnist.npz').read_bytes())
    raw[300:1500] = bytes(1200)
    (tmp_path / 'chestmnist.npz').write_bytes(raw)
    with pytest.raises(DataError, match=r'chestmnist.npz \(train\)'): cache(t, tmp_path, 28)


def test_a_film_of_an_archive_that_is_asked_for_twice_is_there_twice(tmp_path):
    films = np.arange(3 * 784).reshape(3, 28, 28).astype('uint8')
    np.savez(tmp_path/'chestmnist.npz', train_images=films)
    twice = pd.DataFrame(dict(image=[f'chestmnist.npz#train:{i}' for i in (2, 0, 2)]))
    assert (np.asarray(cache(twice, tmp_path, 28)) == films[[2, 0, 2]]).all()
    once = pd.DataFrame(dict(image=[f'chestmnist.npz#train:{i}' for i in (0, 1, 2)]))
    assert (np.asarray(cache(once, tmp_path, 28)) == films).all()


@pytest.mark.parametrize('films, said', [
    (np.asfortranarray(np.arange(2 * 784).reshape(2, 28, 28).astype('uint8')), 'is stored by columns'),
    (np.zeros((0, 28, 28), 'uint8'), 'train:0 is not in the archive'),
    (np.zeros((2, 28, 28)), 'is of shape'),
])
def test_an_archive_that_cannot_be_read_as_it_stands(tmp_path, films, said):
    np.savez(tmp_path/'chestmnist.npz', train_images=films)
    with pytest.raises(DataError, match=said): cache(pd.DataFrame(dict(image=['chestmnist.npz#train:0'])), tmp_path, 28)


@pytest.mark.parametrize('image', [None, 7, float('nan')])
def test_a_row_without_a_path_is_named(tmp_path, image):
    with pytest.raises(DataError, match='the first is row 1'): cache(pd.DataFrame(dict(image=['a.png', image])), tmp_path, 28)


@pytest.mark.parametrize('text', ['[]', '{}', '7'])
def test_a_damaged_description_of_a_cache_is_one_line(tmp_path, text):
    Image.fromarray(np.arange(64, dtype='uint8').reshape(8, 8)).save(tmp_path/'a.png')
    t = pd.DataFrame(dict(image=['a.png']))
    cache(t, tmp_path, 8)._path('json').write_text(text)
    with pytest.raises(DataError, match='is damaged: delete it'): cache(t, tmp_path, 8)


def test_the_home_folder_is_understood_wherever_films_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    (tmp_path/'films').mkdir()
    flat(tmp_path/'films'/'a.png', 50)
    table = pd.DataFrame(dict(image=['a.png'], patient=['1'], A=[1.]))
    table.attrs['labels'] = ['A']
    assert len(PixelCache(table, '~/films', 16, cache_dir=tmp_path/'c', progress=False)) == 1
    found = audit(table, '~/films', read=read_film, progress=False, verbose=False)
    assert 'missing film' not in set(found.check)
