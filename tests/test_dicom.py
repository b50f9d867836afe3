"DICOM: one order of what decides the picture, tags that say nothing change nothing, and what is damaged is named"
import io
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from cxrlg.core import DataError
from cxrlg.films import read_film
from test_films import dicom, ramp, transcode

pydicom = pytest.importorskip('pydicom')
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')
SAME = settings(derandomize=True, deadline=None, database=None, max_examples=60)
FOLDER = tempfile.TemporaryDirectory()


def film(size=64, top=3000):
    "Twelve bits: dark above, bright below, with noise"
    a = np.linspace(200, top, size * size).reshape(size, size) + np.random.default_rng(0).normal(0, 20, (size, size))
    return a.clip(0, 4095).round()


def shown(a, bits=12, photometric='MONOCHROME2', size=64, raw=None, **tags):
    "The film as it is read; `raw` are tags as bytes, as another program may have written them"
    path = dicom(Path(FOLDER.name) / 'a.dcm', a, bits, photometric, **tags)
    if raw: path.write_bytes(with_raw(path.read_bytes(), **raw))
    return read_film(path, size)


def with_raw(data, **tags):
    "A file of explicit little endian whose last tags before the pixels are these, in the order given"
    at = data.rindex(struct.pack('<HH', 0x7FE0, 0x10))
    for name, value in tags.items():
        tag = pydicom.datadict.tag_for_keyword(name)
        value += b' ' * (len(value) % 2)
        item = struct.pack('<HH2sH', tag >> 16, tag & 0xFFFF, pydicom.datadict.dictionary_VR(tag).encode(), len(value)) + value
        data, at = data[:at] + item + data[at:], at + len(item)
    return data


def lut(n, first, bits, data):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [n % 65536, first, bits], np.asarray(data, '<u2').tobytes()
    return Sequence([item])


def nothing(**tags): return pytest.param(tags, id=str(tags)[:60])


