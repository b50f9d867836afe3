"A tree of findings in the model: against the formula in numpy, unknown labels, saving, freezing, and labels without a tree."
import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from cxrlg.config import TrainConfig
from cxrlg.core import DataError
from cxrlg.features import FrozenHead
from cxrlg.model import CXRNet, load_model, save_model
from cxrlg.readers import CHEXPERT, CHEXPERT_PARENTS, NIH, parents_first, parents_of
from cxrlg.study import run_study
from cxrlg.tree import TiedTree

ARCH = dict(arch='test_resnet', arch_args={})


def tied(z, y, order):
    "The formula, a film and a link at a time, in double precision"
    p = expit(z)
    for c, parent in order:
        known = ~np.isnan(y[:, c]) & ~np.isnan(y[:, parent])
        def odds(rows): return np.log((y[rows, c].sum() + .5) / ((1 - y[rows, c]).sum() + .5))
        given = [expit(z[:, c] + odds(known & (y[:, parent] == k)) - odds(known)) for k in (0, 1)]
        p[:, c] = p[:, parent] * given[1] + (1 - p[:, parent]) * given[0]
    return p


@pytest.mark.parametrize('labels', [CHEXPERT, CHEXPERT[::-1], ['No Finding', *NIH]], ids=['CheXpert', 'turned round', 'NIH'])
def test_the_layer_is_the_formula_with_unknown_labels_left_out(labels):
    rng = np.random.default_rng(0)
    y, z = (rng.random((300, len(labels))) < .3).astype(float), rng.normal(size=(50, len(labels))) * 3
    y[rng.random(y.shape) < .2] = np.nan
    tree = TiedTree(labels, parents_of(labels)).fit_(torch.tensor(y, dtype=torch.float32))
    assert torch.sigmoid(tree(torch.tensor(z))).numpy() == pytest.approx(tied(z, y, tree.order), abs=1e-5)


def test_a_perfectly_calibrated_child_is_given_the_posterior_by_bayes():
    "Evidence that does not depend on the parent once the child is given; the parent is known for certain"
    prior, given = .1, {0: .02, 1: .5}
    tree = TiedTree(['Lung Opacity', 'Edema'], {'Edema': 'Lung Opacity'})
    tree.shift[:, 1] = torch.tensor([logit(given[k]) - logit(prior) for k in (0, 1)])
    ratio = np.array([.2, 1., 7.]) # of the evidence's likelihoods
    for k, sure in ((0, -30.), (1, 30.)):
        z = torch.tensor(np.column_stack([np.full(3, sure), np.log(ratio) + logit(prior)]))
        posterior = given[k] * ratio / (given[k] * ratio + 1 - given[k])
        assert torch.sigmoid(tree(z))[:, 1].numpy() == pytest.approx(posterior, abs=1e-6)


@pytest.mark.parametrize('parents', [{'b': 'a'}, {'a': 'b', 'c': 'a'}])
def test_parents_come_first(parents):
    order = parents_first(parents, list('abc'))
    assert {(('abc')[c], ('abc')[p]) for c, p in order} == set(parents.items())
    assert all(p not in [child for child, _ in order[i:]] for i, (_, p) in enumerate(order))


def test_no_finding_is_above_what_has_no_other_parent():
    assert parents_of(CHEXPERT) == CHEXPERT_PARENTS and 'Support Devices' not in CHEXPERT_PARENTS
    assert parents_of(['No Finding', 'Consolidation', 'Pneumonia']) == {'Consolidation': 'No Finding', 'Pneumonia': 'Consolidation'}
    assert parents_of(NIH) == {'Pneumonia': 'Consolidation'}
    with pytest.raises(DataError, match='no finding of Edema, Mass has its parent'):
        TiedTree(['Edema', 'Mass'], parents_of(['Edema', 'Mass']))


def test_a_model_with_a_tree_is_read_back(tmp_path):
    labels = ['Lung Opacity', 'Edema', 'Mass']
    tree = TiedTree(labels, parents_of(labels)).fit_(torch.tensor([[1., 1, 0], [0, 0, 1], [1, 0, 0]]))
    model, x = CXRNet(labels=labels, graph=tree, **ARCH).eval(), torch.rand(2, 1, 32, 32)
    save_model(model, tmp_path)
    back = load_model(tmp_path)
    assert back.graph.parents == {'Edema': 'Lung Opacity'} and torch.equal(back(x), model(x)) and torch.equal(back.graph.shift, tree.shift)
    before, after = back.both(x)
    assert torch.equal(before[:, [0, 2]], model.logits(x)[:, [0, 2]]) and not torch.allclose(before[:, 1], after[:, 1])
    head = FrozenHead(model)
    features = torch.randn(2, head.last.in_features)
    assert torch.equal(head(features), tree(head.last(features)))


def test_autocast_and_compile_do_not_reach_the_numbers():
    tree = TiedTree(CHEXPERT, parents_of(CHEXPERT)).fit_((torch.rand(200, 14) < .3).float())
    z = torch.randn(8, 14) * 5
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(tree(z), tree(z.float()))
    assert tree(z.double()).dtype == torch.float32


def test_labels_without_a_tree_are_refused_before_anything_is_trained(tmp_path):
    config = dict(study='t', data='phantom', data_args=dict(n_patients=40, findings=['Edema', 'Fracture']), arms=['none', 'tied'], size=32,
                  epochs=1, out_dir=str(tmp_path), n_splits=2, **ARCH)
    without = 'no finding of Edema, Fracture has its parent among them: train another arm'
    with pytest.raises(DataError, match=without):
        run_study(config, bar=False)
    assert not list(tmp_path.rglob('done.json'))
    assert TrainConfig(arm='tied').arm == 'tied'
