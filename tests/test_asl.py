"Asymmetric Loss against a float64 reference, at extreme logits, in half precision, under autocast and compile."
import copy

import numpy as np
import pytest
import torch

from cxrlg import asl
from cxrlg.asl import AsymmetricLoss
from cxrlg.core import DataError


def reference(z, y, gamma_neg, gamma_pos, clip):
    "The formula of the paper in numpy float64"
    p = 1 / (1 + np.exp(-z))
    p_m = np.maximum(p - clip, 0)
    return -(y * (1 - p)**gamma_pos * np.log(p) + (1 - y) * p_m**gamma_neg * np.log(1 - p_m))


@pytest.mark.parametrize('gamma_neg,gamma_pos,clip', [(4, 0, .05), (2, 1, 0), (0, 0, .2), (1.5, .5, .1)])
def test_equals_the_formula_in_float64(gamma_neg, gamma_pos, clip):
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 3, (200, 14)), (rng.random((200, 14)) < .2).astype(float)
    loss = AsymmetricLoss(gamma_neg, gamma_pos, clip, 'none')(torch.tensor(z), torch.tensor(y))
    np.testing.assert_allclose(loss.numpy(), reference(z, y, gamma_neg, gamma_pos, clip), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('clip', [0., .05])
def test_finite_at_extreme_logits(dtype, clip):
    z = torch.tensor([[-1e4, 1e4, 0., -80., 80.]]).to(dtype).repeat(2, 1).requires_grad_()
    y = torch.tensor([[0., 0., 0., 0., 0.], [1., 1., 1., 1., 1.]])
    loss = AsymmetricLoss(clip=clip)(z, y)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(z.grad).all()


def test_a_missed_positive_keeps_its_gradient():
    z = torch.tensor([[-1e4]], requires_grad=True)
    AsymmetricLoss()(z, torch.ones(1, 1)).backward()
    assert z.grad.item() == -1


def test_float32_inside_autocast():
    z, y = torch.randn(8, 14), torch.zeros(8, 14)
    with torch.autocast('cpu', torch.bfloat16): inside = AsymmetricLoss()(z, y)
    assert inside.dtype == torch.float32 and inside == AsymmetricLoss()(z, y)


def test_gradient_matches_finite_differences():
    torch.manual_seed(0)
    z, y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([[1., 0, 0, 1]] * 3)
    loss = AsymmetricLoss(2., 1., .05, focus_grad=True)
    assert torch.autograd.gradcheck(lambda z: loss._loss(z, y.double()), z)


def test_leaves_the_grad_mode_alone():
    with torch.no_grad():
        AsymmetricLoss()(torch.randn(2, 3), torch.zeros(2, 3))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('bad', [dict(gamma_neg=-1), dict(clip=1.), dict(clip=-.1), dict(reduction='avg')])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError): AsymmetricLoss(**bad)


@pytest.mark.parametrize(
    'logits, targets',
    [((4, 1), (4,)), ((4, 3), (4, 1)), ((4, 3), (3,)), ((4, 3), (1, 3)), ((4,), (4, 1)), ((2, 3), (3, 2))],
)
def test_targets_are_not_broadcast(logits, targets):
    with pytest.raises(DataError) as e: AsymmetricLoss()(torch.zeros(logits), torch.ones(targets))
    assert str(logits) in str(e.value) and str(targets) in str(e.value)


@pytest.mark.parametrize('value', [-1., 2., 1.01, float('inf'), -float('inf'), -1e-3])
def test_targets_that_cannot_be_meant(value):
    y = torch.zeros(3, 4)
    y[1, 2] = value
    with pytest.raises(DataError, match='below 0 or above 1'): AsymmetricLoss()(torch.zeros(3, 4), y)


@pytest.mark.parametrize('y', [torch.full((2, 3), .3), torch.full((2, 3), torch.nan), torch.ones(2, 3, dtype=torch.bool),
                               torch.ones(2, 3, dtype=torch.int64), torch.zeros(0, 3)], ids=['soft', 'unknown', 'bool', 'int', 'empty'])
def test_targets_that_can(y):
    assert torch.isfinite(AsymmetricLoss()(torch.zeros(y.shape), y))


def test_on_a_gpu_the_answer_comes_late_and_no_batch_is_lost(monkeypatch):
    "The same steps with a stand-in for the GPU's queue: an answer arrives when it does, and covers all batches before it was asked"
    arrived, asked = [False], []
    def send(flag):
        asked.append(bool(flag))
        return flag.clone(), lambda: arrived[0]
    monkeypatch.setattr(asl, '_send', send)
    class Far(torch.Tensor):
        @property
        def device(self): return torch.device('cuda')
    good, bad = torch.zeros(2, 3).as_subclass(Far), torch.full((2, 3), -1.).as_subclass(Far)
    loss = AsymmetricLoss()
    for y in (good, bad, good): loss._refuse_odd(y)
    assert asked == [False]
    arrived[0] = True
    loss._refuse_odd(good)
    assert asked == [False, True]
    with pytest.raises(DataError, match='below 0 or above 1'): loss._refuse_odd(good)
    loss._refuse_odd(good)
    assert asked == [False, True, False] and copy.deepcopy(loss).sent is None


@pytest.mark.parametrize('target', [.3, .5, .7])
def test_a_soft_target_is_the_mean_of_both_losses_and_without_focusing_where_it_is_least(target):
    z = torch.logit(torch.tensor([[.2, target, .9]]))
    for loss in (AsymmetricLoss(0, 0, 0, 'none'), AsymmetricLoss(reduction='none')):
        one, zero, soft = (loss(z, torch.full_like(z, y)) for y in (1., 0., target))
        assert torch.allclose(soft, target * one + (1 - target) * zero, atol=1e-6)
    z.requires_grad_()
    AsymmetricLoss(0, 0, 0, 'sum')(z, torch.full_like(z, target)).backward()
    assert torch.allclose(z.grad[0], torch.sigmoid(z.detach()[0]) - target, atol=1e-6) and abs(z.grad[0, 1]) < 1e-6
