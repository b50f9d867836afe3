"""Label graph: precision, compilation, and the callback inside real Learners."""
import copy
import math

import pytest
import torch
from fastai.basics import Adam, Callback, CancelStepException, DataLoaders, Learner, OptimWrapper, SGD
from fastai.callback.training import GradientAccumulation, GradientClip
from torch import nn
from torch.nn import functional as F

from cxrlg.core import DataError
from cxrlg.graph import GraphL1, LabelGraph, lam_max, planted_logits, soft_threshold


class Batches:
    def __init__(self, x, y, bs): self.x, self.y, self.bs = torch.as_tensor(x).float(), torch.as_tensor(y).float(), bs
    def __len__(self): return len(self.x) // self.bs
    def __iter__(self): return ((self.x[i:i + self.bs], self.y[i:i + self.bs]) for i in range(0, len(self) * self.bs, self.bs))


class Net(nn.Module):
    "A linear backbone and a graph, named as in CXRNet"
    def __init__(self, n_in, n_labels):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.graph = nn.Linear(n_in, n_labels), LabelGraph(n_labels)
    def forward(self, x): return self.graph(self.body(x))


def groups(m): return [list(m.body.parameters()), [m.graph.A]]


def learner(cb, n=640, L=4, bs=64, opt=Adam, splitter=groups, wd=0.1, lr=1e-2, cbs=(), model=None):
    z, y, _ = planted_logits(n, L, 4, seed=5)
    dl = Batches(z, y, bs)
    return Learner(DataLoaders(dl, dl), model or Net(L, L), loss_func=F.binary_cross_entropy_with_logits, opt_func=opt,
                   splitter=splitter, lr=lr, wd=wd, cbs=[*([cb] if cb else []), *cbs])


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


# the layer

def test_half_inputs_are_computed_in_float32():
    g = LabelGraph(6)
    with torch.no_grad(): g.A.normal_()
    z = torch.randn(9, 6).bfloat16()
    assert g(z).dtype == torch.float32 and torch.equal(g(z), g(z.float()))


@pytest.mark.parametrize('size', [1e4, -1e4])
def test_layer_is_finite_at_extreme_logits(size):
    g = LabelGraph(3)
    with torch.no_grad(): g.A.fill_(2.)
    out = g(torch.full((2, 3), size))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(g.A.grad).all()


def test_diagonal_stays_out_even_when_set():
    g, z = LabelGraph(4), torch.randn(5, 4)
    with torch.no_grad(): g.A.copy_(torch.eye(4) * 7)
    assert torch.equal(g(z), z) and g.nonzero == 0 and g.strength == 0


def test_one_label_is_the_identity():
    z = torch.randn(5, 1)
    assert torch.equal(LabelGraph(1)(z), z)


def test_compiled_training_step_equals_the_plain_one():
    plain = Net(4, 4)
    compiled, x = copy.deepcopy(plain), torch.randn(8, 4)
    fast = torch.compile(compiled, backend='aot_eager', fullgraph=True)
    for f in (plain, fast): f(x).square().sum().backward()
    assert torch.allclose(plain.graph.A.grad, compiled.graph.A.grad, atol=1e-6)
    assert torch.allclose(plain.graph.received, compiled.graph.received)
    copy.deepcopy(compiled)


def test_compiled_model_trains_with_the_callback():
    net, cb = Net(4, 4), GraphL1()
    net.compile(backend='aot_eager')
    fit(learner(cb, model=net))
    same = GraphL1()
    fit(learner(same))
    assert cb.counts == same.counts and cb.strength == pytest.approx(same.strength, rel=1e-3)


def test_state_dict_holds_A_only():
    assert list(LabelGraph(3).state_dict()) == ['A']


@pytest.mark.parametrize('kwargs', [dict(message='centred', prevalence=[.1, .2]), dict(prevalence=[.1] * 3),
                                    dict(message='softmax')])
def test_layer_refuses_bad_options(kwargs):
    with pytest.raises(DataError): LabelGraph(3, **kwargs)


# the callback

def test_l1_gradient_is_the_penalised_one_and_the_record_is_not():
    net, lam, lr = Net(4, 4), 0.05, 1e-2
    with torch.no_grad(): net.graph.A.copy_(torch.randn(4, 4))
    before, L = copy.deepcopy(net), learner(GraphL1(lam, 'l1'), n=64, opt=SGD, model=net, lr=lr)
    fit(L, 1)
    x, y = next(iter(L.dls.train))
    loss = F.binary_cross_entropy_with_logits(before(x), y)
    (loss + lam * before.graph.weight().abs().sum()).backward()
    off = ~torch.eye(4, dtype=torch.bool)
    assert torch.allclose(net.graph.A[off], (before.graph.A - lr * before.graph.A.grad)[off], atol=1e-6)
    assert L.recorder.losses[0] == pytest.approx(loss.item(), rel=1e-5)


def test_prox_step_is_the_formula():
    net, lam = Net(4, 4), 1e-3
    with torch.no_grad(): net.graph.A.copy_(torch.randn(4, 4) * net.graph.mask)
    cb, A = GraphL1(lam, step=0.5), net.graph.A.detach().clone()
    L = learner(cb, n=64, model=net)
    cb.counts['steps'], cb.means['grad'] = 4, torch.zeros(4, 4)
    before = copy.deepcopy(net)
    x, y = next(iter(L.dls.train))
    F.binary_cross_entropy_with_logits(before(x), y).backward()
    fit(L, 1)
    w, p = 4 / (4 + 4), torch.sigmoid(before(x))
    m = torch.sigmoid(before.body(x))
    d = 0.3**2 / 4 * (m.square().sum(1, keepdim=True) * p * (1 - p)).mean(0)
    rate = 0.5 * (1 - w) / d
    assert torch.allclose(net.graph.A, soft_threshold(A - rate * w * before.graph.A.grad, rate * lam), atol=1e-5)


