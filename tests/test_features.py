"Frozen networks: the whole model gives what its last layer gives from the cache, and the cache is whole or absent."
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cxrlg import features
from cxrlg.callbacks import Checkpoint
from cxrlg.config import TrainConfig
from cxrlg.core import DataError
from cxrlg.features import FeatureCache, pixels_hash
from cxrlg.model import CXRNet, load_model, predict_logits
from cxrlg.phantom import make_phantom
from cxrlg.predict import Predictor
from cxrlg.study import prepare, score_locked
from cxrlg.train import lr_range, train_fold

TINY = dict(study='t', data_args={'n_patients': 40}, size=32, n_splits=2, arch='test_resnet', freeze=True, rotate=0, crop=1,
            bs=8, epochs=2, lr=.05, amp='no', threads=1)
KINDS = ('z', 'r', 'zf', 'rf')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Random weights, as if they were pretrained"
    path = tmp_path_factory.mktemp('weights')/'w.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), path)
    return str(path)


def run(out, weights, **kw): return train_fold(TINY | dict(out_dir=str(out), weights=weights) | kw, bar=False)


@pytest.fixture(scope='module')
def folds(weights, tmp_path_factory):
    "Two folds of an arm whose couplings are free, with a locked part; not to be changed"
    out = tmp_path_factory.mktemp('folds')
    return [run(out, weights, arm='free', graph_lr=10, locked=.2, fold=k) for k in range(2)]


def test_the_saved_model_gives_from_films_what_was_trained_from_features(folds):
    table, pixels, _ = make_phantom(n_patients=40, seed=42, size=32)
    oof, model = pd.read_parquet(folds[0].path/'oof.parquet'), load_model(folds[0].path)
    logits = predict_logits(model, pixels, oof.row.to_numpy())
    for k in KINDS: np.testing.assert_allclose(logits[k], oof[[f'{k}:{l}' for l in model.labels]], atol=1e-4, rtol=0)
    assert model.graph.A.abs().max() > .01 and np.ptp(logits['z'], axis=0).min() > .01
    assert not np.allclose(logits['z'], logits['zf'], atol=1e-3) and folds[0].config['hashes']['features']


def test_prediction_from_files_needs_to_know_nothing_of_it(folds, tmp_path):
    table, pixels, _ = make_phantom(n_patients=40, seed=42, size=32)
    oof, labels = pd.read_parquet(folds[0].path/'oof.parquet').head(5), load_model(folds[0].path).labels
    files = [tmp_path/f for f in oof.image]
    for row, file in zip(oof.row, files): Image.fromarray(pixels[row]).save(file)
    film, mirror = (1/(1 + np.exp(-oof[[f'{k}:{l}' for l in labels]].to_numpy(float))) for k in ('r', 'rf'))
    shutil.copytree(folds[0].path.parents[2], tmp_path/'t')
    shutil.rmtree(tmp_path/'t'/'free'/'seed42'/'fold1')
    only = Predictor(tmp_path/'t', verbose=False)
    np.testing.assert_allclose(only(files)[labels], (film + mirror)/2, atol=1e-5)


def test_only_the_last_layer_and_the_graph_are_trained(folds, weights):
    before = CXRNet('test_resnet', load_model(folds[0].path).labels, weights=weights).state_dict()
    after = load_model(folds[0].path).state_dict()
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert moved == {'backbone.fc.weight', 'backbone.fc.bias'} and set(after) - set(before) == {'graph.A'}


def test_locked_patients_are_scored_as_the_whole_network_does(folds):
    jobs = [TrainConfig(**{k: v for k, v in f.config.items() if k in TrainConfig.names()}) for f in folds]
    pixels = make_phantom(n_patients=40, seed=42, size=32)[1]
    for path in score_locked(jobs, bar=False, n_jobs=2):
        locked, model = pd.read_parquet(path), load_model(path.parent)
        logits = predict_logits(model, pixels, locked.row.to_numpy())
        for k in KINDS: np.testing.assert_allclose(logits[k], locked[[f'{k}:{l}' for l in model.labels]], atol=1e-4, rtol=0)


