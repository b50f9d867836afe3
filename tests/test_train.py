"Training: the same bytes twice and after a stop, the same numbers as a plain PyTorch loop, steps left out, and clear refusals."
import copy
import errno
import json
import math
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.callback.core import Callback, CancelStepException
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from cxrlg import asl, core, learner, model, train
from cxrlg.asl import AsymmetricLoss
from cxrlg.batches import fold_dls
from cxrlg.core import DataError
from cxrlg.graph import GraphL1
from cxrlg.model import load_model, predict_logits
from cxrlg.callbacks import EMA, Checkpoint, History, StepGuard
from cxrlg.config import TrainConfig
from cxrlg.learner import fit_fold, make_learner, make_model
from cxrlg.train import load_data, load_folds, lr_range, train_fold

TINY = dict(study='t', data_args={'n_patients': 40}, size=32, n_splits=3, arch='test_resnet', arch_args={}, bs=8, epochs=3, threads=1)
BYTES = ('model.safetensors', 'oof.parquet')


def run(out, **kw): return train_fold(TINY | dict(out_dir=str(out)) | kw, bar=False)
def read(result): return {name: (result.path/name).read_bytes() for name in BYTES}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    return {arm: run(tmp_path_factory.mktemp(arm), arm=arm) for arm in ('none', 'l1', 'prox', 'free', 'tied')}


@pytest.mark.parametrize('arm', ['none', 'prox'])
def test_the_same_config_twice_gives_the_same_bytes(reference, tmp_path, arm): assert read(run(tmp_path, arm=arm)) == read(reference[arm])


class Stop(Exception): pass


@pytest.mark.parametrize('arm', ['none', 'l1', 'prox', 'free', 'tied'])
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


@pytest.mark.parametrize('loss, start', [('bce', [.1, .5, .002]), ('asl', [.5, .5, .5])])
def test_a_new_last_layer_on_pretrained_features_starts_at_the_constant_that_the_loss_likes(tmp_path, loss, start):
    "Cross-entropy begins at the log odds of each finding, the Asymmetric Loss at one half; random weights begin as timm has them"
    save_file(timm.create_model('test_resnet').state_dict(), tmp_path/'w.safetensors')
    cfg, share = TrainConfig(**TINY | dict(loss=loss, weights=str(tmp_path/'w.safetensors'))), torch.tensor([.1, .5, .002])
    with torch.no_grad(): p = make_model(cfg, ['a', 'b', 'c'], share).eval()(torch.rand(4, 1, 32, 32)).sigmoid()
    assert torch.allclose(p, torch.tensor(start).expand(4, 3), atol=1e-6)
    with torch.no_grad():
        free = (
            make_model(TrainConfig(**TINY | dict(loss=loss)), ['a', 'b', 'c'], share)
            .eval()(torch.rand(4, 1, 32, 32))
            .sigmoid()
        )
    assert not torch.allclose(free, torch.tensor(start).expand(4, 3), atol=1e-3)


def test_arms_share_their_start_and_their_batches():
    labels = ['a', 'b', 'c']
    none, l1 = (make_model(TrainConfig(**TINY | dict(arm=arm)), labels).state_dict() for arm in ('none', 'l1'))
    assert set(l1) - set(none) == {'graph.A'} and all(torch.equal(v, l1[k]) for k, v in none.items())


def test_the_couplings_of_free_are_moved_by_the_data_alone():
    "No penalty and no decay: where the loss does not depend on them, couplings stay where they are"
    table, pixels = load_data(TrainConfig(**TINY))
    labels, start = table.attrs['labels'], torch.full((14, 14), 2.)
    dls = fold_dls(pixels, table, np.arange(len(table)) % 3, 0, bs=8)
    for alpha, stay in ((0, True), (.3, False)):
        cfg = TrainConfig(**TINY | dict(arm='free', epochs=1, wd=.5, ema=0, alpha=alpha))
        learn = make_learner(cfg, dls, labels, bar=False)
        with torch.no_grad(): learn.model.graph.A.copy_(start)
        A = fit_fold(cfg, learn).model.graph.A.detach()
        assert torch.equal(A, start) == stay
        assert not any(isinstance(cb, GraphL1) for cb in learn.cbs)


def test_a_network_of_some_findings_has_the_folds_of_all(tmp_path):
    one = run(tmp_path/'one', data_args=dict(n_patients=40, findings=['Edema']), epochs=1)
    both = run(tmp_path/'both', data_args=dict(n_patients=40, findings=['Pleural Effusion', 'Edema']), epochs=1)
    every = run(tmp_path/'all', epochs=1)
    assert len({(r.path.parents[2]/'folds.csv').read_bytes() for r in (one, both, every)}) == 1
    assert [load_model(r.path).labels for r in (one, both)] == [['Edema'], ['Edema', 'Pleural Effusion']]
    films = [pd.read_parquet(r.path/'oof.parquet')[['image', 'y:Edema']] for r in (one, both, every)]
    assert all(films[0].equals(f) for f in films[1:])


ODD = [('Edema', 'give a list of names'), ([], 'give a list'), (['edema'], "no finding 'edema'.*Edema")]


@pytest.mark.parametrize('findings, says', ODD)
def test_odd_findings_are_refused_in_one_line(findings, says):
    with pytest.raises(DataError, match=says): load_data(TrainConfig(**TINY | dict(data_args=dict(n_patients=9, findings=findings))))