def test_lam_max_of_the_first_batch():
    cb = GraphL1(share=0.5)
    L = learner(cb, n=64, lr=0.)
    z = L.model.body(next(iter(L.dls.train))[0]).detach()
    fit(L, 1)
    assert cb.lam_max == pytest.approx(lam_max(z, L.dls.train.y), rel=1e-4)
    assert cb.lam_ratio == pytest.approx(0.5) and cb.lam == pytest.approx(0.5 * cb.lam_max)


@pytest.mark.parametrize('opt', [Adam, lambda p, lr, **k: OptimWrapper(p, torch.optim.AdamW, lr=lr)])
@pytest.mark.parametrize('mode', ['l1', None])
def test_weight_decay_leaves_A_alone(opt, mode):
    "A step of 1e-6 with a decay of 1e5 takes a tenth away each time, unless the callback forbids it"
    net = Net(4, 4)
    with torch.no_grad(): net.graph.A.fill_(1.)
    fit(learner(GraphL1(0., mode) if mode else None, opt=opt, wd=1e5, lr=1e-6, model=net), 1)
    assert torch.allclose(net.graph.A, torch.ones(4, 4), atol=1e-4) == (mode == 'l1')


def test_prox_keeps_the_optimizer_away_from_A():
    net = Net(4, 4)
    L = fit(learner(GraphL1(1e9), wd=1e5, lr=1e-6, model=net))
    assert net.graph.nonzero == 0 and 'grad_avg' not in L.opt.state[net.graph.A]


def test_torch_optimizer_wants_A_in_its_own_group():
    def adamw(params, lr, **_): return OptimWrapper(params, torch.optim.AdamW, lr=lr)
    L = learner(GraphL1(), opt=adamw, splitter=lambda m: list(m.parameters()))
    with pytest.raises(DataError, match='group of its own'): fit(L)


def test_backbone_is_clipped_as_without_a_graph():
    "With prox and A held at zero the backbone's weights equal those of a run that has no graph gradient at all"
    with_graph = fit(learner(GraphL1(1e9), cbs=[GradientClip(1e-3)], opt=SGD)).model
    without = Net(4, 4)
    without.graph.A.requires_grad_(False)
    fit(learner(None, cbs=[GradientClip(1e-3)], opt=SGD, model=without))
    assert with_graph.graph.nonzero == 0
    assert torch.equal(with_graph.body.weight, without.body.weight)


def test_accumulation_counts_the_penalty_once():
    class Term(Callback):
        order = 10.7
        def before_step(self): self.grad = self.model.graph.A.grad.clone()
    seen = []
    for bs, cbs in ((128, []), (32, [GradientAccumulation(128)])):
        net, term = Net(4, 4), Term()
        with torch.no_grad(): net.graph.A.fill_(.5)
        fit(learner(GraphL1(0.3, 'l1'), n=128, bs=bs, model=net, cbs=[*cbs, term]), 1)
        seen.append(term.grad)
    assert torch.allclose(*seen, atol=1e-5)


@pytest.mark.parametrize('order', [9, 12])
@pytest.mark.parametrize('mode', ['l1', 'prox'])
def test_cancelled_steps_do_not_move_A(order, mode):
    class Overflow(Callback):
        def before_step(self): raise CancelStepException()
    cb = Overflow()
    cb.order = order
    graph = GraphL1(mode=mode)
    L = fit(learner(graph, cbs=[cb]))
    assert L.model.graph.nonzero == 0 and graph.counts['steps'] == 0


def test_a_non_finite_batch_never_reaches_A():
    L = learner(GraphL1(), cbs=[])
    L.dls.train.y[64:128] = math.nan
    L.dls.train.x[64:128] = math.inf
    L.model.body.requires_grad_(False)
    fit(L, 1)
    assert torch.isfinite(L.model.graph.A).all() and all(torch.isfinite(v).all() for v in L.graph_l1.means.values())


def test_a_run_resumed_from_its_state_is_the_same():
    whole = GraphL1()
    one = fit(learner(whole, opt=SGD), 4)
    first = GraphL1()
    half = fit(learner(first, opt=SGD), 2)
    second = GraphL1()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest = fit(learner(second, opt=SGD, model=half.model), 2)
    assert torch.equal(one.model.graph.A, rest.model.graph.A) and whole.counts == second.counts


def test_callback_refuses_a_model_without_graph():
    z = torch.randn(64, 4)
    dls = DataLoaders(Batches(z, z > 0, 64), Batches(z, z > 0, 64))
    L = Learner(dls, nn.Linear(4, 4), loss_func=F.binary_cross_entropy_with_logits, cbs=GraphL1())
    with pytest.raises(DataError, match='no LabelGraph'): fit(L)


@pytest.mark.parametrize('kwargs', [dict(lam=1, share=.1), dict(mode='lasso'), dict(lam=-1.), dict(step=0.), dict(step=2.)])
def test_callback_refuses_bad_options(kwargs):
    with pytest.raises(DataError): GraphL1(**kwargs)


def test_symmetric_graph_stays_symmetric_under_prox():
    net = Net(4, 4)
    net.graph = LabelGraph(4, symmetric=True)
    fit(learner(GraphL1(share=0.05), model=net))
    assert net.graph.nonzero > 0 and torch.allclose(net.graph.A, net.graph.A.T, atol=1e-6)