def test_the_same_bytes_twice_and_after_a_stop(weights, tmp_path, monkeypatch):
    class Stop(Exception): pass
    real = Checkpoint.after_epoch
    def die(self):
        real(self)
        raise Stop('enough')
    read = lambda result: [(result.path/name).read_bytes() for name in ('model.safetensors', 'oof.parquet')]
    first = read(run(tmp_path/'a', weights, arm='prox'))
    monkeypatch.setattr(Checkpoint, 'after_epoch', die)
    with pytest.raises(Stop): run(tmp_path/'b', weights, arm='prox')
    monkeypatch.undo()
    again = run(tmp_path/'b', weights, arm='prox')
    assert read(again) == first and list(again.history.epoch) == [1, 2]


def test_all_arms_and_seeds_share_one_cache_which_a_study_fills_before_its_folds(weights, tmp_path, monkeypatch):
    jobs = [TrainConfig(**TINY | dict(out_dir=str(tmp_path), weights=weights, arm=a, seed=s, message='centred'))
            for a, s in (('l1', 1), ('none', 1), ('free', 2))]
    prepare(jobs)
    cache, = (tmp_path/'cache'/'features').glob('*')
    monkeypatch.setattr(FeatureCache, '_build', lambda *a: pytest.fail('computed again'))
    for cfg in jobs: train_fold(cfg, bar=False)
    curve = lr_range(jobs[1], n=30, low=1e-4)
    assert len(curve) > 10 and list((tmp_path/'cache'/'features').glob('*')) == [cache]


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return CXRNet('test_resnet', ['a', 'b']).eval()


def test_the_cache_is_whole_or_absent(net, tmp_path, monkeypatch):
    pixels, real, calls = np.random.default_rng(0).integers(0, 256, (20, 32, 32), dtype=np.uint8), features.last_input, []
    def failing(*args):
        calls.append(1)
        if len(calls) == 4: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(features, 'last_input', failing)
    with pytest.raises(KeyboardInterrupt): FeatureCache(net, pixels, tmp_path, bs=8, bar=False)
    assert not list((tmp_path/'features').iterdir())
    monkeypatch.undo()
    cache = FeatureCache(net, pixels, tmp_path, bar=False)
    os.truncate(cache.path, 1000)
    with pytest.raises(DataError, match='is damaged .*: delete it'): FeatureCache(net, pixels, tmp_path, bar=False)


def test_a_cache_is_of_these_films_these_weights_and_this_many_threads(net, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)
    keys, was = [FeatureCache(net, pixels, tmp_path, bar=False).key], torch.get_num_threads()
    keys.append(FeatureCache(net, pixels[::-1], tmp_path, bar=False).key)
    with torch.no_grad(): net.backbone.bn1.running_mean[0] += 1
    keys.append(FeatureCache(net, pixels, tmp_path, bar=False).key)
    torch.set_num_threads(was + 1)
    keys.append(FeatureCache(net, pixels, tmp_path, bar=False).key)
    torch.set_num_threads(was)
    assert len(set(keys)) == 4 and pixels_hash(pixels) == pixels_hash(pixels.copy())


def test_a_cache_that_cannot_be_written_is_one_line(net, tmp_path):
    (tmp_path/'features').write_text('in the way')
    with pytest.raises(DataError, match='cannot write .*an out_dir'):
        FeatureCache(net, np.zeros((2, 32, 32), np.uint8), tmp_path, bar=False)


@pytest.mark.parametrize('odd, says', [
    (dict(weights=''), 'give it weights=FILE, or pretrained=true'),
    (dict(rotate=5, crop=.9), 'set rotate=0, crop=1'),
    (dict(mixup=.4), 'set mixup=0'),
    (dict(jitter=.1), 'set jitter=0'),
    (dict(compile=True), 'set compile=false'),
    (dict(freeze='yes'), 'true or false'),
])
def test_what_a_frozen_network_cannot_do_is_refused(odd, says):
    with pytest.raises(DataError, match=says) as e: TrainConfig(**TINY | dict(weights='w.safetensors') | odd)
    assert '\n' not in str(e.value)


def test_a_network_without_a_linear_end_is_refused(weights, tmp_path):
    with pytest.raises(DataError, match='does not end in one linear layer'):
        FeatureCache(CXRNet('levit_128s', ['a'], in_chans=3).eval(), np.zeros((2, 224, 224), np.uint8), tmp_path, bar=False)


def test_the_identity_of_what_was_trained_before_stays():
    usual = TrainConfig()
    frozen, trained = (TrainConfig(**TINY | dict(weights='w', freeze=freeze)) for freeze in (True, False))
    assert usual.hash == 'c44a158063ea20b3' and frozen.hash != trained.hash