NOTHING = [
    nothing(WindowCenter=None, WindowWidth=None), nothing(WindowCenter='', WindowWidth=''),
    nothing(WindowCenter=[], WindowWidth=[]),
    nothing(WindowCenter=2048, WindowWidth=0), nothing(WindowCenter=2048, WindowWidth=1),
    nothing(WindowCenter=2048, WindowWidth=-400),
    nothing(WindowCenter=2048, WindowWidth=None), nothing(WindowCenter=None, WindowWidth=400),
    nothing(WindowWidth=400),
    nothing(WindowCenter=2048, WindowWidth=4096), nothing(WindowCenter=2047.5, WindowWidth=4095),
    nothing(WindowCenter=32768, WindowWidth=65536),
    nothing(WindowCenter=60000, WindowWidth=100), nothing(WindowCenter=-9000, WindowWidth=100),
    nothing(WindowCenter=[60000, 1], WindowWidth=[10, 0]),
    nothing(WindowCenter=2048, WindowWidth=0, VOILUTFunction='LINEAR_EXACT'),
    nothing(WindowCenter=2048, WindowWidth=0, VOILUTFunction='SIGMOID'),
    nothing(WindowCenter=2048, WindowWidth=4095, VOILUTFunction='LINEAR_EXACT'),
    nothing(RescaleSlope=1, RescaleIntercept=0), nothing(RescaleSlope=None, RescaleIntercept=None),
    nothing(RescaleSlope=0, RescaleIntercept=0),
    nothing(RescaleSlope=0, RescaleIntercept=-1024), nothing(RescaleIntercept=0), nothing(RescaleSlope=1),
    nothing(VOILUTSequence=Sequence([])), nothing(VOILUTSequence=Sequence([Dataset()])),
    nothing(VOILUTSequence=lut(4096, 0, 16, np.full(4096, 7))),
    nothing(VOILUTSequence=lut(4096, 0, 12, np.arange(4096))),
    nothing(VOILUTSequence=lut(4096, 0, 8, np.arange(4096) // 16)),
    nothing(ModalityLUTSequence=Sequence([])), nothing(ModalityLUTSequence=Sequence([Dataset()])),
    nothing(PixelPaddingValue=None), nothing(PixelPaddingValue=4095),
    nothing(PixelPaddingValue=0, PixelPaddingRangeLimit=4095), nothing(PixelPaddingRangeLimit=0),
    nothing(NumberOfFrames=1), nothing(NumberOfFrames=None), nothing(NumberOfFrames=0),
    nothing(VOILUTFunction='LINEAR'), nothing(VOILUTFunction=''),
    nothing(PresentationLUTShape='IDENTITY'), nothing(SmallestImagePixelValue=None, LargestImagePixelValue=None),
]


@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
@pytest.mark.parametrize('tags', NOTHING)
def test_a_tag_that_says_nothing_changes_nothing(tags, photometric):
    a = film()
    a[5, 5] = 4094
    assert np.array_equal(shown(a, photometric=photometric, **tags), shown(a, photometric=photometric))


EIGHT = [
    nothing(WindowCenter=128, WindowWidth=256), nothing(WindowCenter=127.5, WindowWidth=255),
    nothing(WindowCenter='', WindowWidth=''),
    nothing(RescaleSlope=1, RescaleIntercept=0), nothing(RescaleSlope=2, RescaleIntercept=-100),
    nothing(RescaleSlope=1, RescaleIntercept=-1024),
    nothing(VOILUTSequence=lut(256, 0, 8, np.arange(256))),
    nothing(VOILUTSequence=lut(256, 0, 16, np.arange(256) * 257)), nothing(PixelPaddingValue=255),
]


@pytest.mark.parametrize('tags', EIGHT)
def test_eight_bits_without_a_window_stay_as_they_are(tags):
    a = ramp() // 2 + 40
    assert np.array_equal(shown(a, 8, **tags), a) and np.array_equal(shown(a, 8, 'MONOCHROME1', **tags), 255 - a)


TAGS = dict(
    WindowCenter=[None, '', 2048], WindowWidth=[None, '', 0, 4096, -1], VOILUTFunction=[None, '', 'LINEAR'],
    RescaleSlope=[None, 1, 0], RescaleIntercept=[None, 0], PixelPaddingValue=[None, 4094], NumberOfFrames=[None, 0, 1],
    VOILUTSequence=[Sequence([]), Sequence([Dataset()])], ModalityLUTSequence=[Sequence([]), Sequence([Dataset()])],
)


@SAME
@given(st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in TAGS.items()}),
       st.sampled_from(['MONOCHROME1', 'MONOCHROME2']), st.sampled_from([8, 12, 16]))
def test_tags_present_empty_or_contradictory(tags, photometric, bits):
    "Any of them together"
    a = film() if bits > 8 else ramp()
    if bits == 8: tags = {k: v for k, v in tags.items() if k not in ('WindowCenter', 'PixelPaddingValue')}
    if bits == 16: tags = {k: v for k, v in tags.items() if (k, v) != ('WindowWidth', 4096)}
    assert np.array_equal(shown(a, bits, photometric, **tags), shown(a, bits, photometric))


@SAME
@given(st.floats(500, 2500), st.floats(50, 3000), st.sampled_from([None, 'LINEAR', 'LINEAR_EXACT', 'SIGMOID', 'linear ', 'OTHER']),
       st.sampled_from([(1, 0), (2, -100), (-2, 9000), (.5, 0)]))
@example(1000., 50., None, (-2, 9000))
def test_windows_that_say_something(center, width, function, line):
    "The same film whatever slope and intercept: the window is given behind them. Bright stays bright where the slope rises"
    slope, intercept = line
    a, tags = film(), dict(WindowCenter=round(center * slope + intercept, 4), WindowWidth=round(width * abs(slope), 4))
    if function: tags['VOILUTFunction'] = function
    got = shown(a, RescaleSlope=slope, RescaleIntercept=intercept, **tags).astype(float)
    d = (a - center) / width
    want = np.clip(d + .5, 0, 1) if function != 'SIGMOID' else 1 / (1 + np.exp(-4 * d))
    want = (want - want.min()) / np.ptp(want) * 255
    assert np.abs(got - (want if slope > 0 else 255 - want)).max() <= 255 / (width * abs(slope) - 1) + 2


