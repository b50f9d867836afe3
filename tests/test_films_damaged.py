"A film is whole or named: bytes lost, zeroed or changed anywhere, whatever another library told Pillow"
import functools
import io
import re
import struct
import tempfile
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from cxrlg.core import DataError
from cxrlg.films import read_film
from cxrlg.pictures import check_jpeg, check_jpeg_header, read_picture

SAME = settings(derandomize=True, deadline=None, database=None, max_examples=60)


def film(n=160, seed=1):
    "Dark left, bright right, with noise, and a flat black border above and below"
    a = np.tile(np.linspace(40, 200, n), (n, 1)) + np.random.default_rng(seed).normal(0, 8, (n, n))
    a[:16] = a[-16:] = 0
    return np.clip(a, 0, 255).astype('uint8')


def saved(format, mode='L', **options):
    a = film()
    img = Image.fromarray(a) if mode != 'RGB' else Image.fromarray(np.stack([a, a // 2 + 9, a], -1))
    if mode == 'I;16': img = Image.fromarray(a.astype('uint16') * 16)
    f = io.BytesIO()
    (img if mode in ('L', 'RGB', 'I;16') else img.quantize(90) if mode == 'P' else img.convert(mode)).save(f, format, **options)
    return f.getvalue()


PNGS = {
    'L': dict(), 'RGB': dict(mode='RGB'), 'P': dict(mode='P', transparency=0), 'RGBA': dict(mode='RGBA'), 'LA': dict(mode='LA'),
    '1': dict(mode='1'), 'I;16': dict(mode='I;16'), 'stored': dict(compress_level=0),
}
JPEGS = {
    'L': dict(quality=90), 'RGB': dict(mode='RGB'), 'CMYK': dict(mode='CMYK'), 'optimised': dict(optimize=True),
    'restarts': dict(restart_marker_rows=1), 'progressive': dict(progressive=True), 'progressive RGB': dict(mode='RGB', progressive=True),
}


@functools.cache
def png(name): return saved('PNG', **PNGS[name])


@functools.cache
def jpeg(name): return saved('JPEG', **JPEGS[name])


@pytest.fixture(params=[False, True], ids=['strict', 'lenient'])
def lenient(request, monkeypatch):
    "Another library of the process may have told Pillow to read what is truncated"
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', request.param)
    yield request.param
    assert request.param == ImageFile.LOAD_TRUNCATED_IMAGES


def read(path, data, size=64):
    "Pixels, or None where the film is refused by its name in one line"
    path.write_bytes(data)
    try: return read_film(path, size)
    except DataError as e: assert path.name in str(e) and '\n' not in str(e)


def broken_off(data):
    "A copy that ended early: cut, and zeros to the end of the file or to a block's end"
    for share in (.1, .3, .5, .7, .9, .99):
        k = int(len(data) * share)
        yield data[:k]
        yield data[:k] + bytes(len(data) - k)
    for k in (1, 2, 4, 8, 12, 13, 16): yield data[:-k]


@pytest.mark.parametrize('name', PNGS)
def test_png_broken_off(tmp_path, name, lenient):
    whole = read(tmp_path / 'a.png', png(name))
    for data in broken_off(png(name)):
        got = read(tmp_path / 'z.png', data)
        assert got is None or np.array_equal(got, whole) and data == png(name)


@pytest.mark.parametrize('name', JPEGS)
def test_jpeg_broken_off(tmp_path, name, lenient):
    for data in broken_off(jpeg(name)): assert read(tmp_path / 'z.jpg', data) is None


@pytest.mark.parametrize('name', JPEGS)
def test_jpeg_with_an_early_end_marker(tmp_path, name, lenient):
    "Fewer blocks, or fewer passes, than the header promises; also where the rest of the file follows, or is zeros"
    data = jpeg(name)
    for share in (.2, .3, .5, .7, .9):
        k = int(len(data) * share)
        for tail in (b'', bytes(300), data[k:]): assert read(tmp_path / 'z.jpg', data[:k] + b'\xff\xd9' + tail) is None


def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
def png_of(rows, w, h, interlaced=0):
    head = struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, interlaced)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('share', [0, .5, .99])
def test_png_of_fewer_rows_than_its_header_says(tmp_path, lenient, share):
    "All checksums are right, and the stream of pixels ends as such a stream does: an encoder that was stopped"
    for grey in (0, 89, 90, 91, 255):
        rows = b''.join(b'\0' + bytes([grey]) * 50 for _ in range(100))
        assert (read(tmp_path / 'a.png', png_of(rows, 50, 100)) == grey).all()
        assert read(tmp_path / 'z.png', png_of(rows[:int(len(rows) * share)], 50, 100)) is None


def test_interlaced_png_of_fewer_passes(tmp_path, lenient):
    rows = b''.join((b'\0' + bytes([90]) * cols) * n for cols, n in [(2, 2), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8)])
    assert (read(tmp_path / 'a.png', png_of(rows, 16, 16, 1)) == 90).all()
    for k in (1, 30, 140, 200): assert read(tmp_path / 'z.png', png_of(rows[:-k], 16, 16, 1)) is None


@SAME
@given(st.sampled_from(sorted(PNGS)), st.integers(0, 10**9), st.binary(min_size=1, max_size=40), st.booleans())
def test_changed_bytes_of_a_png(name, at, new, cut):
    data, path = bytearray(png(name)), Path(folder()) / 'a.png'
    at %= len(data)
    if cut: del data[at:at + len(new)]
    else: data[at:at + len(new)] = new[:len(data) - at]
    got, whole = read(path, bytes(data)), read(path, png(name))
    assert got is None or np.array_equal(got, whole)


@SAME
@given(st.sampled_from(sorted(JPEGS)), st.floats(0, .97), st.sampled_from(['cut', 'zero tail', 'early end']))
def test_ended_jpeg(name, share, how):
    "A JPEG has no checksums: what can be told is that something is missing"
    data, path = jpeg(name), Path(folder()) / 'a.jpg'
    k = int(len(data) * share)
    assert read(path, data[:k] + {'cut': b'', 'zero tail': bytes(len(data) - k), 'early end': b'\xff\xd9'}[how]) is None


@SAME
@given(st.sampled_from(sorted(JPEGS)), st.floats(0, 1), st.integers(100, 3000))
@example('L', .5, 512)
def test_holes_in_a_jpeg_are_seen_or_end_in_an_error_of_one_line(name, share, size):
    data, path = jpeg(name), Path(folder()) / 'a.jpg'
    k = int(len(data) * share)
    got = read(path, data[:k] + bytes(len(data[k:k+size])) + data[k+size:])
    assert got is None or got.shape == (64, 64)


@functools.cache
def folder(): return tempfile.mkdtemp()


@pytest.mark.parametrize('name', ['L', 'RGB', 'optimised', 'progressive'])
def test_holes_in_a_jpeg(tmp_path, name):
    data, seen = jpeg(name), []
    for share in np.linspace(.2, .9, 30):
        k = int(len(data) * share)
        seen.append(read(tmp_path / 'a.jpg', data[:k] + bytes(400) + data[k+400:]) is None)
    assert np.mean(seen) >= .9


# ---- intact films that are out of the ordinary

@pytest.mark.parametrize('grey', [0, 1, 89, 90, 91, 127, 128, 129, 255])
@pytest.mark.parametrize('options', [dict(), dict(optimize=True), dict(progressive=True), dict(restart_marker_rows=1), dict(quality=100)],
                         ids=str)
def test_flat_jpegs_are_whole(tmp_path, grey, options, lenient):
    "Grey where a decoder gives grey for what is missing, and long runs of zeros in the data"
    for shape in ((300, 700), (9, 13), (8, 8)):
        Image.fromarray(np.full(shape, grey, 'uint8')).save(tmp_path / 'a.jpg', **options)
        for size in (16, 64): assert (read_film(tmp_path / 'a.jpg', size) == grey).all()


@pytest.mark.parametrize('mode', ['RGB', 'CMYK', 'YCbCr'])
@pytest.mark.parametrize('progressive', [False, True])
def test_flat_colour_jpegs_are_whole(tmp_path, mode, progressive):
    for grey in (0, 90, 127, 128, 255):
        Image.new('RGB', (100, 60), (grey,) * 3).convert(mode).save(tmp_path / 'a.jpg', 'JPEG', progressive=progressive)
        assert np.abs(read_film(tmp_path / 'a.jpg', 16).astype(int) - grey).max() <= 1


@pytest.mark.parametrize('tail', [b'\0' * 500, b'\xff' * 9, b'<html>', jpeg('L')], ids=['zeros', 'fill', 'text', 'a film'])
def test_what_follows_the_end_does_not_matter(tmp_path, tail):
    for name, data in {'a.png': png('L'), 'a.jpg': jpeg('L')}.items():
        assert np.array_equal(read(tmp_path / name, data + tail), read(tmp_path / name, data))


@pytest.mark.parametrize('grey', [0, 90, 255])
@pytest.mark.parametrize('mode', ['L', '1', 'P', 'RGB', 'RGBA', 'LA', 'I;16'])
def test_flat_pngs_are_whole(tmp_path, grey, mode, lenient):
    if mode == '1': grey = 255 * (grey > 127)
    img = Image.new('L', (40, 30), grey)
    (Image.fromarray(np.full((30, 40), grey, 'uint16')) if mode == 'I;16' else img.convert(mode)).save(tmp_path / 'a.png')
    assert len(np.unique(read_film(tmp_path / 'a.png', 16))) == 1


def noted(**chunks):
    "A PNG with these chunks before its pixels"
    data = png('L')
    return data[:33] + b''.join(chunk(k.encode(), v) for k, v in chunks.items()) + data[33:]


LONG = zlib.compress(b'x' * 3_000_000)
NOTES = {
    'zTXt': noted(zTXt=b'history\0\0' + LONG),
    'iTXt': noted(iTXt=b'history\0\1\0\0\0' + LONG),
    'tEXt': noted(tEXt=b'history\0' + b'x' * 3_000_000),
    'iCCP': noted(iCCP=b'profile\0\0' + LONG),
    'iCCP damaged': noted(iCCP=b'profile\0\0' + b'no stream'),
    'zTXt damaged': noted(zTXt=b'history'),
    'orientation too long': noted(zTXt=b'Raw profile type exif\0\0' + LONG),
    'eXIf damaged': noted(eXIf=b'no exif'),
    'private': noted(prVt=bytes(3_000_000)),
    'XMP damaged': noted(iTXt=b'XML:com.adobe.xmp\0'),
    'profile of no hex': noted(zTXt=b'Raw profile type exif\0\0' + zlib.compress(b'\nexif\n 3\nzz')),
}


@pytest.mark.parametrize('name', NOTES)
def test_notes_and_profiles_do_not_refuse_a_film(tmp_path, name):
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    assert np.array_equal(read(tmp_path / 'a.png', NOTES[name], 160), film())
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_a_note_behind_the_pixels(tmp_path):
    data = png('L')
    assert np.array_equal(read(tmp_path / 'a.png', data[:-12] + chunk(b'zTXt', b'history\0\0' + LONG) + data[-12:], 160), film())


TURNS = {1: film(), 3: np.rot90(film(), 2), 6: np.rot90(film(), -1), 8: np.rot90(film()),
         2: film()[:, ::-1], 4: film()[::-1], 5: film().T, 7: np.rot90(film(), 2).T}


@pytest.mark.parametrize('turn', TURNS)
def test_orientation(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{turn}"/></x:xmpmeta>'.encode()
    assert np.array_equal(read(tmp_path / 'a.png', saved('PNG', exif=exif), 160), TURNS[turn])
    assert np.array_equal(read(tmp_path / 'a.png', noted(iTXt=b'XML:com.adobe.xmp\0\0\0\0\0' + xmp), 160), TURNS[turn])
    assert np.abs(read(tmp_path / 'a.jpg', saved('JPEG', exif=exif, quality=100), 160).astype(int) - TURNS[turn]).max() < 12


def test_damaged_exif_in_a_jpeg_says_nothing(tmp_path):
    data = jpeg('L')
    for body in (b'Exif\0\0', b'Exif\0\0MM\0*\0\0', b'Exif\0\0' + b'\xff' * 50, b'http://ns.adobe.com/xap/1.0/\0<a tiff:Orientation="x"/>'):
        with_exif = data[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + data[2:]
        assert np.array_equal(read(tmp_path / 'a.jpg', with_exif), read(tmp_path / 'a.jpg', data))


@pytest.mark.parametrize('format', ['TIFF', 'BMP', 'WEBP', 'GIF', 'JPEG2000'])
def test_other_formats_are_refused_by_name(tmp_path, format):
    with pytest.raises(DataError, match='a.png is not a PNG, JPEG or DICOM film'):
        Image.fromarray(film()).save(tmp_path / 'a.png', format)
        read_film(tmp_path / 'a.png')


def test_a_film_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*a): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('cxrlg.films.open', refuse, raising=False)
    with pytest.raises(DataError, match='a.png may not be read: change its permissions'): read_film(tmp_path / 'a.png')


def test_pillow_is_left_as_it_was_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    (tmp_path / 'a.png').write_bytes(png('L')[:-900])
    def look():
        for _ in range(20): read(tmp_path / 'b.jpg', jpeg('progressive'))
    threads = [threading.Thread(target=look) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert ImageFile.LOAD_TRUNCATED_IMAGES and np.asarray(Image.open(tmp_path / 'a.png')).shape == (160, 160)


# ---- the header of a JPEG

def test_headers_of_whole_jpegs_agree():
    for name in JPEGS: check_jpeg_header(jpeg(name), 160, 160, {'RGB': 3, 'progressive RGB': 3, 'CMYK': 4}.get(name, 1))


CONTRARY = [
    (b'\xff\xdb', b'\xff\xeb'), (b'\xff\xc4', b'\xff\xe4'), (b'\xff\xdb\x00\x43\x00', b'\xff\xdb\x00\x43\x05'),
    (b'\xff\xda\x00\x08\x01\x01\x00', b'\xff\xda\x00\x08\x01\x07\x00'), (b'\xff\xda\x00\x08\x01\x01\x00', b'\xff\xda\x00\x08\x01\x01\x33'),
]


@pytest.mark.parametrize('old, new', CONTRARY)
def test_a_header_that_contradicts_itself(old, new):
    assert old in jpeg('L')
    with pytest.raises(OSError, match='its header contradicts itself'): check_jpeg_header(jpeg('L').replace(old, new), 160, 160, 1)


def test_a_whole_jpeg_is_whole_however_unsure_its_last_pixel():
    for name in JPEGS: check_jpeg(jpeg(name), grey=True)
    with warnings.catch_warnings(action='error'): assert read_picture(jpeg('L'), 1).width >= 1


# ---- strips, smooth films and notes of a JPEG

@pytest.mark.parametrize('name', ['L', 'RGB', 'progressive'])
def test_every_strip_of_a_jpeg_is_there(tmp_path, name):
    "A film that lost strips, or has them in another order, though each of them is whole"
    data = saved('JPEG', **JPEGS[name], restart_marker_rows=2)
    whole, scan = read(tmp_path / 'a.jpg', data), data.index(b'\xff\xda')
    at = [scan + m.start() for m in re.finditer(rb'\xff[\xd0-\xd7]', data[scan:])]
    lost = [data[:at[0]] + b'\xff\xd9', data[:at[-1]] + b'\xff\xd9', data[:at[1]] + data[at[2]:]]
    lost += [data[:at[0]] + data[at[0]+2:], data[:at[1]] + data[at[2]:at[3]] + data[at[1]:at[2]] + data[at[3]:]]
    for damaged in lost: assert read(tmp_path / 'z.jpg', damaged) is None
    assert np.abs(whole.astype(int) - read(tmp_path / 'b.jpg', jpeg(name))).max() <= 1


@pytest.mark.parametrize('shape', [(64, 8), (97, 203), (160, 160)])
@pytest.mark.parametrize('progressive', [False, True])
def test_restart_markers_of_whole_jpegs_are_as_many_as_they_should_be(shape, progressive):
    "Grey and colour, one component a scan and several, blocks and rows"
    img = Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype='uint8'))
    options = [dict(restart_marker_rows=1), dict(restart_marker_blocks=3), dict(subsampling=2, restart_marker_blocks=5)]
    for mode in ('L', 'RGB'):
        for o in [*options, dict(subsampling=1, restart_marker_blocks=7), dict(restart_marker_blocks=60_000)]:
            f = io.BytesIO()
            img.convert(mode).save(f, 'JPEG', progressive=progressive, **(o if mode == 'RGB' else {k: o[k] for k in o if k[0] == 'r'}))
            assert read_picture(f.getvalue()).size == shape[::-1]


y, x = np.mgrid[:300, :300] / 300
SMOOTH = {
    'ramp': np.repeat(np.linspace(0, 100, 400).astype('uint8')[:, None], 400, 1), 'diagonal': (x + y) * 120,
    'circle': np.hypot(x - .5, y - .5) * 300, 'steps': np.floor(x * 10) * 20, 'weak': x * 150 + (x * 1e6 % 3),
    'border': np.where(np.hypot(x - .5, y - .5) < .3, 100 + 80 * np.sin(9 * x * y), 0),
}


@pytest.mark.parametrize('name', SMOOTH)
@pytest.mark.parametrize('progressive', [False, True])
def test_smooth_films_are_whole(name, progressive):
    "Long runs of zeros are usual where nothing changes, above all in the passes that add a bit"
    a = np.clip(SMOOTH[name], 0, 255).astype('uint8')
    for img in (Image.fromarray(a), Image.fromarray(np.stack([a, 255 - a, a // 2 + 50], -1))):
        for quality in (30, 85, 95):
            f = io.BytesIO()
            img.save(f, 'JPEG', quality=quality, progressive=progressive)
            assert read_picture(f.getvalue()).size == a.shape[::-1]


BROKEN_NOTES = {
    'Adobe': b'\xff\xee\0\x08Adobe\0', 'Photoshop': b'\xff\xed\0\x18Photoshop 3.0\x008BIM\3\xed\0', 'JFIF': b'\xff\xe0\0\6JFIF',
    'profile': b'\xff\xe2\0\x0eICC_PROFILE\0', 'EXIF': b'\xff\xe1\0\x08Exif\0\0', 'comment': b'\xff\xfe\0\2',
}


@pytest.mark.parametrize('note', BROKEN_NOTES)
@pytest.mark.parametrize('name', ['L', 'RGB', 'CMYK', 'progressive'])
def test_a_broken_note_does_not_refuse_a_jpeg(tmp_path, note, name):
    data = jpeg(name)
    noted = data[:2] + BROKEN_NOTES[note] + data[2:]
    assert np.array_equal(read(tmp_path / 'a.jpg', noted), read(tmp_path / 'b.jpg', data))


def test_a_png_of_sixteen_bits_and_colour_of_fewer_rows(tmp_path):
    head = struct.pack('>IIBBBBB', 20, 30, 16, 2, 0, 0, 0)
    for rows, whole in ((30, True), (20, False)):
        body = zlib.compress((b'\0' + bytes(range(120))) * rows)
        (tmp_path / 'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', body) + chunk(b'IEND', b''))
        if whole: assert read_film(tmp_path / 'a.png', 16).shape == (16, 16)
        else:
            with pytest.raises(DataError, match='it holds fewer rows than its header says'): read_film(tmp_path / 'a.png', 16)
