"""Label graph: precision, compilation, the callback inside real Learners, faulty input and full size of the exact fit."""
import copy, math, warnings

import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Adam, Callback, CancelStepException, DataLoaders, Learner, OptimWrapper, SGD
from fastai.callback.training import GradientAccumulation, GradientClip
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from cxrlg.graph import (GraphL1, LabelGraph, coupling_path, cv_couplings, edge_agreement, fit_couplings, lam_max,
                         planted_logits, soft_threshold, stable_edges)


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
    return Learner(DataLoaders(dl, dl), model or Net(L, L), loss_func=F.binary_cross_entropy_with_logits, opt_func=opt, splitter=splitter,
                   lr=lr, wd=wd, cbs=[*([cb] if cb else []), *cbs])


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


def assert_sound(fit_):
    for o in (fit_.A, fit_.bias, fit_.scale): assert np.isfinite(o).all()
    assert not fit_.A.diagonal().any() and np.isfinite(fit_.kkt)


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


@pytest.mark.parametrize('kwargs', [dict(message='centred', prevalence=[.1, .2]), dict(prevalence=[.1] * 3), dict(message='softmax')])
def test_layer_refuses_bad_options(kwargs):
    with pytest.raises(ValueError): LabelGraph(3, **kwargs)


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
    L = learner(GraphL1(), opt=lambda p, lr, **k: OptimWrapper(p, torch.optim.AdamW, lr=lr), splitter=lambda m: list(m.parameters()))
    with pytest.raises(ValueError, match='group of its own'): fit(L)


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
    L = Learner(DataLoaders(Batches(z, z > 0, 64), Batches(z, z > 0, 64)), nn.Linear(4, 4), loss_func=F.binary_cross_entropy_with_logits, cbs=GraphL1())
    with pytest.raises(ValueError, match='no LabelGraph'): fit(L)


@pytest.mark.parametrize('kwargs', [dict(lam=1, share=.1), dict(mode='lasso'), dict(lam=-1.), dict(step=0.), dict(step=2.)])
def test_callback_refuses_bad_options(kwargs):
    with pytest.raises(ValueError): GraphL1(**kwargs)


def test_symmetric_graph_stays_symmetric_under_prox():
    net = Net(4, 4)
    net.graph = LabelGraph(4, symmetric=True)
    fit(learner(GraphL1(share=0.05), model=net))
    assert net.graph.nonzero > 0 and torch.allclose(net.graph.A, net.graph.A.T, atol=1e-6)


# the exact fit

def objective(f, z, y):
    "Penalised objective of a fit, from scratch"
    eta, known = f.refine(z), ~np.isnan(y)
    return (np.logaddexp(0, eta) - np.nan_to_num(y) * eta)[known].sum() / known.sum() + f.lam * np.abs(f.A).sum()


def reference(z, y, lam, alpha, bias, scale):
    "The same objective by L-BFGS-B on A = A+ - A-, label by label"
    M, N, total = alpha / (1 + np.exp(-z)), (~np.isnan(y)).sum(), 0.
    for j in range(z.shape[1]):
        rows = ~np.isnan(y[:, j])
        free = np.c_[np.ones((rows.sum(), int(bias))), z[rows][:, [j] * scale]]
        X, o, t = np.delete(M, j, 1)[rows], z[rows, j], y[rows, j]
        k = X.shape[1]
        def f(v):
            eta = o + X @ (v[:k] - v[k:2 * k]) + free @ v[2 * k:]
            r = 1 / (1 + np.exp(-eta)) - t
            g = X.T @ r / N
            return (np.logaddexp(0, eta) - t * eta).sum() / N + lam * v[:2 * k].sum(), np.r_[g + lam, lam - g, free.T @ r / N]
        bounds = [(0, None)] * 2 * k + [(None, None)] * free.shape[1]
        total += minimize(f, np.zeros(len(bounds)), jac=True, method='L-BFGS-B', bounds=bounds, options=dict(maxiter=50000, maxfun=100000, ftol=1e-17, gtol=1e-13, maxcor=50)).fun
    return total