@pytest.mark.parametrize('name', ['VOILUTSequence', 'ModalityLUTSequence'])
@pytest.mark.parametrize('table', [lut(10, 100, 8, np.arange(5)), lut(4096, 0, 16, [4000]), lut(1, 0, 16, [4000]),
                                   lut(256, 9000, 16, np.arange(256))])
def test_tables_that_cannot_be_meant(name, table):
    "Shorter than they say, of one entry, or beyond every value of the film"
    assert np.array_equal(shown(film(), **{name: table}), shown(film()))


# ---- padding

@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
@pytest.mark.parametrize('value, limit', [(4095, None), (0, None), (4000, 4095), (4095, 4000), (0, 100)])
def test_padding_is_no_picture_and_shown_black(photometric, value, limit):
    a = film()
    a[:16] = value
    a[:4] = value if limit is None else limit
    tags = dict(PixelPaddingValue=value) | ({} if limit is None else dict(PixelPaddingRangeLimit=limit))
    got, alone = shown(a, photometric=photometric, **tags), shown(film()[16:], photometric=photometric, size=64)
    assert (got[:16] == 0).all() and np.ptp(got[16:].astype(int)) > 240
    assert abs(int(got[16].mean()) - int(alone[0].mean())) <= 3 and abs(int(got[-1].mean()) - int(alone[-1].mean())) <= 3


@pytest.mark.parametrize('window', [dict(), dict(WindowCenter=1500, WindowWidth=1000), dict(WindowCenter=2000, WindowWidth=3900)])
def test_padding_outside_a_window_as_well(window):
    a = film()
    a[:16] = 4095
    inside = shown(a, PixelPaddingValue=4095, **window)
    assert (inside[:16] == 0).all() and np.ptp(inside[16:].astype(int)) > 240


def test_padding_of_signed_values():
    a = film() - 1000
    a[:16] = -2000
    for value in (-2000, 65536 - 2000):
        bits = dict(PixelRepresentation=1, BitsStored=16, HighBit=15)
        path = dicom(Path(FOLDER.name) / 's.dcm', a.astype('int16').view('uint16'), 12, **bits)
        ds = pydicom.dcmread(path)
        ds.add_new(0x00280120, 'SS' if value < 0 else 'US', value)
        ds.save_as(path)
        got = read_film(path, 64)
        assert (got[:16] == 0).all() and np.ptp(got[16:].astype(int)) > 240


# ---- hot pixels and markers

WIDE = [dict(), dict(WindowCenter='', WindowWidth=''),
        dict(WindowCenter=32767, WindowWidth=65535), dict(WindowCenter=30000, WindowWidth=60000)]


@pytest.mark.parametrize('window', WIDE, ids=str)
def test_a_hot_pixel_or_a_burnt_in_marker_is_not_the_end_of_the_range(window):
    a = film()
    without = shown(a, 16)
    for place, value in (((10, 10), 65535), ((slice(30, 34), slice(30, 34)), 60000)):
        marked = a.copy()
        marked[place] = value
        got = shown(marked, 16, **window).astype(int)
        assert np.abs(np.delete(got, slice(28, 36), 0)[12:] - np.delete(without.astype(int), slice(28, 36), 0)[12:]).max() <= 4


def test_a_window_within_the_film_keeps_its_ends():
    a = film()
    got = shown(a, WindowCenter=1500, WindowWidth=1001)
    assert np.abs(got - np.clip((a - 999.5) / 1000, 0, 1) * 255).max() <= 1
    assert np.array_equal(got, shown(a, WindowCenter=[1500, 700], WindowWidth=[1001, 90]))
    assert np.array_equal(got, shown(a, WindowCenter=[2048, 1500], WindowWidth=[0, 1001]))


# ---- text that is not as it should be

@pytest.mark.parametrize('text', [b'1500,0', b' 1500.0 ', b'1500,0\\700,5', b'+1500', b'1,5E3'])
def test_decimal_commas(text):
    "A comma in decimal text is a decimal point"
    want = shown(film(), WindowCenter=1500, WindowWidth=1001)
    widths = b'1001,0\\90' if b'\\' in text else b'1001,0'
    raw = dict(WindowCenter=text, WindowWidth=widths, RescaleIntercept=b'0,0', RescaleSlope=b'1,0')
    assert np.array_equal(shown(film(), raw=raw), want)