def test_resuming_another_configuration_is_refused(tmp_path):
    table, pixels = load_data(TrainConfig(**TINY))
    cfg = TrainConfig(**TINY)
    dls = fold_dls(pixels, table, np.arange(len(table)) % 3, 0, bs=8)
    save, other = Checkpoint(tmp_path/'c.pt', 'one'), Checkpoint(tmp_path/'c.pt', 'two')
    fit_fold(cfg, make_learner(cfg, dls, table.attrs['labels'], bar=False), save)
    with pytest.raises(DataError, match='another configuration'):
        fit_fold(cfg, make_learner(cfg, dls, table.attrs['labels'], bar=False), other)
    os.truncate(tmp_path/'c.pt', 1000)
    with pytest.raises(DataError, match='damaged'):
        fit_fold(cfg, make_learner(cfg, dls, table.attrs['labels'], bar=False), Checkpoint(tmp_path / 'c.pt', 'one'))


@pytest.mark.parametrize('accum', [1, 2])
def test_fifty_steps_equal_a_plain_loop(accum):
    "Schedule, clipping, accumulation, AdamW and EMA with buffers, to 1e-6"
    rng, n = np.random.default_rng(0), 8*25*accum*3//2
    pixels = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
    table = pd.DataFrame((rng.random((n, 3)) < 0.3).astype('float32'), columns=list('abc'))
    table.attrs['labels'] = list('abc')
    folds = np.arange(n) % 3
    cfg = TrainConfig(**TINY | dict(epochs=2, accum=accum, amp='no', ema=.9, drop_rate=0., lr=1e-3, wd=.1, warmup=.2, grad_clip=.05))
    learn = fit_fold(cfg, make_learner(cfg, fold_dls(pixels, table, folds, 0, bs=8, seed=42), list('abc'), bar=False))

    torch.manual_seed(cfg.seed)
    net = make_model(cfg, list('abc')).train().to(memory_format=torch.channels_last)
    opt, loss_func, ema = (
        torch.optim.AdamW(net.parameters(), lr=0, weight_decay=0.1, fused=True),
        AsymmetricLoss(),
        ModelEmaV3(net, decay=0.9, use_warmup=True),
    )
    loader, clipped, step = fold_dls(pixels, table, folds, 0, bs=8, seed=42).train, 0, 0
    total = 2*len(loader)
    for k, (x, y) in enumerate(b for epoch in range(2) for b in loader):
        pct = k/total
        lr = 1e-3*(pct/.2 if pct < .2 else .5*(1 + math.cos(math.pi*(pct - .2)/.8)))
        (loss_func(net(x), y)/accum).backward()
        if (k + 1) % accum: continue
        opt.param_groups[0]['lr'] = lr
        clipped += nn.utils.clip_grad_norm_(net.parameters(), .05) > .05
        opt.step()
        opt.zero_grad()
        step += 1
        ema.update(net, step=step)
    assert step == 50 and clipped > 25
    for k, v in ema.module.state_dict().items():
        torch.testing.assert_close(learn.model.state_dict()[k], v, atol=1e-6, rtol=1e-6, msg=lambda m: f'{k}: {m}')


@pytest.mark.parametrize(
    'change,says',
    [
        (dict(fold=3), 'the folds are 0 to 2'),
        (dict(arm='lasso'), 'none, l1, prox'),
        (dict(epoch=3), "did you mean 'epochs'"),
        (dict(epochs=0), 'at least 1'),
        (dict(lr=0), 'above 0'),
        (dict(lr=math.inf), 'above 0'),
        (dict(lam=math.nan), 'a number; negative'),
        (dict(rotate=10**400), 'a number, at least 0'),
        (dict(fold_seed=2**40), 'below 2\\*\\*32'),
        (dict(ema=1.0), 'a decay'),
        (dict(data='nih', data_dir='no/such', data_args={}), 'no/such'),
        (dict(data='nhi', data_dir='x'), 'nih'),
        (dict(arch='test_resnt'), 'test_resnet'),
        (dict(weights='no.safetensors'), 'there is no file'),
        (dict(study='a/b'), 'without slashes'),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, change, says):
    with pytest.raises(DataError, match=says) as e: run(tmp_path, **change)
    assert '\n' not in str(e.value)
    assert not [p for p in tmp_path.rglob('*') if p.is_file() and p.name != 'folds.csv']


def test_other_folds_in_the_same_study_are_refused(reference):
    with pytest.raises(DataError, match='holds other folds'): run(reference['none'].path.parents[3], n_splits=4, fold=3)


def test_pretrained_without_a_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    code = "from cxrlg.model import CXRNet; CXRNet('resnet18', ['a'], pretrained=True)"
    out = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': '/nonexistent'},
    ).stderr
    assert 'give a local file' in out.splitlines()[-1]


def copy_of_the_repository(dst):
    for name in ('nbs', 'settings.ini', '_quarto.yml'):
        (
            shutil.copytree(ROOT / name, dst / name, symlinks=True)
            if (ROOT / name).is_dir()
            else shutil.copy(ROOT / name, dst / name)
        )
    return dst


