"On a CUDA GPU: the same bytes twice when asked for, also after a stop; half precision; what a CPU says too. Skipped without one."
import json

import numpy as np
import papermill
import pytest
import torch

from conftest import ROOT
from cxrlg import learner, train
from cxrlg.callbacks import EMA, Checkpoint, History, StepGuard
from cxrlg.graph import GraphL1
from cxrlg.model import load_model, predict_logits
from cxrlg.predict import Predictor
from cxrlg.study import run_study, score_locked
from cxrlg.config import TrainConfig
from cxrlg.train import load_data, train_fold

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
SMALL = dict(study='t', data_args={'n_patients': 60}, size=64, n_splits=3, locked=.2, epochs=2, bs=16, threads=1, deterministic=True)
BYTES = ('model.safetensors', 'oof.parquet')


def run(out, **kw): return train_fold(SMALL | dict(out_dir=str(out)) | kw, bar=False)
def read(result): return {name: (result.path/name).read_bytes() for name in BYTES}


@pytest.mark.parametrize('change', [dict(arm='none'), dict(arm='prox'), dict(arm='l1', amp='fp16'), dict(arm='prox', amp='no')], ids=str)
def test_deterministic_training_gives_the_same_bytes(tmp_path, change):
    first = run(tmp_path/'a', **change)
    assert read(first) == read(run(tmp_path/'b', **change))
    assert read(first)['oof.parquet'] == read(run(tmp_path/'c', on_device=True, **change))['oof.parquet']


def test_no_callback_waits_for_the_gpu(tmp_path, monkeypatch):
    for kind in (StepGuard, History, EMA, GraphL1):
        for name in ('after_backward', 'before_step', 'after_step', 'after_loss', 'after_batch'):
            if name in vars(kind): monkeypatch.setattr(kind, name, not_waiting(vars(kind)[name]))
    assert run(tmp_path, arm='prox').history.skipped.sum() == 0


def not_waiting(method):
    def guarded(self):
        torch.cuda.set_sync_debug_mode('error')
        try: return method(self)
        finally: torch.cuda.set_sync_debug_mode('default')
    return guarded


@pytest.mark.parametrize('amp, half', [('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_training_computes_in_half_precision(tmp_path, monkeypatch, amp, half):
    seen, real = set(), train.make_learner
    def watched(*args):
        learn = real(*args)
        learn.model.backbone.conv1.register_forward_hook(lambda m, i, o: seen.add(o.dtype) if m.training else None)
        return learn
    monkeypatch.setattr(train, 'make_learner', watched)
    assert run(tmp_path, amp=amp, arch='test_resnet', arch_args={}).history.skipped.sum() == 0 and seen == {half}


def test_deterministic_after_a_fold_that_was_not(tmp_path):
    run(tmp_path/'first', deterministic=False)
    assert read(run(tmp_path/'a')) == read(run(tmp_path/'b'))


class Stop(Exception): pass


@pytest.mark.parametrize('arm', ['none', 'prox'])
@pytest.mark.parametrize('amp', ['bf16', 'fp16', 'no'])
def test_a_resumed_fold_gives_the_same_bytes(tmp_path, monkeypatch, amp, arm):
    "Every tensor that the resumed run starts its second epoch with is compared first: a difference there names its cause"
    states, real_start, real = [], learner.EpochSeed.before_train, Checkpoint.after_epoch
    def watch(self):
        real_start(self)
        if self.epoch == 1: states.append({k: (v.stride(), v.dtype, v.cpu()) for k, v in tensors_of(self.learn)})
    def die(self):
        real(self)
        if self.epoch == 0: raise Stop('enough')
    monkeypatch.setattr(learner.EpochSeed, 'before_train', watch)
    whole = run(tmp_path/'whole', arm=arm, amp=amp)
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(Checkpoint, 'after_epoch', die)
        run(tmp_path/'stopped', arm=arm, amp=amp)
    resumed = run(tmp_path/'stopped', arm=arm, amp=amp)
    one, other = states
    assert set(one) == set(other)
    assert [k for k in one if one[k][:2] != other[k][:2] or not torch.equal(one[k][2], other[k][2])] == []
    assert read(resumed) == read(whole)


def tensors_of(learn):
    "Weights, statistics and the optimizer's state, by name"
    yield from learn.model.state_dict().items()
    for i, state in enumerate(learn.opt.opt.state.values()):
        for k, v in state.items(): yield f'optimizer {i} {k}', v
    ema = next(cb for cb in learn.cbs if isinstance(cb, EMA))
    yield from ((f'average {k}', v) for k, v in ema.average.items())


def test_a_whole_study_by_papermill_with_report_locked_patients_and_prediction(tmp_path):
    small = {k: v for k, v in SMALL.items() if k != 'deterministic'} | dict(study='whole', arms=['none', 'prox'], epochs=1)
    results = run_study(small, out_dir=str(tmp_path), n_boot=50, bar=False)
    folder = tmp_path/'whole'
    assert list(results.arm) == ['none', 'prox'] and (folder/'report.html').is_file()
    assert len(list(folder.glob('*/seed*/fold*/locked.parquet'))) == 6
    config = json.loads((folder/'none'/'seed42'/'fold0'/'config.json').read_text())
    assert config['device'].startswith('cuda') and config['amp_resolved'] in ('bf16', 'fp16')
    pixels = load_data(TrainConfig(**SMALL))[1][:8]
    said = Predictor(folder, 'none', verbose=False)(list(pixels))
    assert len(said) == 8 and np.isfinite(said[load_model(folder/'none'/'seed42'/'fold0').labels]).all(axis=None)


def test_a_gpu_says_what_a_cpu_says(tmp_path):
    "Full float32 on both, from the model's logits and from the ensemble's probabilities"
    folds = [run(tmp_path, arm='prox', fold=k) for k in range(3)]
    pixels = load_data(TrainConfig(**SMALL))[1][:16]
    nets = [load_model(folds[0].path).to(d) for d in ('cpu', 'cuda')]
    for a, b in zip(*(predict_logits(net, pixels).values() for net in nets)): np.testing.assert_allclose(a, b, atol=1e-3)
    said = [Predictor(tmp_path/'t', 'prox', device=d, verbose=False)(list(pixels)) for d in ('cpu', 'cuda')]
    labels = nets[0].labels
    np.testing.assert_allclose(said[0][labels], said[1][labels], atol=1e-4)


def test_locked_patients_are_scored_on_the_gpu(tmp_path):
    for k in range(3): run(tmp_path, fold=k)
    assert len(score_locked(str(tmp_path/'t'), bar=False)) == 3


def test_papermill_trains_a_fold_on_the_gpu(tmp_path):
    "All cells of the notebook hold on a GPU, the demonstrations too"
    parameters = {k: v for k, v in SMALL.items() if k != 'deterministic'} | dict(out_dir=str(tmp_path), epochs=1)
    papermill.execute_notebook(ROOT/'nbs'/'05_train.ipynb', tmp_path/'out.ipynb', parameters, cwd=ROOT/'nbs', progress_bar=False)
    assert json.loads((tmp_path/'t'/'none'/'seed42'/'fold0'/'config.json').read_text())['device'].startswith('cuda')
