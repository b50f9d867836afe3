"Blocks that are computed twice: weights and running statistics are what they are without, and what cannot be is said."
import copy
import re

import pytest
import timm
import torch
from torch import nn

from cxrlg.config import TrainConfig
from cxrlg.core import DataError
from cxrlg.learner import enough_memory, make_learner, recompute_blocks
from cxrlg.model import CXRNet
from cxrlg.train import train_fold
from small_studies import one_thread

TINY = dict(num_classes=3, in_chans=1, drop_rate=.3)
NETWORKS = {
    'resnet': dict(model_name='test_resnet', drop_path_rate=.2, **TINY),
    'seresnext': dict(model_name='seresnext101_32x4d', layers=[1, 1, 1, 1], cardinality=4, base_width=4, drop_path_rate=.2, **TINY),
    'efficientnet': dict(model_name='test_efficientnet', drop_path_rate=.2, **TINY),
    'transformer': dict(model_name='test_vit', img_size=64, **TINY),
}


def trained(net, steps=2):
    "The state of a network after a few steps, and its gradients"
    torch.manual_seed(1)
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(steps):
        opt.zero_grad()
        net(torch.rand(4, 1, 64, 64)).square().mean().backward()
        opt.step()
    return net.state_dict() | {f'grad of {k}': p.grad for k, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('name', NETWORKS)
def test_weights_statistics_and_gradients_have_the_same_bytes(name):
    torch.manual_seed(0)
    plain = timm.create_model(**NETWORKS[name])
    twice = copy.deepcopy(plain)
    recompute_blocks(twice)
    expected, found = trained(plain), trained(twice)
    assert expected.keys() == found.keys()
    assert [k for k, v in expected.items() if not torch.equal(v, found[k])] == []
    counters = [int(v) for k, v in found.items() if k.endswith('num_batches_tracked')]
    assert set(counters) <= {2}
    x = torch.ones(2, 1, 64, 64)
    with torch.inference_mode(): assert torch.equal(copy.deepcopy(twice).eval()(x), plain.eval()(x))


class Counting(nn.Module):
    "A block that counts the films that it has seen, as no norm layer does"
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer('seen', torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        return self.layer(x).tanh()


def test_any_buffer_of_a_block_is_moved_once():
    net = nn.Sequential(nn.Sequential(Counting(), Counting()))
    recompute_blocks(net)
    net(torch.rand(5, 2)).sum().backward()
    assert [float(m.seen) for m in net[0]] == [5, 5] and net[0][0].layer.weight.grad is not None


def test_timms_own_switch_would_count_each_batch_twice():
    "What the switch is there for: were timm's to do, this test would say so"
    torch.manual_seed(0)
    net = timm.create_model(**NETWORKS['resnet'])
    net.set_grad_checkpointing()
    counters = {int(v) for k, v in trained(net).items() if re.match(r'layer.*num_batches_tracked', k)}
    assert counters == {4}


def test_a_fold_has_the_same_bytes(tmp_path):
    small = dict(data_args={'n_patients': 40}, n_splits=2, size=32, arch='test_resnet', epochs=2, bs=16, amp='no', threads=1)
    small |= dict(accum=2, arm='prox')
    results = [train_fold(small | dict(out_dir=str(tmp_path/str(on)), grad_checkpoint=on), bar=False) for on in (False, True)]
    for name in ('model.safetensors', 'oof.parquet', 'couplings.csv'):
        assert len({(r.path/name).read_bytes() for r in results}) == 1, name
    assert results[1].config['grad_checkpoint'] is True


def test_blocks_are_computed_twice_in_training_only(monkeypatch):
    net, calls = timm.create_model('test_resnet', num_classes=3, in_chans=1), []
    monkeypatch.setattr('cxrlg.learner.recomputed', lambda f, *args, **kwargs: calls.append(f) or f(*args))
    recompute_blocks(net)
    x = torch.rand(2, 1, 64, 64)
    net(x)
    assert len(calls) == 4
    with torch.no_grad(): net(x)
    net.eval()(x)
    assert len(calls) == 4


def test_what_does_not_go_together_is_refused():
    with pytest.raises(DataError, match='grad_checkpoint=true and compile=true do not go together'):
        TrainConfig(grad_checkpoint=True, compile=True)
    with pytest.raises(DataError, match='set grad_checkpoint=false'):
        TrainConfig(grad_checkpoint=True, freeze=True, pretrained=True, rotate=0, crop=1)
    with pytest.raises(DataError, match='Sequential has no sequence of blocks to compute twice') as e:
        recompute_blocks(nn.Sequential(nn.Linear(1, 1)))
    assert '\n' not in str(e.value)


def test_an_architecture_without_blocks_is_refused_before_training(monkeypatch):
    monkeypatch.setattr('cxrlg.learner.repeated_blocks', lambda model: [])
    dls = type('Loaders', (), dict(device=torch.device('cpu')))()
    with pytest.raises(DataError, match='ResNet has no sequence of blocks'):
        make_learner(TrainConfig(grad_checkpoint=True, amp='no'), dls, ['a'], CXRNet('test_resnet', ['a']))


def test_memory_that_runs_out_names_the_switch():
    for on, said in ((False, True), (True, False)):
        with pytest.raises(DataError) as e:
            with enough_memory(TrainConfig(grad_checkpoint=on), 'cuda:0'): raise torch.OutOfMemoryError('CUDA out of memory')
        assert ('grad_checkpoint=true' in str(e.value)) == said
