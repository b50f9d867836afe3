"Studies of random models, as folders, for prediction, export and localisation: test modules import the fixtures that they use."

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cxrlg.graph import LabelGraph
from cxrlg.model import CXRNet, save_model
from cxrlg.phantom import make_phantom
from cxrlg.predict import Predictor

LABELS = ['Edema', 'Mass', 'Pneumonia']


def load(study, **options): return Predictor(study, verbose=False, **options)


def numbers(table): return table[LABELS].to_numpy()


def write_out_of_fold(path, seed, labels):
    "What a fold predicted of forty films of twenty patients; only the targets are looked at here"
    y = np.random.default_rng(seed).random((40, len(labels))) < .4
    films = dict(row=range(40), image=[f'{seed}_{i}.png' for i in range(40)], patient=[f'{seed}p{i//2}' for i in range(40)], fold=seed)
    pd.DataFrame(films | {f'y:{l}': v for l, v in zip(labels, y.T.astype('float32'))}).to_parquet(path/'oof.parquet')


def write_fold(path, seed=0, labels=LABELS, size=32, arch='test_resnet', done=True, graph=False, in_chans=1, arch_args={}, **config):
    "A finished fold of a model with random weights; `config` goes to config.json"
    torch.manual_seed(seed)
    graph = LabelGraph(len(labels)) if graph is True else graph or None
    model = CXRNet(arch, labels, graph, in_chans=in_chans, arch_args=arch_args)
    with torch.no_grad():
        if isinstance(graph, LabelGraph): graph.A.copy_(torch.randn(len(labels), len(labels)))
        model.backbone.get_classifier().weight.mul_(30)
    save_model(model, path, size=size)
    (path/'config.json').write_text(json.dumps(dict(data='nih', size=size, n_splits=2, data_args={}) | config))
    write_out_of_fold(path, seed, labels)
    if done: (path/'done.json').write_text('{}')


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "Networks as small as these only lose by a second thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "Two arms of two folds; not to be changed"
    path = tmp_path_factory.mktemp('study')
    for k in range(2):
        write_fold(path/f'none/seed42/fold{k}', seed=k)
        write_fold(path/f'prox/seed42/fold{k}', seed=k, graph=True)
    return path


@pytest.fixture
def copy(study, tmp_path): return shutil.copytree(study, tmp_path/'copy')


@pytest.fixture(scope='module')
def predictor(study): return load(study)


@pytest.fixture(scope='module')
def pngs(tmp_path_factory):
    "Paths of a dozen phantom films"
    folder = tmp_path_factory.mktemp('films')
    table, pixels, _ = make_phantom(n_patients=12, size=48, seed=5)
    for name, a in zip(table.image[:12], pixels): Image.fromarray(a).save(folder/name)
    return sorted(str(f) for f in folder.iterdir())


@pytest.fixture(scope='module')
def expected(predictor, pngs):
    "Probabilities [n, 3] of the films by the arm none"
    return numbers(predictor(pngs))


def one_line(error): return '\n' not in str(error.value)


def names_in(folder): return sorted(p.name for p in Path(folder).iterdir())