@pytest.mark.parametrize('text', [b'wide', b'1.500,0', b'\\', b'NaN', b'inf', b'1e400', b'\xff\xfe', b'1500 1400'])
def test_text_that_is_no_number_says_nothing(text):
    raw = dict(WindowCenter=text, WindowWidth=text, RescaleIntercept=text, RescaleSlope=text)
    assert np.array_equal(shown(film(), raw=raw), shown(film()))


@pytest.mark.parametrize('syntax', ['ImplicitVRLittleEndian', 'ExplicitVRLittleEndian', 'ExplicitVRBigEndian'])
def test_no_transfer_syntax(tmp_path, syntax):
    path, little = dicom(tmp_path / 'a.dcm', film()), 'Big' not in syntax
    want, ds = read_film(path, 64), pydicom.dcmread(path)
    if not little: ds.PixelData = np.frombuffer(ds.PixelData, '<u2').astype('>u2').tobytes()
    del ds.file_meta.TransferSyntaxUID
    pydicom.dcmwrite(path, ds, implicit_vr='Implicit' in syntax, little_endian=little, enforce_file_format=False)
    assert np.array_equal(read_film(path, 64), want)


def test_no_transfer_syntax_and_compressed(tmp_path):
    assert transcode(dicom(tmp_path / 'a.dcm', film()), tmp_path / 'b.dcm', 'JPEGLosslessProcess14_1')
    ds = pydicom.dcmread(tmp_path / 'b.dcm')
    del ds.file_meta.TransferSyntaxUID
    ds.save_as(tmp_path / 'b.dcm', implicit_vr=False, little_endian=True, enforce_file_format=False)
    with pytest.raises(DataError, match='header names no transfer syntax: ask for'): read_film(tmp_path / 'b.dcm')


@pytest.mark.parametrize('name', ['Rows', 'Columns', 'BitsAllocated', 'BitsStored', 'PixelRepresentation', 'SamplesPerPixel',
                                  'PhotometricInterpretation'])
@pytest.mark.parametrize('empty', [False, True])
def test_a_header_with_a_gap(tmp_path, name, empty):
    ds = pydicom.dcmread(dicom(tmp_path / 'a.dcm', film()))
    if empty: setattr(ds, name, None)
    else: delattr(ds, name)
    ds.save_as(tmp_path / 'a.dcm')
    message = f'a.dcm is DICOM whose header lacks {name}: ask for the original file'
    with pytest.raises(DataError, match=message): read_film(tmp_path / 'a.dcm')


# ---- palettes, one bit, few bits, colour

def palette(entries, bits):
    table = np.asarray(entries)
    return {f'{c}PaletteColorLookupTable{part}': value for c in ('Red', 'Green', 'Blue')
            for part, value in (('Descriptor', [len(table), 0, bits]), ('Data', table.astype('<u2' if bits == 16 else 'u1').tobytes()))}


@pytest.mark.parametrize('bits, entries', [(16, np.arange(256)[::-1] * 257), (8, np.arange(256)[::-1]), (16, np.arange(256)[::-1])])
def test_a_palette_is_looked_up(bits, entries):
    assert np.abs(shown(ramp(), 8, 'PALETTE COLOR', **palette(entries, bits)).astype(int) - (255 - ramp())).max() <= 1


def test_a_palette_that_is_missing():
    message = 'is DICOM with a palette that is missing or damaged: save it in grey'
    with pytest.raises(DataError, match=message): shown(ramp(), 8, 'PALETTE COLOR')


def test_grey_values_called_colour():
    with pytest.raises(DataError, match='is DICOM of photometric interpretation RGB and one channel'): shown(ramp(), 8, 'RGB')


@pytest.mark.parametrize('bits', [1, 4, 6, 7])
def test_few_bits_use_the_whole_range(bits):
    a = ramp() >> (8 - bits)
    got = shown(a, 8, BitsStored=bits, HighBit=bits - 1)
    assert got.min() == 0 and got.max() == 255 and np.abs(got - a / (2**bits - 1) * 255).max() <= 3
    assert np.abs(shown(a, 8, 'MONOCHROME1', BitsStored=bits, HighBit=bits - 1) - (255. - got)).max() <= 1