def asked(**parameters):
    "Parameters as papermill's command takes them: plain ones by -p, mappings as YAML by -y"
    plain = {k: v for k, v in parameters.items() if not str(v).startswith('{')}
    args = [a for name, value in plain.items() for a in ('-p', name, str(value))]
    return args + [a for name in parameters.keys() - plain.keys() for a in ('-y', f'{name}: {parameters[name]}')]


@pytest.mark.parametrize('where', ['redirected from nbs', 'to a path from elsewhere'])
def test_papermill_trains_the_fold_it_is_told(tmp_path, where):
    repo = copy_of_the_repository(tmp_path)
    quick = asked(fold=2, data_args='{n_patients: 40}', epochs=1, size=32, arch='test_resnet', arch_args='{}')
    env = {k: v for k, v in os.environ.items() if k != 'CXRLG_RUNS'}
    args = [sys.executable, '-m', 'papermill']
    if where == 'redirected from nbs':
        with open(tmp_path / 'out.ipynb', 'w') as out:
            subprocess.run([*args, '05_train.ipynb', *quick], cwd=repo / 'nbs', env=env, stdout=out, check=True)
    else:
        subprocess.run(
            [*args, 'nbs/05_train.ipynb', str(tmp_path / 'out.ipynb'), *quick], cwd=repo, env=env, check=True
        )
    assert json.loads((tmp_path/'out.ipynb').read_text())['cells']
    oof = pd.read_parquet(repo/'runs'/'first'/'none'/'seed42'/'fold2'/'oof.parquet')
    assert set(oof.fold) == {2}


def test_papermill_from_anywhere_writes_to_the_repository(tmp_path):
    "Called from a folder outside the repository, results still go to runs/ at its root"
    study = f'test-{os.getpid()}'
    quick = asked(fold=1, study=study, data_args='{n_patients: 40}', epochs=1, size=32, arch='test_resnet')
    env = {k: v for k, v in os.environ.items() if k != 'CXRLG_RUNS'}
    try:
        subprocess.run(
            [sys.executable, '-m', 'papermill', str(ROOT / 'nbs' / '05_train.ipynb'), 'out.ipynb', *quick],
            cwd=tmp_path,
            env=env,
            check=True,
        )
        assert (ROOT/'runs'/study/'none'/'seed42'/'fold1'/'done.json').is_file()
        assert [p.name for p in tmp_path.iterdir()] == ['out.ipynb']
    finally:
        shutil.rmtree(ROOT / 'runs' / study, ignore_errors=True)


def test_papermill_with_a_name_that_does_not_exist_fails(tmp_path):
    run = subprocess.run(
        [sys.executable, '-m', 'papermill', str(ROOT / 'nbs' / '05_train.ipynb'), 'out.ipynb', '-p', 'epoch', '1'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and "did you mean 'epochs'" in run.stderr


# --- steps left out ---

class Spoil(Callback):
    "Make films, loss or gradient of chosen batches not finite"
    order, run_valid = 5, False
    def __init__(self, batches, what): self.batches, self.what = batches, what
    def hit(self, what): return what == self.what and self.train_iter in self.batches
    def before_batch(self):
        if self.hit('films'): self.learn.xb = (self.xb[0].index_fill(0, torch.tensor([1]), math.nan),)
    def after_loss(self):
        if self.hit('loss'): self.learn.loss_grad, self.learn.loss = self.loss_grad*math.inf, self.loss*math.inf
    def after_backward(self):
        if self.hit('gradient'): next(self.model.parameters()).grad.view(-1)[0] = -math.inf


class LeaveOut(Callback):
    "The same by hand: after a chosen batch everything is put back as it was before it"
    order, run_valid = StepGuard.order + .1, False
    def __init__(self, batches, what): self.batches, self.what, self.hit = batches, what, False
    def before_batch(self):
        self.now = self.train_iter in self.batches
        self.hit |= self.now
        self.buffers = {k: v.clone() for k, v in self.model.named_buffers()}
    def after_loss(self): self.graph = next((cb for cb in self.learn.cbs if isinstance(cb, GraphL1)), None)
    def after_backward(self):
        if self.now and self.what != 'gradient':
            for k, v in self.model.named_buffers(): v.copy_(self.buffers[k])
    def before_step(self): self.saved = [copy.deepcopy(o) for o in (dict(self.model.named_parameters()), self.opt.opt.state_dict())]
    def after_step(self):
        if self.hit:
            with torch.no_grad():
                for k, v in self.model.named_parameters(): v.copy_(self.saved[0][k])
            self.opt.opt.load_state_dict(self.saved[1])
        self.hit = False


def with_callback(monkeypatch, cb):
    "Let `train_fold` train with one callback more"
    real = train.make_learner
    monkeypatch.setattr(train, 'make_learner', lambda *args: real(*args).add_cb(cb))


@pytest.mark.parametrize(
    'arm,what,accum',
    [
        ('none', 'films', 1),
        ('none', 'loss', 1),
        ('none', 'gradient', 1),
        ('none', 'films', 2),
        ('none', 'gradient', 2),
        ('l1', 'films', 1),
    ],
)
def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch, arm, what, accum):
    "Weights, moments, step counters, batch-norm statistics, average: the same bytes as when that step is undone by hand"
    batches, got = {0, 3, 11}, {}
    for name, cb in dict(guard=Spoil(batches, what), by_hand=LeaveOut(batches, what)).items():
        with monkeypatch.context() as m:
            with_callback(m, cb)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter('always')
                got[name] = run(tmp_path/name, arm=arm, accum=accum)
            if name == 'guard': assert any('epoch 1: 2 of' in str(w.message) for w in said)
    assert read(got['guard']) == read(got['by_hand'])
    assert list(got['guard'].history.skipped) == [2, 1, 0] and np.isfinite(got['guard'].history.drop(columns='skipped').to_numpy()).all()


def test_couplings_of_prox_do_not_move_in_a_step_left_out(tmp_path, monkeypatch):
    seen = {}
    class Watch(Callback):
        order = StepGuard.order + 1
        def before_batch(self): seen[self.train_iter] = self.model.graph.A.detach().clone()
    with_callback(monkeypatch, Spoil({12}, 'films'))
    with_callback(monkeypatch, Watch())
    with pytest.warns(match='1 of 10 steps left out'): result = run(tmp_path, arm='prox', epochs=2)
    assert torch.equal(seen[12], seen[13]) and not torch.equal(seen[13], seen[14]) and torch.isfinite(seen[19]).all()
    assert all(torch.isfinite(v).all() for v in load_model(result.path).state_dict().values())


def test_statistics_of_a_batch_that_overflow_are_put_back_though_its_loss_is_finite(tmp_path, monkeypatch):
    class Overflow(Callback):
        order = 5
        def after_backward(self):
            if self.train_iter == 4: next(m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)).running_var.fill_(math.inf)
    with_callback(monkeypatch, Overflow())
    with pytest.warns(match='the last began with epoch 1, batch 5'): result = run(tmp_path, epochs=1)
    assert list(result.history.skipped) == [1] and all(torch.isfinite(v).all() for v in load_model(result.path).state_dict().values())


