"""`python tests/fuzz.py [SECONDS] [SEED]`: films, tables, configurations and predictions, changed at random.
Each input must be read, or refused by a DataError of one line. What is neither is printed, with its seed, and kept as a file."""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from cxrlg.core import DataError, read_yaml
from cxrlg.data import audit, read_table
from cxrlg.films import read_film
from cxrlg.predictions import read_predictions
from cxrlg.study import read_config

JUNK = [b'', b'\0', b'\xff', b'\xef\xbb\xbf', b',', b'"', b'\n', b'\r', b';', b'\t', b'-1', b'1e309', b'nan', b'NA', b'=1+1', b'../',
        b'\xe9', b'0x10', b'007', b'1,5', b'- ', b': ', b'{', b'&a *a', b'\xc3\xa9', b'e\xcc\x81']
SECONDS = 60 # for one input: more is a find


def write_dicom(path, pixels, **tags):
    "An uncompressed DICOM film"
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1.1'
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=['film'])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 16, 12, 11, 0
    ds.PhotometricInterpretation = 'MONOCHROME2'
    ds.WindowCenter, ds.WindowWidth, ds.RescaleSlope, ds.RescaleIntercept = '2048', '4096', '1', '0'
    ds.PixelData = pixels.astype('<u2').tobytes()
    for name, value in tags.items(): setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)


def films(folder):
    "A whole film of each format"
    a = np.random.default_rng(0).integers(0, 256, (48, 40), dtype='uint8')
    img = Image.fromarray(a)
    saved = dict(grey='png', adam='png', wide='png', base='jpg', steps='jpg', tiff='tiff', bmp='bmp', webp='webp')
    more = dict(steps=dict(progressive=True, quality=90), base=dict(quality=90))
    for name, suffix in saved.items():
        picture = Image.fromarray(a.astype('uint16') * 257) if name == 'wide' else img
        picture.save(folder/f'{name}.{suffix}', **more.get(name, {}))
    write_dicom(folder/'plain.dcm', a.astype('uint16') * 16)
    write_dicom(folder/'inverse.dcm', a.astype('uint16') * 16, PhotometricInterpretation='MONOCHROME1', PixelPaddingValue=0)
    return [(film, p) for p in sorted(folder.iterdir()) if p.suffix in {'.png', '.jpg', '.dcm'}]


def film(path):
    "A film, read and checked"
    a = read_film(path, 32)
    assert a.shape == (32, 32) and a.dtype == np.uint8, (a.shape, a.dtype)


def labels(path):
    "A table of labels, read and audited"
    table = read_table('csv', path.parent, csv=path.name, image='image', patient='patient', labels=['Edema', 'Mass'],
                       verbose=False, exists=False)
    y = table[['Edema', 'Mass']].to_numpy()
    assert np.isin(y[~np.isnan(y)], [0, 1]).all(), y
    audit(table, None, verbose=False)


def nih(path):
    "A list of films as NIH gives it"
    read_table('nih', path.parent, csv=path.name, verbose=False, exists=False)


def predictions(path):
    "Predictions beside their labels"
    study = read_predictions([path], path.with_name('truth.csv'), verbose=False)
    arm = study.arms[0]
    p = study.probs(arm, study.grid(arm))
    assert ((p >= 0) & (p <= 1)).all(), p