def test_one_bit_packed(tmp_path):
    bits = ramp() > 127
    ds = pydicom.dcmread(dicom(tmp_path / 'a.dcm', ramp(), 8, BitsAllocated=1, BitsStored=1, HighBit=0))
    ds.PixelData = np.packbits(bits, bitorder='little').tobytes()
    ds.save_as(tmp_path / 'a.dcm')
    assert np.array_equal(read_film(tmp_path / 'a.dcm', 64), bits * np.uint8(255))


def test_photometric_interpretation_in_small_letters():
    for kind in ('monochrome1', 'Monochrome2'):
        assert np.array_equal(shown(film(), photometric=kind), shown(film(), photometric=kind.upper()))


@pytest.mark.parametrize('signed', [False, True])
def test_modality_and_voi_tables(signed):
    "A table that is turned over makes bright what was dark, twice turned over is as before; stored values may be negative"
    a, first = film(), -2048 if signed else 0
    stored = (a + first).astype('int16').view('uint16') if signed else a
    over = np.arange(4096)[::-1] * 16
    tags = dict(PixelRepresentation=int(signed), BitsStored=16, HighBit=15, ModalityLUTSequence=lut(4096, first, 16, over))
    once = shown(stored, 12, **tags).astype(int)
    twice = shown(stored, 12, VOILUTSequence=lut(0, 0, 16, np.arange(65536)[::-1]), **tags)
    assert np.abs(once - (255 - shown(a).astype(int))).max() <= 3 and np.corrcoef(twice.ravel(), a.ravel())[0, 1] > .99


# ---- damage

SYNTAXES = ['RLELossless', 'JPEGLosslessProcess14', 'JPEGLosslessProcess14_1', 'JPEGLSLossless', 'JPEG2000Lossless',
            'JPEGBaselineProcess1', 'JPEGExtendedProcess2_4', 'JPEG2000']