@pytest.mark.parametrize('what', ['films', 'loss', 'gradient'])
def test_nothing_but_bad_steps_ends_training_and_names_epoch_batch_and_films(tmp_path, monkeypatch, what):
    with_callback(monkeypatch, Spoil(range(10, 99), what))
    with pytest.raises(DataError, match='lower lr') as e: run(tmp_path)
    cfg = TrainConfig(**TINY | dict(out_dir=str(tmp_path)))
    table, pixels = load_data(cfg)
    loader = fold_dls(pixels, table, load_folds(cfg, table), 0, bs=8, seed=42).train
    loader.epoch = 1
    films = ', '.join(table.image[loader.get_idxs()[:3]])
    assert f'in 10 steps in a row, from epoch 2, batch 1 (films {films} and 5 more) on' in str(e.value) and '\n' not in str(e.value)
    assert {f.name for f in cfg.path.iterdir()} == {'checkpoint.pt'}


def test_a_run_of_bad_steps_is_counted_across_epochs_and_a_resume(tmp_path):
    table, pixels = load_data(TrainConfig(**TINY))
    cfg, folds = TrainConfig(**TINY | dict(epochs=2)), np.arange(len(table)) % 3
    def fit(bad):
        learn = make_learner(
            cfg, fold_dls(pixels, table, folds, 0, bs=8, seed=42), table.attrs['labels'], bar=False
        ).add_cb(Spoil(bad, 'gradient'))

        learn.step_guard.patience = 5
        return learn, fit_fold(cfg, learn, Checkpoint(tmp_path/'c.pt', 'x'))
    n = len(fold_dls(pixels, table, folds, 0, bs=8).train)
    class Stop(Exception): pass
    with pytest.MonkeyPatch.context() as m:
        real = Checkpoint.after_epoch
        def die(self):
            real(self)
            raise Stop('enough')

        m.setattr(Checkpoint, 'after_epoch', die)
        with pytest.raises(Stop), pytest.warns(match='2 of'): fit({n - 2, n - 1})
    with pytest.raises(DataError, match=f'in 5 steps in a row, from epoch 1, batch {n - 1} '): fit({0, 1, 2})


def test_steps_that_a_gradient_scaler_cancels_are_counted(tmp_path, monkeypatch):
    class Scaler(Callback):
        order, run_valid = 10, False
        def before_step(self):
            if self.train_iter in (0, 1, 12): raise CancelStepException
    with_callback(monkeypatch, Scaler())
    with pytest.warns(match='steps left out'): assert list(run(tmp_path, arm='prox').history.skipped) == [2, 1, 0]


def test_a_learning_rate_beyond_bearing_is_said_in_one_line(tmp_path):
    with pytest.raises(DataError, match='not finite.*lower lr') as e, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run(tmp_path, lr=1e30, warmup=0.0, amp='no', grad_clip=0.0)
    assert '\n' not in str(e.value)


class ReadBack(TorchDispatchMode):
    "Notes every operation whose result the host needs before it can go on"
    def __init__(self):
        super().__init__()
        self.on, self.seen = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func.name() in ('aten::_local_scalar_dense', 'aten::nonzero', 'aten::masked_select', 'aten::equal', 'aten::is_nonzero')
        if func.name().startswith('aten::index.') or func.name().startswith('aten::index_put'):
            waits |= any(i is not None and i.dtype == torch.bool for i in args[1])
        if self.on and waits: self.seen.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize('arm', ['none', 'l1', 'prox', 'free', 'tied'])
