"On a CUDA GPU: the same bytes twice when asked for, also after a stop; half precision; what a CPU says too. Skipped without one."
import numpy as np
import pytest
import torch

from cxrlg.model import load_model, predict_logits
from cxrlg.predict import Predictor
from cxrlg.study import score_locked
from cxrlg.train import Checkpoint, TrainConfig, load_data, train_fold

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


class Stop(Exception): pass


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_a_resumed_fold_gives_the_same_bytes(tmp_path, monkeypatch, amp):
    whole, real = run(tmp_path/'whole', arm='prox', amp=amp), Checkpoint.after_epoch
    def die(self):
        real(self)
        if self.epoch == 0: raise Stop
    monkeypatch.setattr(Checkpoint, 'after_epoch', die)
    with pytest.raises(Stop): run(tmp_path/'stopped', arm='prox', amp=amp)
    monkeypatch.undo()
    assert read(run(tmp_path/'stopped', arm='prox', amp=amp)) == read(whole)


def test_a_gpu_says_what_a_cpu_says(tmp_path):
    "float32 on the CPU against the GPU's float32 with TF32 convolutions, and against `Predictor`, which asks for full float32"
    folds = [run(tmp_path, arm='prox', fold=k) for k in range(3)]
    pixels = load_data(TrainConfig(**SMALL))[1][:16]
    nets = [load_model(folds[0].path).to(d) for d in ('cpu', 'cuda')]
    for a, b in zip(*(predict_logits(net, pixels).values() for net in nets)): np.testing.assert_allclose(a, b, atol=2e-2)
    said = [Predictor(tmp_path/'t', 'prox', device=d, verbose=False)(list(pixels)) for d in ('cpu', 'cuda')]
    labels = nets[0].labels
    np.testing.assert_allclose(said[0][labels], said[1][labels], atol=1e-4)


def test_locked_patients_are_scored_on_the_gpu(tmp_path):
    for k in range(3): run(tmp_path, fold=k)
    assert len(score_locked(str(tmp_path/'t'), bar=False)) == 3