def tables(folder):
    "A table of each kind"
    n = 40
    rng = np.random.default_rng(1)
    rows = pd.DataFrame(dict(image=[f'f{i}.png' for i in range(n)], patient=np.arange(n) // 2, sex=rng.choice(['F', 'M'], n), age=50))
    y = pd.DataFrame(rng.integers(0, 2, (n, 2)), columns=['Edema', 'Mass'])
    rows.join(y).to_csv(folder/'labels.csv', index=False)
    rows.join(y).to_csv(folder/'truth.csv', index=False)
    rows[['image']].join(pd.DataFrame(rng.random((n, 2)).round(4), columns=['Edema', 'Mass'])).to_csv(folder/'scores.csv', index=False)
    found = rng.choice(['Edema|Mass', 'No Finding', 'Hernia'], n)
    nih_rows = {'Image Index': [f'{i:08d}_000.png' for i in range(n)], 'Finding Labels': found, 'Follow-up #': 0,
                'Patient ID': np.arange(n) // 2, 'Patient Age': 50, 'Patient Gender': 'F', 'View Position': 'PA'}
    pd.DataFrame(nih_rows).to_csv(folder/'nih.csv', index=False)
    (folder/'study.yaml').write_text('study: mine\ndata: phantom\narms: [none, prox]\nseeds: [42, 43]\nsize: 64\nlr: 2.0e-3\n')
    return [(labels, folder/'labels.csv'), (predictions, folder/'scores.csv'), (nih, folder/'nih.csv'), (read_config, folder/'study.yaml'),
            (read_yaml, folder/'study.yaml')]


def changed(data, rng):
    "Bytes with one to four changes: other bytes, some left out, repeated, zeroed, or junk put in"
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 16, 200])
        how = rng.choice(['bytes', 'cut', 'again', 'zeros', 'junk', 'end'])
        if how == 'bytes': data[at:at + n] = rng.randbytes(len(data[at:at + n]))
        if how == 'cut': del data[at:at + n]
        if how == 'again': data[at:at] = data[at:at + n]
        if how == 'zeros': data[at:at + n] = bytes(len(data[at:at + n]))
        if how == 'junk': data[at:at] = rng.choice(JUNK)
        if how == 'end': del data[max(at, len(data) // 2):]
    return bytes(data)


def attempt(read, path, told):
    "Read one input in this process, and tell what came of it"
    signal.alarm(SECONDS)
    try: read(path)
    except DataError as e:
        one_line = str(e).strip() and '\n' not in str(e)
        told.send(('refused', '') if one_line else ('find', f'a message of no or several lines: {e!r}'))
    except BaseException as e: told.send(('find', f'{type(e).__name__}: {e}'[:300]))
    else: told.send(('read', ''))


def outcome(read, path):
    "What came of one input, in a process of its own: some decoders end the process"
    here, there = multiprocessing.Pipe(False)
    child = multiprocessing.get_context('fork').Process(target=attempt, args=(read, path, there))
    child.start()
    there.close()
    child.join()
    return here.recv() if here.poll() else ('find', f'its process ended with exit code {child.exitcode}')


def main(seconds=600, seed=0):
    end, counts, finds, n = time.monotonic() + float(seconds), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)
        for name in ('films', 'tables', 'tried'): Path(tmp, name).mkdir()
        inputs = films(Path(tmp, 'films')) + tables(Path(tmp, 'tables'))
        truth = Path(tmp, 'tables', 'truth.csv').read_bytes()
        Path(tmp, 'tried', 'truth.csv').write_bytes(truth)
        whole = {p: p.read_bytes() for _, p in inputs}
        for read, path in inputs: assert outcome(read, path)[0] == 'read', (path, outcome(read, path))
        while time.monotonic() < end:
            rng = random.Random(f'{seed}-{n}')
            read, path = rng.choice(inputs)
            tried = Path(tmp, 'tried', path.name)
            tried.write_bytes(changed(whole[path], rng))
            what, why = outcome(read, tried)
            counts[read.__name__, what] += 1
            if what == 'find':
                finds += 1
                kept = Path(tempfile.gettempdir(), f'find-{seed}-{n}-{path.name}')
                kept.write_bytes(tried.read_bytes())
                print(f'{seed}-{n} {read.__name__} {path.name}: {why}; kept as {kept}', flush=True)
            n += 1
        os.chdir('/')
    for (name, what), k in sorted(counts.items()): print(f'{name:12} {what:8} {k:,}')
    print(f'{n:,} inputs, {finds} finds')
    return finds


if __name__ == '__main__': sys.exit(bool(main(*sys.argv[1:])))
