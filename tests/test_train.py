"Training: the same bytes twice and after a kill, the same numbers as a plain PyTorch loop, and clear refusals."
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from conftest import ROOT
from cxrlg.asl import AsymmetricLoss
from cxrlg.data import DataError, fold_dls
from cxrlg.train import Checkpoint, TrainConfig, fit_fold, load_data, make_learner, make_model, train_fold

TINY = dict(study='t', data_args={'n_patients': 40}, size=32, n_splits=3, arch='test_resnet', arch_args={}, bs=8, epochs=3, threads=1)
BYTES = ('model.safetensors', 'oof.parquet')


def run(out, **kw): return train_fold(TINY | dict(out_dir=str(out)) | kw, bar=False)
def read(result): return {name: (result.path/name).read_bytes() for name in BYTES}


@pytest.fixture(scope='module')
def reference(tmp_path_factory): return {arm: run(tmp_path_factory.mktemp(arm), arm=arm) for arm in ('none', 'l1', 'prox')}


@pytest.mark.parametrize('arm', ['none', 'prox'])
def test_the_same_config_twice_gives_the_same_bytes(reference, tmp_path, arm): assert read(run(tmp_path, arm=arm)) == read(reference[arm])


class Stop(Exception): pass


@pytest.mark.parametrize('arm', ['none', 'l1', 'prox'])
def test_a_resumed_run_gives_the_same_bytes(reference, tmp_path, arm, monkeypatch):
    real = Checkpoint.after_epoch
    def die(self):
        real(self)
        if self.epoch == 1: raise Stop('enough')
    monkeypatch.setattr(Checkpoint, 'after_epoch', die)
    with pytest.raises(Stop): run(tmp_path, arm=arm)
    monkeypatch.undo()
    folder = tmp_path/'t'/arm/'seed42'/'fold0'
    assert {f.name for f in folder.iterdir()} == {'checkpoint.pt'}
    result = run(tmp_path, arm=arm)
    assert read(result) == read(reference[arm]) and list(result.history.epoch) == [1, 2, 3]
    assert not (folder/'checkpoint.pt').exists()


def test_kill_in_the_middle_of_an_epoch(reference, tmp_path):
    code = f'from cxrlg.train import train_fold; train_fold({TINY | dict(out_dir=str(tmp_path))!r}, bar=False)'
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path/'t'/'none'/'seed42'/'fold0'/'checkpoint.pt'
    while not checkpoint.exists() and child.poll() is None: time.sleep(.01)
    time.sleep(.05); child.send_signal(signal.SIGKILL); child.wait()
    assert read(run(tmp_path)) == read(reference['none'])


def test_arms_share_their_start_and_their_batches():
    labels = ['a', 'b', 'c']
    none, l1 = (make_model(TrainConfig(**TINY | dict(arm=arm)), labels).state_dict() for arm in ('none', 'l1'))
    assert set(l1) - set(none) == {'graph.A'} and all(torch.equal(v, l1[k]) for k, v in none.items())


def test_resuming_another_configuration_is_refused(tmp_path):
    table, pixels = load_data(TrainConfig(**TINY))
    cfg = TrainConfig(**TINY)
    dls = fold_dls(pixels, table, np.arange(len(table)) % 3, 0, bs=8)
    save, other = Checkpoint(tmp_path/'c.pt', 'one'), Checkpoint(tmp_path/'c.pt', 'two')
    fit_fold(cfg, make_learner(cfg, dls, table.attrs['labels'], bar=False), save)
    with pytest.raises(DataError, match='another configuration'): fit_fold(cfg, make_learner(cfg, dls, table.attrs['labels'], bar=False), other)
    os.truncate(tmp_path/'c.pt', 1000)
    with pytest.raises(DataError, match='damaged'): fit_fold(cfg, make_learner(cfg, dls, table.attrs['labels'], bar=False), Checkpoint(tmp_path/'c.pt', 'one'))


@pytest.mark.parametrize('accum', [1, 2])
def test_fifty_steps_equal_a_plain_loop(accum):
    "Schedule, clipping, accumulation, AdamW and EMA with buffers, to 1e-6"
    rng, n = np.random.default_rng(0), 8*25*accum*3//2
    pixels = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
    table = pd.DataFrame((rng.random((n, 3)) < .3).astype('float32'), columns=list('abc')); table.attrs['labels'] = list('abc')
    folds = np.arange(n) % 3
    cfg = TrainConfig(**TINY | dict(epochs=2, accum=accum, amp='no', ema=.9, drop_rate=0., lr=1e-3, wd=.1, warmup=.2, grad_clip=.05))
    learn = fit_fold(cfg, make_learner(cfg, fold_dls(pixels, table, folds, 0, bs=8, seed=42), list('abc'), bar=False))

    torch.manual_seed(cfg.seed); net = make_model(cfg, list('abc')).train().to(memory_format=torch.channels_last)
    opt, loss_func, ema = torch.optim.AdamW(net.parameters(), lr=0, weight_decay=.1, fused=True), AsymmetricLoss(), ModelEmaV3(net, decay=.9, use_warmup=True)
    loader, clipped, step = fold_dls(pixels, table, folds, 0, bs=8, seed=42).train, 0, 0
    total = 2*len(loader)
    for k, (x, y) in enumerate(b for epoch in range(2) for b in loader):
        pct = k/total
        lr = 1e-3*(pct/.2 if pct < .2 else .5*(1 + math.cos(math.pi*(pct - .2)/.8)))
        (loss_func(net(x), y)/accum).backward()
        if (k + 1) % accum: continue
        opt.param_groups[0]['lr'] = lr
        clipped += nn.utils.clip_grad_norm_(net.parameters(), .05) > .05
        opt.step(); opt.zero_grad(); step += 1
        ema.update(net, step=step)
    assert step == 50 and clipped > 25
    for k, v in ema.module.state_dict().items(): torch.testing.assert_close(learn.model.state_dict()[k], v, atol=1e-6, rtol=1e-6, msg=lambda m: f'{k}: {m}')


