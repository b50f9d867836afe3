"Asymmetric Loss against a float64 reference, at extreme logits, in half precision, under autocast and compile."
import numpy as np
import pytest
import torch

from cxrlg.asl import AsymmetricLoss


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