def test_nothing_in_a_step_reads_a_value_back(arm, monkeypatch):
    monkeypatch.setattr(asl, '_refuse', lambda odd: None) # a CPU looks at the targets at once, a GPU without waiting (test_asl)
    table, pixels = load_data(TrainConfig(**TINY))
    cfg, mode = TrainConfig(**TINY | dict(arm=arm, accum=2, jitter=.1, epochs=1)), ReadBack()
    class Switch(Callback):
        order, run_valid = -100, False
        def before_batch(self): mode.on, self.learn.step_guard.glance = True, lambda counts: None
    class Off(Callback):
        order, run_valid = 100, False
        def after_batch(self): mode.on = False
    learn = make_learner(
        cfg, fold_dls(pixels, table, np.arange(len(table)) % 3, 0, bs=8, seed=42), table.attrs['labels'], bar=False
    ).add_cbs([Switch(), Off()])
    with mode:
        fit_fold(cfg, learn)
        assert mode.seen == []
        mode.on = True
        torch.ones(()).item()
        torch.ones(2)[torch.tensor([True, False])]
    assert 'aten::_local_scalar_dense' in mode.seen and len(mode.seen) >= 2


def test_the_average_equals_timms_to_1e_7_buffers_included(tmp_path, monkeypatch):
    class Beside(Callback):
        order, run_valid = EMA.order + 1, False
        def before_fit(self): self.theirs, self.step = ModelEmaV3(self.model, decay=.99, use_warmup=True), 0
        def after_step(self):
            self.step += 1
            self.theirs.update(self.model, step=self.step)

    beside = Beside()
    with_callback(monkeypatch, beside)
    ours, theirs = load_model(run(tmp_path, arm='l1').path).state_dict(), beside.theirs.module.state_dict()
    assert beside.step == 30 and set(ours) == set(theirs) and any('running_var' in k for k in ours) and 'graph.A' in ours
    for k, v in theirs.items(): torch.testing.assert_close(ours[k], v, atol=1e-7, rtol=0, msg=lambda m: f'{k}: {m}')


# --- memory and disk ---

@pytest.mark.parametrize('error', ['gpu', 'cpu'])
def test_out_of_memory_names_the_batch_size_to_try(tmp_path, monkeypatch, error):
    def forward(self, x):
        if error == 'gpu':
            raise torch.OutOfMemoryError(
                'CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of ...'
            )
        return torch.empty(2**55)
    monkeypatch.setattr(learner.CXRNet, 'forward', forward)
    with pytest.raises(DataError, match='out of memory on .* with bs=8, .*: try bs=4 with accum=2') as e: run(tmp_path)
    assert '\n' not in str(e.value) and not [f for f in (tmp_path/'t'/'none').rglob('*') if f.is_file()]


def test_other_errors_of_the_network_pass_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(learner.CXRNet, 'forward', lambda self, x: x @ x[:, :, :3])
    with pytest.raises(RuntimeError, match='size|shape'): run(tmp_path)


def full_disk(monkeypatch, name, when=lambda: True):
    "From now on the device is full when the file `name` is written"
    real = core.atomic_write
    @contextmanager
    def write(path):
        with real(path) as tmp:
            if path.name == name and when(): tmp.symlink_to('/dev/full')
            yield tmp
    for module in (core, model): monkeypatch.setattr(module, 'atomic_write', write)


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(reference, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        full_disk(m, 'checkpoint.pt', lambda: (tmp_path/'t'/'none'/'seed42'/'fold0'/'checkpoint.pt').exists())
        with pytest.raises(
            DataError, match=r'cannot write .*checkpoint.pt \(No space left on device\): free some space'
        ) as e:
            run(tmp_path)
    assert '\n' not in str(e.value)
    folder = tmp_path/'t'/'none'/'seed42'/'fold0'
    assert [f.name for f in folder.iterdir()] == ['checkpoint.pt'] and torch.load(folder/'checkpoint.pt', weights_only=True)['epoch'] == 1
    assert read(run(tmp_path)) == read(reference['none'])


@pytest.mark.parametrize('name', ['config.json', 'history.csv', 'oof.parquet', 'couplings.csv', 'model.json', 'done.json'])
def test_a_full_disk_at_the_results_loses_nothing(reference, tmp_path, monkeypatch, name):
    with monkeypatch.context() as m:
        full_disk(m, name)
        with pytest.raises(DataError, match=r'cannot write .*\(.*No space left on device\): free some space') as e:
            run(tmp_path, arm='prox')
    folder = tmp_path/'t'/'prox'/'seed42'/'fold0'
    assert '\n' not in str(e.value) and str(folder) in str(e.value)
    assert not (folder/name).exists() and (folder/'checkpoint.pt').exists() and not list(folder.glob('*tmp*'))
    assert read(run(tmp_path, arm='prox')) == read(reference['prox']) and {f.name for f in folder.iterdir()} == {
        f.name for f in reference['prox'].path.iterdir()
    }


@pytest.mark.parametrize('name,limit', [('model.safetensors', 300_000), ('checkpoint.pt', 100_000)])
def test_a_limit_on_the_size_of_files_is_said_in_one_line(reference, tmp_path, monkeypatch, name, limit):
    "A real refusal by the operating system, at the weights and at the checkpoint"
    real, soft = train._write_results, resource.getrlimit(resource.RLIMIT_FSIZE)
    def limited(f):
        def call(*args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
            try: return f(*args)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        return call
    with monkeypatch.context() as m:
        if name == 'model.safetensors': m.setattr(train, '_write_results', limited(train._write_results))
        else: m.setattr(Checkpoint, 'after_epoch', limited(Checkpoint.after_epoch))
        with pytest.raises(DataError, match=rf'cannot write .*{name} \(File too large\): free some space') as e: run(tmp_path)
    assert '\n' not in str(e.value) and not list((tmp_path/'t').rglob('*tmp*'))
    assert read(run(tmp_path)) == read(reference['none'])


@pytest.mark.parametrize('where', ['.', 't', 't/none', 't/none/seed42/fold0'])
def test_a_file_where_a_folder_should_be_is_said_in_one_line(tmp_path, where):
    place = tmp_path/'out'/where
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text('in the way')
    with pytest.raises(
        DataError, match=r'cannot write .*\((File exists|Not a directory)\): give an out_dir that can be written'
    ) as e:
        run(tmp_path / 'out')
    assert '\n' not in str(e.value) and place.read_text() == 'in the way'


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch, number):
    real = os.mkdir
    def mkdir(path, *args, **kwargs):
        if str(tmp_path) in str(path): raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr(os, 'mkdir', mkdir)
    with pytest.raises(
        DataError, match=rf'cannot write .*\({os.strerror(number)}\): give an out_dir that can be written'
    ) as e:
        run(tmp_path / 'out')
    assert '\n' not in str(e.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'executed'),)
    checkpoint = tmp_path/'t'/'none'/'seed42'/'fold0'/'checkpoint.pt'
    checkpoint.parent.mkdir(parents=True)
    for save in (lambda: torch.save(dict(key='x', model=Evil()), checkpoint), lambda: checkpoint.write_bytes(pickle.dumps(Evil()))):
        save()
        with pytest.raises(DataError, match=r'checkpoint.pt is damaged'): run(tmp_path)
        assert not (tmp_path/'executed').exists()
    pickle.loads(checkpoint.read_bytes())
    assert (tmp_path/'executed').exists(), 'the pickle would have run code'