@pytest.mark.parametrize('bias,scale', [(True, False), (False, False), (True, True), (False, True)])
@pytest.mark.parametrize('share', [0.5, 0.05])
def test_objective_equals_a_general_solver(bias, scale, share):
    z, y, _ = planted_logits(1500, 5, 6, size=(2, 6), seed=3)
    y[np.random.default_rng(0).random(y.shape) < 0.1] = np.nan
    top = coupling_path(z, y, lams=1., bias=bias, scale=scale)[0].lam_max
    f = coupling_path(z, y, lams=share * top, bias=bias, scale=scale)[0]
    assert f.kkt <= 1e-6 * top and f.nonzero > 0
    assert objective(f, z, y) == pytest.approx(reference(z, y, f.lam, 0.3, bias, scale), rel=1e-9)


def test_kkt_residual_from_scratch():
    z, y, _ = planted_logits(3000, seed=1)
    f = coupling_path(z, y, lams=2e-4)[0]
    r = 1 / (1 + np.exp(-f.refine(z))) - y
    g = (0.3 / (1 + np.exp(-z))).T @ r / y.size
    off = ~np.eye(14, dtype=bool)
    violation = np.where(f.A != 0, np.abs(g + f.lam * np.sign(f.A)), np.maximum(np.abs(g) - f.lam, 0))[off]
    assert violation.max() <= 1e-6 * f.lam_max and abs(r.mean(0)).max() / 14 <= 1e-9


def test_lam_max_is_where_the_first_coupling_enters():
    z, y, _ = planted_logits(2000, 6, 6, seed=2)
    top = coupling_path(z, y, lams=1.)[0].lam_max
    above, below = (coupling_path(z, y, lams=top * s)[0].nonzero for s in (1.0001, 0.99))
    assert above == 0 and below >= 1


def test_warm_path_equals_cold_fits():
    z, y, _ = planted_logits(2000, 6, 6, seed=4)
    for f in coupling_path(z, y, n_lams=8)[1::3]: assert np.allclose(f.A, coupling_path(z, y, lams=f.lam)[0].A, atol=1e-5)


def test_masked_targets_equal_dropped_rows():
    z, y, _ = planted_logits(2000, 4, 4, seed=6)
    masked = y.copy()
    masked[1500:] = np.nan
    assert np.allclose(coupling_path(z, masked, lams=1e-3)[0].A, coupling_path(z[:1500], y[:1500], lams=1e-3)[0].A, atol=1e-6)