def compressed(path, syntax):
    "A DICOM file, and the frame in it"
    bits = 8 if 'Baseline' in syntax or 'Extended' in syntax else 12
    assert transcode(dicom(path, film(96) // (1 if bits == 12 else 16), bits), path, syntax)
    return next(pydicom.encaps.generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))


def with_frame(path, frame):
    ds = pydicom.dcmread(path)
    ds.PixelData = pydicom.encaps.encapsulate([frame])
    ds.save_as(path.with_name('z.dcm'))
    return path.with_name('z.dcm')


@pytest.mark.parametrize('lenient', [False, True])
@pytest.mark.parametrize('syntax', SYNTAXES)
def test_a_frame_that_ends_early(tmp_path, syntax, lenient, monkeypatch):
    pytest.importorskip('gdcm')
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', lenient)
    frame = compressed(tmp_path / 'a.dcm', syntax)
    assert read_film(with_frame(tmp_path / 'a.dcm', frame), 96).shape == (96, 96)
    for share in (.1, .3, .5, .7, .9, .98):
        k = int(len(frame) * share)
        for data in (frame[:k], frame[:k] + bytes(len(frame) - k), frame[:k] + b'\xff\xd9'):
            with pytest.raises(DataError, match='z.dcm') as e: read_film(with_frame(tmp_path / 'a.dcm', data), 96)
            assert '\n' not in str(e.value) and 'NoneType' not in str(e.value)


@pytest.mark.parametrize('syntax', [None, 'DeflatedExplicitVRLittleEndian', *SYNTAXES])
def test_a_file_that_ends_early(tmp_path, syntax):
    pytest.importorskip('gdcm')
    dicom(tmp_path / 'a.dcm', film(96))
    if syntax and 'Deflated' in syntax: assert transcode(tmp_path / 'a.dcm', tmp_path / 'a.dcm', syntax)
    elif syntax: compressed(tmp_path / 'a.dcm', syntax)
    data = (tmp_path / 'a.dcm').read_bytes()
    for share in (.1, .3, .5, .7, .9, .98):
        k = int(len(data) * share)
        tails = [b''] if syntax is None else [b'', bytes(len(data) - k)]
        for tail in tails:
            (tmp_path / 'z.dcm').write_bytes(data[:k] + tail)
            with pytest.raises(DataError, match='z.dcm') as e: read_film(tmp_path / 'z.dcm', 96)
            assert '\n' not in str(e.value) and 'object has no attribute' not in str(e.value)


@SAME
@given(st.integers(0, 10**9), st.binary(min_size=1, max_size=12), st.booleans())
def test_changed_bytes_of_the_header_end_in_a_picture_or_one_line(at, new, cut):
    "Where the header's own bytes are changed, nothing but a picture or one line comes out"
    path = dicom(Path(FOLDER.name) / 'h.dcm', film())
    data = bytearray(path.read_bytes())
    at %= len(data) - 2 * 64 * 64
    if cut: del data[at:at + len(new)]
    else: data[at:at + len(new)] = new
    path.write_bytes(data)
    with warnings.catch_warnings(action='ignore'):
        try: assert read_film(path, 64).shape == (64, 64)
        except DataError as e: assert 'h.dcm' in str(e) and '\n' not in str(e) and 'object has no attribute' not in str(e)


def test_a_jpeg_header_that_would_end_the_process(tmp_path):
    "Tables that are named and not there: another library's decoder ends the whole process over them"
    pytest.importorskip('gdcm')
    frame = compressed(tmp_path / 'a.dcm', 'JPEGBaselineProcess1')
    at = frame.index(b'\xff\xc0')
    table = frame.index(b'\xff\xc4')
    damaged = [frame[:at+12] + b'\x6b' + frame[at+13:], frame[:table+20] + frame[table+21:], frame[:at] + b'\0' + frame[at:]]
    damaged += [frame.replace(b'\xff\xc4', b'\xff\xec'), frame.replace(b'\xff\xdb', b'\xff\xeb')]
    for data in damaged:
        with pytest.raises(DataError, match='its header contradicts itself'): read_film(with_frame(tmp_path / 'a.dcm', data), 96)


def test_a_jpeg_of_another_size_than_its_tags(tmp_path):
    pytest.importorskip('gdcm')
    compressed(tmp_path / 'a.dcm', 'JPEGBaselineProcess1')
    f = io.BytesIO()
    Image.fromarray(ramp()).save(f, 'JPEG')
    with pytest.raises(DataError, match='its header contradicts itself'): read_film(with_frame(tmp_path / 'a.dcm', f.getvalue()), 96)


@pytest.mark.parametrize('syntax', ['JPEG2000', 'JPEG2000Lossless'])
def test_a_jpeg_2000_picture_of_another_size_than_its_tags(tmp_path, syntax):
    "A size of millions would keep the decoder busy for minutes"
    pytest.importorskip('gdcm')
    frame = compressed(tmp_path / 'a.dcm', syntax)
    for place, value in ((8, 10**6), (12, 97), (16, 5), (24, 0)):
        data = frame[:place] + value.to_bytes(4, 'big') + frame[place+4:]
        with pytest.raises(DataError, match='its header contradicts itself'): read_film(with_frame(tmp_path / 'a.dcm', data), 96)


def test_a_jpeg_of_absurd_precision(tmp_path):
    pytest.importorskip('gdcm')
    frame = compressed(tmp_path / 'a.dcm', 'JPEGBaselineProcess1')
    at = frame.index(b'\xff\xc0') + 4
    for bits in (0, 7, 12, 24, 255):
        with pytest.raises(DataError, match='its header contradicts itself'):
            read_film(with_frame(tmp_path / 'a.dcm', frame[:at] + bytes([bits]) + frame[at+1:]), 96)


# ---- tags that contradict the picture

def test_values_of_more_bits_than_the_tags_give_them_are_refused():
    "Cut to the bits of the tags they would wrap around"
    a = film()
    for bits in (8, 10, 11):
        with pytest.raises(DataError, match=rf'need more than the {bits} bits of its header \(BitsStored\)'):
            shown(a, BitsStored=bits, HighBit=bits-1)
    assert np.array_equal(shown(a, BitsStored=16, HighBit=15), shown(a))
    with pytest.raises(DataError, match='need more than the 12 bits'): shown((a - 1000) % 65536)


def test_values_moved_up_are_moved_down():
    a = film()
    assert np.array_equal(shown(a * 16, HighBit=15), shown(a))
    assert np.array_equal(shown(a * 16 + 7, HighBit=15, WindowCenter=1000, WindowWidth=500), shown(a, WindowCenter=1000, WindowWidth=500))
    assert np.array_equal(shown(a, HighBit=15), shown(a)) # they lie where they would without the tag
    assert np.array_equal(shown(a, HighBit=40), shown(a))


def test_bits_of_an_overlay_are_no_picture():
    a, overlay = film(), np.zeros((64, 64))
    overlay[20:30, 20:30] = 1
    path = dicom(Path(FOLDER.name) / 'o.dcm', a + overlay * 2**14)
    assert np.array_equal(read_film(path, 64), shown(a)) # few, and the same wherever they are
    ds = pydicom.dcmread(path)
    ds.add_new((0x6002, 0x0102), 'US', 14)
    ds.save_as(path)
    assert np.array_equal(read_film(path, 64), shown(a))


def test_padding_of_more_bits_than_stored_is_padding():
    a = film()
    a[:8] = 65535
    got = shown(a, PixelPaddingValue=65535)
    assert (got[:8] == 0).all() and np.abs(got[9:].astype(int) - shown(film())[9:]).max() <= 40


@pytest.mark.parametrize('extended', [True, False])
def test_signed_values_whether_the_bits_above_repeat_the_sign(extended):
    a = film() - 2048
    assert np.array_equal(shown(a % (65536 if extended else 4096), PixelRepresentation=1), shown(film()))


def big_endian(path):
    "A film as big-endian, each word of it swapped"
    ds = pydicom.dcmread(path)
    ds.PixelData = np.frombuffer(ds.PixelData, '<u2').byteswap().tobytes()
    for name in ('VOILUTSequence', 'ModalityLUTSequence'):
        for item in ds.get(name, []): item['LUTData'].value = np.frombuffer(item.LUTData, '<u2').byteswap().tobytes()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    target = path.with_name('big.dcm')
    pydicom.dcmwrite(target, ds, implicit_vr=False, little_endian=False)
    return target


@pytest.mark.parametrize('name', ['VOILUTSequence', 'ModalityLUTSequence'])
@pytest.mark.parametrize('bits', [8, 16])
def test_tables_of_a_big_endian_file(tmp_path, name, bits):
    table, entries = Dataset(), (np.sqrt(np.linspace(0, 1, 4096)) * (2**bits - 1)).round()
    table.add_new('LUTDescriptor', 'US', [4096, 0, bits])
    table.add_new('LUTData', 'OW', entries.astype('<u2' if bits == 16 else 'u1').tobytes())
    path = dicom(tmp_path / 'a.dcm', film(), **{name: Sequence([table])})
    assert not np.array_equal(read_film(path, 64), shown(film()))
    assert np.array_equal(read_film(big_endian(path), 64), read_film(path, 64))


def retagged(path, **tags):
    ds = pydicom.dcmread(path)
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path.with_name('z.dcm'))
    return path.with_name('z.dcm')