@pytest.mark.parametrize('size', [0, -1, 1000])
def test_a_truncated_checkpoint_is_refused_and_the_fold_starts_anew_without_it(reference, tmp_path, monkeypatch, size):
    interrupt(monkeypatch, tmp_path)
    checkpoint = tmp_path/'t'/'none'/'seed42'/'fold0'/'checkpoint.pt'
    os.truncate(checkpoint, checkpoint.stat().st_size + size if size < 0 else size)
    with pytest.raises(DataError, match='checkpoint.pt is damaged.*remove it to train this fold from its start') as e: run(tmp_path)
    assert '\n' not in str(e.value)
    checkpoint.unlink()
    if size > 0: assert read(run(tmp_path)) == read(reference['none'])


def interrupt(monkeypatch, out, after=1, **kw):
    "Train until the checkpoint of an epoch is written"
    real = Checkpoint.after_epoch
    def die(self):
        real(self)
        if self.epoch + 1 == after: raise Stop('enough')
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', die)
        with pytest.raises(Stop): run(out, **kw)


def test_a_checkpoint_of_the_version_before_is_resumed(reference, tmp_path, monkeypatch):
    interrupt(monkeypatch, tmp_path, arm='prox')
    checkpoint = tmp_path/'t'/'prox'/'seed42'/'fold0'/'checkpoint.pt'
    state = torch.load(checkpoint, weights_only=True)
    del state['guard'], state['between'], state['history'][0]['skipped']
    torch.save(state, checkpoint)
    result = run(tmp_path, arm='prox')
    assert read(result) == read(reference['prox']) and np.array_equal(result.history.skipped, [math.nan, 0, 0], equal_nan=True)


def test_a_resume_does_not_overwrite_the_checkpoint_with_an_earlier_epoch(tmp_path, monkeypatch):
    "fastai calls `after_epoch` for the epochs it skips as well"
    interrupt(monkeypatch, tmp_path, after=2)
    checkpoint, seen = tmp_path/'t'/'none'/'seed42'/'fold0'/'checkpoint.pt', []
    class Watch(Callback):
        order = 99
        def after_epoch(self): seen.append(torch.load(checkpoint, weights_only=True)['epoch'])
    with_callback(monkeypatch, Watch())
    run(tmp_path)
    assert seen == [2, 2, 3]


@pytest.mark.parametrize('arm', ['none', 'prox'])
def test_gradients_added_up_across_an_epochs_end_survive_a_resume(tmp_path, monkeypatch, arm):
    whole = run(tmp_path/'whole', arm=arm, accum=3)
    interrupt(monkeypatch, tmp_path/'resumed', arm=arm, accum=3)
    assert torch.load(tmp_path/'resumed'/'t'/arm/'seed42'/'fold0'/'checkpoint.pt', weights_only=True)['between']['count'] == 8
    assert read(run(tmp_path/'resumed', arm=arm, accum=3)) == read(whole)


# --- later parameters ---

@pytest.mark.parametrize('change', [dict(deterministic=True), dict(on_device=True)])
def test_determinism_and_the_place_of_the_films_change_no_byte_on_a_cpu(reference, tmp_path, monkeypatch, change):
    seen = []
    class Watch(Callback):
        def before_train(self): seen.append((torch.are_deterministic_algorithms_enabled(), self.dls.train.store.on_device))
    with_callback(monkeypatch, Watch())
    assert read(run(tmp_path, **change)) == read(reference['none'])
    assert (
        set(seen) == {(change.get('deterministic', False), change.get('on_device', False))}
        and not torch.are_deterministic_algorithms_enabled()
    )