def test_planted_couplings_and_placebo():
    z, y, truth = planted_logits(50_000, seed=11)
    f = fit_couplings(z, y, groups=np.arange(50_000) // 5)
    assert f.nonzero <= 22 and (np.sign(f.A) == np.sign(truth))[truth != 0].all()
    assert fit_couplings(z, np.random.default_rng(1).permutation(y)).nonzero <= 1


def test_constant_label_and_rare_label_receive_nothing():
    z, y, _ = planted_logits(1000, 5, 6, seed=7)
    y[:, 1], y[:, 2] = 0, 0
    y[:4, 2] = 1
    y[:, 3] = np.nan
    f = fit_couplings(z, y, labels=list('abcde'))
    assert_sound(f)
    assert f.skipped == ['b', 'c', 'd'] and not f.A[:, 1:4].any() and not f.bias[1:4].any()
    assert np.array_equal(f.refine(z)[:, 1:4], z[:, 1:4])


def test_all_labels_constant():
    z = np.random.default_rng(0).normal(size=(100, 3))
    f = fit_couplings(z, np.zeros((100, 3)))
    assert_sound(f)
    assert f.nonzero == 0 and f.skipped == [0, 1, 2]


def test_collinear_labels():
    z, y, _ = planted_logits(3000, 5, 6, seed=8)
    z[:, 4] = z[:, 3]
    y[:, 4] = y[:, 3]
    for lam in (1e-3, 1e-6):
        f = coupling_path(z, y, lams=lam)[0]
        assert_sound(f)
        assert f.kkt <= 1e-6


def test_constant_logits():
    z, y, _ = planted_logits(1000, 4, 4, seed=9)
    z[:, 2] = 0.7
    f = coupling_path(z, y, lams=1e-5)[0]
    assert_sound(f)
    assert not f.A[2].any()


@pytest.mark.parametrize('share', [0.01, 1.])
@pytest.mark.parametrize('message', ['prob', 'logit'])
def test_extreme_logits(share, message):
    z, y, _ = planted_logits(1000, 4, 4, seed=10)
    hit = np.random.default_rng(0).random(z.shape) < share
    z = np.where(hit, np.sign(z) * 1e4, z)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for f in (coupling_path(z, y, lams=1e-3, message=message)[0], fit_couplings(z, y, message=message, n_lams=8)):
            assert_sound(f)
            assert np.isfinite(f.refine(z)).all()


def test_rows_with_nan_logits_are_left_out():
    z, y, _ = planted_logits(1000, 4, 4, seed=12)
    holed = z.copy()
    holed[::10, 1] = np.nan
    rows = ~np.isnan(holed).any(1)
    assert np.array_equal(fit_couplings(holed, y, lam=1e-3).A, fit_couplings(z[rows], y[rows], lam=1e-3).A)
    assert_sound(fit_couplings(holed, y, groups=np.arange(1000) // 3))
    with pytest.raises(ValueError, match='nothing to fit'): fit_couplings(np.full_like(z, np.nan), y)


def test_one_label():
    z, y, _ = planted_logits(500, 3, 2, seed=13)
    f = fit_couplings(z[:, :1], y[:, :1])
    assert_sound(f)
    assert f.A.shape == (1, 1) and f.nonzero == 0
    assert len(stable_edges(z[:, :1], y[:, :1], n_pairs=2)) == 0


def test_two_hundred_labels():
    z, y, truth = planted_logits(1000, 200, 20, seed=14)
    f = coupling_path(z, y, lams=1e-5)[0]
    assert_sound(f)
    assert f.A.shape == (200, 200) and f.kkt <= 1e-6 and 0 < f.nonzero < 10_000


def test_fewer_patients_than_folds():
    z, y, _ = planted_logits(40, 3, 2, seed=15)
    with pytest.raises(ValueError, match='n_splits=5 is more than the 4 patients: use n_splits=4'): fit_couplings(z, y, groups=np.arange(40) // 10)
    with pytest.raises(ValueError, match='one patient cannot'): fit_couplings(z, y, groups=np.zeros(40))
    with pytest.raises(ValueError, match='one patient cannot'): stable_edges(z, y, groups=np.zeros(40))


@pytest.mark.parametrize('bad,match', [(dict(logits=np.zeros((4, 2))), 'one shape'), (dict(targets=np.full((40, 3), -1.)), 'other than 0, 1'),
                                       (dict(lam='best'), 'min'), (dict(lam=-1.), 'not negative'), (dict(lam=float('nan')), 'not negative'), (dict(message='x'), 'message'),
                                       (dict(labels=['a']), 'names'), (dict(groups=[1, 2]), 'groups'), (dict(groups=[None] * 40), 'no group')])
def test_bad_arguments_are_refused(bad, match):
    z, y, _ = planted_logits(40, 3, 2, seed=16)
    with pytest.raises(ValueError, match=match): fit_couplings(**{**dict(logits=z, targets=y), **bad})


def test_patients_stay_together_and_the_rule_is_the_definition():
    z, y, _ = planted_logits(3000, 5, 5, seed=17)
    cv = cv_couplings(z, y, groups=np.arange(3000) // 6)
    best = cv.loss.idxmin()
    assert cv.attrs['1se'] == cv.lam[cv.loss <= cv.loss[best] + cv.se[best]].max()
    assert cv.attrs['min'] == cv.lam[best]
    twice = cv_couplings(np.tile(z, (2, 1)), np.tile(y, (2, 1)), groups=np.tile(np.arange(3000) // 6, 2))
    assert np.allclose(twice.se[:len(cv)], cv.se[:len(twice)], rtol=0.05)


def test_same_seed_same_answer():
    z, y, _ = planted_logits(1000, 5, 5, seed=18)
    assert np.array_equal(fit_couplings(z, y).A, fit_couplings(z, y).A)


def test_placebo_has_few_stable_edges():
    z, y, _ = planted_logits(3000, 8, 8, seed=19)
    y = np.random.default_rng(3).permutation(y)
    found = stable_edges(z, y, n_pairs=10)
    assert found.stable.sum() <= max(1, 2 * found.attrs['bound'])


def test_agreement_of_empty_and_opposite_matrices():
    a, b = np.zeros((3, 3)), np.zeros((3, 3))
    a[0, 1], b[0, 1] = 1, -1
    table = edge_agreement(dict(a=a, b=b, empty=np.zeros((3, 3)), also=np.zeros((3, 3))))
    assert table.loc['a', 'b'] == 0 and table.loc['empty', 'also'] == 1 and table.loc['a', 'empty'] == 0


@pytest.mark.parametrize('bias,scale', [(True, False), (False, True)])
def test_symmetric_objective_equals_a_general_solver(bias, scale):
    "One value a pair: scipy's L-BFGS-B on W+ and W- of the upper triangle"
    z, y, _ = planted_logits(600, n_labels=4, n_edges=5, size=(2., 5.), seed=3)
    lam = 0.1 * coupling_path(z, y, bias=bias, scale=scale, symmetric=True, n_lams=1)[0].lam_max
    fit = coupling_path(z, y, lams=lam, bias=bias, scale=scale, symmetric=True)[0]
    i, j = np.triu_indices(4, 1)
    M, P = 0.3 / (1 + np.exp(-z)), len(i)

    def f(v):
        W = np.zeros((4, 4)); W[i, j] = v[:P] - v[P:2*P]
        b, s = v[2*P:2*P + 4], v[2*P + 4:]
        eta = z * s + b + M @ (W + W.T)
        r = (1 / (1 + np.exp(-eta)) - y) / y.size
        G = M.T @ r
        G = (G + G.T)[i, j]
        return (np.logaddexp(0, eta) - y * eta).mean() + 2 * lam * v[:2*P].sum(), np.r_[G + 2 * lam, 2 * lam - G, r.sum(0), (r * z).sum(0)]
    bounds = [(0, None)] * 2 * P + [(None, None) if bias else (0, 0)] * 4 + [(None, None) if scale else (1, 1)] * 4
    best = minimize(f, np.r_[np.zeros(2*P + 4), np.ones(4)], jac=True, method='L-BFGS-B', bounds=bounds, options=dict(maxiter=20000, maxfun=50000, ftol=1e-16, gtol=1e-12)).fun
    assert (fit.A == fit.A.T).all() and 0 < fit.nonzero < 12
    assert fit.loss + lam * np.abs(fit.A).sum() == pytest.approx(best, rel=1e-9)


def test_symmetric_fit_with_a_rare_label_and_masked_targets():
    z, y, _ = planted_logits(800, n_labels=4, n_edges=5, size=(2., 5.), seed=4)
    y[:, 3] = 0; y[:2, 3] = 1; y[::7, 1] = np.nan
    fit = fit_couplings(z, y, symmetric=True, groups=np.arange(800) // 2)
    assert np.isfinite(fit.A).all() and (fit.A[:, 3] == 0).all() and fit.skipped == [3] and fit.kkt <= 1e-6 * fit.lam_max