@pytest.mark.parametrize('syntax', ['RLELossless', 'JPEGLSLossless', 'JPEG2000Lossless', 'JPEGLosslessProcess14_1'])
def test_fewer_rows_or_bits_in_the_tags_than_in_a_compressed_picture(tmp_path, syntax):
    "Half a film would pass for a film"
    pytest.importorskip('gdcm')
    compressed(tmp_path / 'a.dcm', syntax)
    for tags in (dict(Rows=48), dict(Rows=95), dict(Rows=97), dict(Columns=48)):
        with pytest.raises(DataError, match='its header contradicts itself|is DICOM'): read_film(retagged(tmp_path / 'a.dcm', **tags), 96)
    with pytest.raises(DataError, match='need more than the 10 bits'):
        read_film(retagged(tmp_path / 'a.dcm', BitsStored=10, HighBit=9), 96)
    assert read_film(retagged(tmp_path / 'a.dcm', BitsStored=16, HighBit=15), 96).std() > 20


def test_more_bytes_than_the_tags_say(tmp_path):
    path = dicom(tmp_path / 'a.dcm', film())
    for tags in (dict(Rows=32), dict(Rows=63), dict(Columns=60)):
        with pytest.raises(DataError, match='its picture is not what its header says'): read_film(retagged(path, **tags), 64)
    odd = dicom(tmp_path / 'odd.dcm', ramp()[:63, :63], 8)
    ds = pydicom.dcmread(odd)
    assert len(ds.PixelData) == 63 * 63 + 1 and np.abs(read_film(odd, 63).astype(int) - ramp()[:63, :63]).max() == 0