@pytest.mark.parametrize(
    'form',
    [dict(message='logit'), dict(message='centred'), dict(symmetric=True), dict(message='centred', symmetric=True)],
)
def test_forms_of_the_graph_train_and_are_saved(reference, tmp_path, form):
    result = run(tmp_path, arm='prox', epochs=1, **form)
    cfg, net = TrainConfig(**TINY | dict(out_dir=str(tmp_path))), load_model(result.path)
    table, pixels = load_data(cfg)
    folds, oof = load_folds(cfg, table), pd.read_parquet(result.path/'oof.parquet')
    assert (net.graph.message, net.graph.symmetric) == (form.get('message', 'prob'), form.get('symmetric', False))
    if net.graph.message == 'centred':
        np.testing.assert_allclose(
            net.graph.prevalence, table.loc[folds.to_numpy() > 0, table.attrs['labels']].mean(), atol=1e-7
        )
    logits = predict_logits(net, pixels, oof.row.to_numpy(), bs=16)
    np.testing.assert_allclose(logits['r'], oof.filter(regex='^r:').to_numpy(), atol=1e-5)
    A = net.graph.weight()
    assert torch.equal(A, A.T) == net.graph.symmetric or not A.any()


def test_a_centred_message_needs_a_prevalence():
    with pytest.raises(DataError, match='prevalence='): make_model(TrainConfig(**TINY | dict(arm='l1', message='centred')), ['a', 'b'])
    assert make_model(TrainConfig(**TINY | dict(arm='l1', message='centred')), ['a', 'b'], [.5, .25]).graph.prevalence.tolist() == [.5, .25]
    assert make_model(TrainConfig(**TINY | dict(message='centred')), ['a', 'b']).graph is None


def test_the_bar_shows_speed_and_time_left(tmp_path, capsys):
    train_fold(TINY | dict(out_dir=str(tmp_path)))
    said = capsys.readouterr().err
    assert 'epoch 1/3: ' in said and 'img/s' in said and re.search(r'epoch 2/3, fold \d\d:\d\d left: ', said)


@pytest.mark.parametrize('arm', ['none', 'prox'])
def test_the_learning_rate_finder_gives_the_same_curve_and_writes_nothing(tmp_path, monkeypatch, arm):
    monkeypatch.chdir(tmp_path)
    cfg = TrainConfig(**TINY | dict(out_dir=str(tmp_path/'out'), arm=arm, accum=2))
    curve = lr_range(cfg, n=30)
    pd.testing.assert_frame_equal(lr_range(cfg, n=30), curve)
    assert (
        len(curve) == 30
        and curve.lr.iloc[[0, -1]].tolist() == pytest.approx([1e-5, 10 ** (-5 / 30)], rel=0.01)
        and 1e-5 < curve.attrs['suggestion'] < 1
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'ask,says',
    [
        (dict(low=0.0), 'low is above 0'),
        (dict(low=1.0, high=0.1), 'below high'),
        (dict(n=5), 'at least 30'),
        (dict(low=1e25, high=1e30), 'start below low'),
        (dict(loss='mse'), 'use one of asl, bce'),
    ],
)
def test_the_learning_rate_finder_refuses_in_one_line(ask, says):
    with pytest.raises(DataError, match=says) as e: lr_range(TrainConfig(**TINY | dict(amp='no', grad_clip=0.)), **ask)
    assert '\n' not in str(e.value)


def test_a_bare_no_in_yaml_turns_mixed_precision_off():
    "YAML reads `amp: no` as false"
    assert TrainConfig(amp=False) == TrainConfig(amp='no') and TrainConfig(amp=False).hash == TrainConfig(amp='no').hash


def test_mixup_mixes_films_and_labels_in_training_alone_and_survives_a_resume(tmp_path, monkeypatch):
    seen = []
    class Watch(Callback):
        def after_batch(self): seen.append((self.training, bool(((self.y > 0) & (self.y < 1)).any())))
    with_callback(monkeypatch, Watch())
    whole = run(tmp_path/'whole', arm='prox', mixup=.4)
    assert {mixed for training, mixed in seen if training} == {True} and {mixed for training, mixed in seen if not training} == {False}
    interrupt(monkeypatch, tmp_path/'resumed', arm='prox', mixup=.4)
    assert read(run(tmp_path/'resumed', arm='prox', mixup=.4)) == read(whole)
    with pytest.raises(DataError, match='mixup=-1'): TrainConfig(mixup=-1)
    assert TrainConfig(mixup=0.).hash == TrainConfig().hash != TrainConfig(mixup=.4).hash


@pytest.mark.parametrize('amp, half', [('bf16', torch.bfloat16), ('fp16', torch.float16), ('no', torch.float32)])
def test_training_computes_in_the_type_that_amp_names(monkeypatch, amp, half):
    "fp16 is for a GPU; here its context and scaler are asked for on the CPU"
    cfg = TrainConfig(**TINY | dict(amp='no', epochs=1))
    table, pixels = load_data(cfg)
    dls = fold_dls(pixels, table, np.arange(len(table)) % 3, 0, bs=8)
    cfg.amp = amp
    dls.__dict__['_device'] = torch.device('cuda') if amp == 'fp16' else torch.device('cpu')
    monkeypatch.setattr(nn.Module, 'to', lambda self, *a, **k: self)
    net, seen = make_learner(cfg, dls, table.attrs['labels'], bar=False).model, set()
    net.backbone.conv1.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    with torch.autocast('cpu', half, enabled=amp == 'fp16'): z = net(torch.rand(2, 1, 32, 32))
    assert seen == {half} and z.dtype == torch.float32


