"Small folders of films with their label file, for the tests of tables, films and what reads them"
import numpy as np
import pytest
from PIL import Image

from cxrlg.data import read_table

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