@pytest.mark.parametrize('syntax', ['JPEG2000', 'JPEG2000Lossless'])
def test_holes_in_a_jpeg_2000_picture(tmp_path, syntax):
    pytest.importorskip('gdcm')
    frame = compressed(tmp_path / 'a.dcm', syntax)
    start, end = frame.index(b'\xff\x93') + 2, frame.rindex(b'\xff\xd9')
    for at, n in ((start + 600, 512), (start + (end - start) // 2, 512), (start + (end - start) * 3 // 10, (end - start) * 7 // 10)):
        n = min(n, end - at)
        with pytest.raises(DataError, match='there is a hole in its data'):
            read_film(with_frame(tmp_path / 'a.dcm', frame[:at] + bytes(n) + frame[at+n:]), 96)


@pytest.mark.parametrize('kind', ['flat', 'half', 'border', 'ramp', 'noise'])
@pytest.mark.parametrize('options', [{}, dict(tile_size=(64, 64)), dict(precinct_size=(64, 64), codeblock_size=(16, 16)),
                                     dict(quality_layers=[40, 20, 10, 0], precinct_size=(32, 32), codeblock_size=(8, 8))], ids=str)
def test_whole_jpeg_2000_pictures_of_many_empty_packets(tmp_path, kind, options):
    pytest.importorskip('gdcm')
    a = np.full((512, 512), 700, 'uint16')
    if kind == 'half': a[:256] = film(512)[:256]
    if kind == 'border': a[200:300, 200:300] = film(100)
    if kind == 'ramp': a += np.arange(512, dtype='uint16')
    if kind == 'noise': a = film(512).astype('uint16')
    f = io.BytesIO()
    Image.fromarray(a).save(f, 'JPEG2000', no_jp2=True, irreversible=False, **options)
    f.seek(0)
    ds = pydicom.dcmread(dicom(tmp_path / 'a.dcm', np.asarray(Image.open(f)), 16))
    ds.PixelData, ds.file_meta.TransferSyntaxUID = pydicom.encaps.encapsulate([f.getvalue()]), pydicom.uid.JPEG2000Lossless
    ds.save_as(tmp_path / 'b.dcm')
    assert np.array_equal(read_film(tmp_path / 'b.dcm', 64), read_film(tmp_path / 'a.dcm', 64))


@pytest.mark.parametrize('syntax', ['JPEG2000Lossless', 'RLELossless'])
def test_signed_values_tagged_as_without_a_sign_are_refused(tmp_path, syntax):
    pytest.importorskip('gdcm')
    path = dicom(tmp_path / 'a.dcm', (film(96) - 2048) % 65536, PixelRepresentation=1)
    assert transcode(path, tmp_path / 'b.dcm', syntax)
    assert np.array_equal(read_film(tmp_path / 'b.dcm', 96), read_film(path, 96))
    with pytest.raises(DataError, match='header contradicts itself|need more than the 12 bits'):
        read_film(retagged(tmp_path / 'b.dcm', PixelRepresentation=0), 96)


def test_a_film_without_a_preamble():
    from cxrlg.dicom import is_dicom, read_dicom
    data = dicom(Path(FOLDER.name) / 'p.dcm', film()).read_bytes()
    bare = data[data.index(b'\x08\0\x16\0UI'):]
    for whole in (data, data[132:], bare):
        assert is_dicom(whole[:132]) and np.array_equal(read_dicom(io.BytesIO(whole)), read_dicom(io.BytesIO(data)))
    others = [b'', bytes(200), b'\x08\0', b'<html>' * 50, b'\x89PNG' + bytes(200), b'\x08\0' + b'\xff' * 200]
    assert not any(map(is_dicom, others))