def test_a_trained_fold_leaves_no_learner_in_memory(tmp_path, monkeypatch):
    kept, real = [], train.make_learner
    def watched(*args):
        kept.append(weakref.ref(learn := real(*args)))
        return learn

    monkeypatch.setattr(train, 'make_learner', watched)
    run(tmp_path, epochs=1)
    assert len(kept) == 1 and kept[0]() is None


@pytest.mark.parametrize('wrong', [False, True])
def test_training_leaves_threads_and_random_state_as_they_were(tmp_path, monkeypatch, wrong):
    def broken(*_): raise OSError('no disk')
    if wrong: monkeypatch.setattr(train, '_write_results', broken)
    if wrong: monkeypatch.setattr(train, '_find', broken)
    before, cfg = torch.get_num_threads(), TrainConfig(**TINY | dict(out_dir=str(tmp_path), epochs=1))
    torch.set_num_threads(2)
    try:
        for call in (lambda: train_fold(cfg, bar=False), lambda: lr_range(cfg, n=30), lambda: make_model(cfg, ['a'] if not wrong else [])):
            torch.manual_seed(5)
            expected, _ = torch.rand(3), torch.manual_seed(5)
            with pytest.raises((OSError, DataError)) if wrong else nullcontext(): call()
            assert torch.get_num_threads() == 2 and torch.rand(3).equal(expected)
    finally: torch.set_num_threads(before)


def test_a_second_fit_goes_on_from_the_average_with_a_new_one(tmp_path):
    cfg = TrainConfig(**TINY | dict(out_dir=str(tmp_path), epochs=1, ema=.9))
    table, pixels = load_data(cfg)
    learn = make_learner(cfg, train._loaders(cfg, pixels, table, load_folds(cfg, table)), table.attrs['labels'], bar=False)
    fit_fold(cfg, learn)
    shown, seen = {k: v.clone() for k, v in learn.model.state_dict().items()}, []
    class Look(Callback):
        order = EMA.order + 1
        def before_train(self): seen.append({k: v.clone() for k, v in self.model.state_dict().items()})
        def before_validate(self): seen.append((self.learn.ema.step, self.learn.ema.swapped))
    learn.add_cb(Look())
    fit_fold(cfg, learn)
    assert all(seen[0][k].equal(v) for k, v in shown.items()) and seen[1] == (len(learn.dls.train), True)
    assert not all(learn.model.state_dict()[k].equal(v) for k, v in shown.items())


def test_full_float32_leaves_the_precisions_as_they_were():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for kind, precision in ((conv, 'ieee'), (conv, 'tf32'), (matmul, 'tf32')):
            kind.fp32_precision = precision
            was = conv.fp32_precision, matmul.fp32_precision
            with model.full_float32():
                assert (conv.fp32_precision, matmul.fp32_precision) == (
                    'ieee',
                    'ieee',
                ) and torch.is_inference_mode_enabled()
            assert (conv.fp32_precision, matmul.fp32_precision) == was and not torch.is_inference_mode_enabled()
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_full_float32_of_two_threads_leaves_the_precisions_as_they_were():
    conv, (first_in, second_in, first_out) = torch.backends.cudnn.conv, (threading.Event() for _ in range(3))
    was = conv.fp32_precision, torch.backends.cudnn.allow_tf32
    def first():
        with model.full_float32():
            first_in.set()
            assert second_in.wait(60)
        first_out.set()
    def second():
        assert first_in.wait(60)
        with model.full_float32():
            second_in.set()
            assert first_out.wait(60)
            return conv.fp32_precision
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(f) for f in (first, second)]
        assert [job.result() for job in jobs] == [None, 'ieee']
    assert (
        conv.fp32_precision,
        torch.backends.cudnn.allow_tf32,
    ) == was  # the older switch, which torch.export reads, raises where the newer one says something else


def test_soft_targets_train_and_the_films_keep_their_definite_labels(tmp_path):
    hedged = dict(data_args={'n_patients': 40, 'uncertain_share': .4}, epochs=1)
    results = {p: run(tmp_path/p, **hedged, uncertain=p, definite=p in ('zeros', 'ones')) for p in ('ignore', 'zeros', 'ones', 'soft')}
    oof = {p: pd.read_parquet(r.path/'oof.parquet') for p, r in results.items()}
    y = [c for c in oof['ignore'] if c.startswith('y:')]
    folds = {(tmp_path/p/'t'/'folds.csv').read_bytes() for p in results}
    tables = {json.loads((r.path/'config.json').read_text())['hashes']['table'] for r in results.values()}
    assert len(folds) == 1 and len(tables) == 4 and oof['ignore'][y].isna().any(axis=None)
    for frame in oof.values(): pd.testing.assert_frame_equal(frame[y], oof['ignore'][y])
    assert len({frame['z:Edema'].to_numpy().tobytes() for frame in oof.values()}) == 4
