"Batches: the right rows, the same whatever came before, refused by name where they cannot be made"
import math

import numpy as np
import pandas as pd
import pytest
import torch

import cxrlg.batches as batches
from cxrlg.batches import fold_dls
from cxrlg.core import DataError
from cxrlg.label_values import decide_uncertain


# ---- loaders

@pytest.fixture
def loaders():
    "Pixels that tell their row, for 40 rows in 4 folds and one row in none"
    n = 41
    pixels = np.arange(n, dtype='uint8')[:, None, None].repeat(16, 1).repeat(16, 2)
    table = pd.DataFrame(
        dict(
            image=[str(i) for i in range(n)],
            patient=range(n),
            Mass=np.where(np.arange(n) % 3, np.arange(n) % 2, np.nan).astype('float32'),
        )
    )
    table.attrs['labels'] = ['Mass']
    return lambda fold=1, folds=np.r_[np.arange(n - 1) % 4, -1], **kw: fold_dls(
        pixels, table, folds, fold, **dict(dict(bs=8, device='cpu'), **kw)
    )


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
    gen = batches.batch_rng(0, 0, 0)
    theta, u = batches.draw_affine(50, gen, .5, 10, .84), torch.rand(5, 50, generator=batches.batch_rng(0, 0, 0))
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


@pytest.mark.parametrize('backend', ['numpy_nullable', 'pyarrow'])
def test_labels_of_nullable_and_arrow_columns(backend):
    table = pd.DataFrame(dict(image=list('abcdef'), patient=list('aabbcc'), Edema=[1, 0, np.nan, 1, 0, 0], Mass=[0, 1, 1, np.nan, 0, 1.]))
    table.attrs['labels'] = ['Edema', 'Mass']
    other = table.convert_dtypes(dtype_backend=backend)
    other.attrs = table.attrs
    want, got = (fold_dls(np.zeros((6, 16, 16), 'uint8'), t, [0, 0, 1, 1, 2, 2], 0, bs=2, device='cpu').train.y for t in (table, other))
    assert torch.equal(want.nan_to_num(-1), got.nan_to_num(-1)) and got.dtype == torch.float32


def test_training_aims_at_what_the_policy_says_and_validation_at_the_labels():
    table = pd.DataFrame(dict(image=list('abcdef'), patient=list('aabbcc'), Edema=[1, -1, -1, 1, 0, 0]))
    table.attrs['labels'] = ['Edema']
    dls = fold_dls(np.zeros((6, 16, 16), 'uint8'), decide_uncertain(table, 'soft'), [0, 1, 0, 1, 0, 1], 0, bs=2, device='cpu')
    assert dls.train.y[[1, 3, 5], 0].tolist() == pytest.approx([.7, 1, 0])
    assert dls.valid.y[[0, 2, 4], 0].nan_to_num(9).tolist() == [1, 9, 0]