@pytest.mark.parametrize('change,says', [
    (dict(fold=3), 'the folds are 0 to 2'), (dict(arm='lasso'), 'none, l1, prox'), (dict(epoch=3), "did you mean 'epochs'"),
    (dict(epochs=0), 'at least 1'), (dict(lr=0), 'above 0'), (dict(ema=1.), 'a decay'), (dict(data='nih', data_dir='no/such'), 'no/such'),
    (dict(data='nhi', data_dir='x'), 'nih'), (dict(arch='test_resnt'), 'test_resnet'), (dict(weights='no.safetensors'), 'there is no file'), (dict(study='a/b'), 'without slashes')])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, change, says):
    with pytest.raises(DataError, match=says) as e: run(tmp_path, **change)
    assert '\n' not in str(e.value)
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and p.name != 'folds.csv']


def test_other_folds_in_the_same_study_are_refused(reference):
    with pytest.raises(DataError, match='holds other folds'): run(reference['none'].path.parents[3], n_splits=4, fold=3)


def test_pretrained_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    code = "from cxrlg.model import CXRNet; CXRNet('resnet18', ['a'], pretrained=True)"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': '/nonexistent'}).stderr
    assert 'give a local file' in out.splitlines()[-1]


def copy_of_the_repository(dst):
    for name in ('nbs', 'settings.ini', '_quarto.yml'): (shutil.copytree(ROOT/name, dst/name, symlinks=True) if (ROOT/name).is_dir() else shutil.copy(ROOT/name, dst/name))
    return dst


@pytest.mark.parametrize('where', ['redirected from nbs', 'to a path from elsewhere'])
def test_papermill_trains_the_fold_it_is_told(tmp_path, where):
    repo = copy_of_the_repository(tmp_path)
    quick = ['-p', 'fold', '2', '-y', 'data_args: {n_patients: 40}', '-p', 'epochs', '1', '-p', 'size', '32', '-p', 'arch', 'test_resnet', '-y', 'arch_args: {}']
    env = {k: v for k, v in os.environ.items() if k != 'CXRLG_RUNS'}
    args = [sys.executable, '-m', 'papermill']
    if where == 'redirected from nbs':
        with open(tmp_path/'out.ipynb', 'w') as out: subprocess.run([*args, '05_train.ipynb', *quick], cwd=repo/'nbs', env=env, stdout=out, check=True)
    else: subprocess.run([*args, 'nbs/05_train.ipynb', str(tmp_path/'out.ipynb'), *quick], cwd=repo, env=env, check=True)
    assert json.loads((tmp_path/'out.ipynb').read_text())['cells']
    oof = pd.read_parquet(repo/'runs'/'first'/'none'/'seed42'/'fold2'/'oof.parquet')
    assert set(oof.fold) == {2}


def test_papermill_from_anywhere_writes_to_the_repository(tmp_path):
    "Called from a folder outside the repository, results still go to runs/ at its root"
    study = f'test-{os.getpid()}'
    quick = ['-p', 'fold', '1', '-p', 'study', study, '-y', 'data_args: {n_patients: 40}', '-p', 'epochs', '1', '-p', 'size', '32', '-p', 'arch', 'test_resnet']
    env = {k: v for k, v in os.environ.items() if k != 'CXRLG_RUNS'}
    try:
        subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/'05_train.ipynb'), 'out.ipynb', *quick], cwd=tmp_path, env=env, check=True)
        assert (ROOT/'runs'/study/'none'/'seed42'/'fold1'/'done.json').is_file()
        assert [p.name for p in tmp_path.iterdir()] == ['out.ipynb']
    finally: shutil.rmtree(ROOT/'runs'/study, ignore_errors=True)


def test_papermill_with_a_name_that_does_not_exist_fails(tmp_path):
    run = subprocess.run([sys.executable, '-m', 'papermill', str(ROOT/'nbs'/'05_train.ipynb'), 'out.ipynb', '-p', 'epoch', '1'], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0 and "did you mean 'epochs'" in run.stderr
