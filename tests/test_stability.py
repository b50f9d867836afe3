"""Stable couplings: the bound on false ones, agreement, and refusals."""
import numpy as np
import pytest

from cxrlg.core import DataError
from cxrlg.graph import planted_logits
from cxrlg.stability import edge_agreement, false_edges_bound, stable_edges


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


def test_one_patient_cannot_be_halved():
    z, y, _ = planted_logits(40, 3, 2, seed=15)
    with pytest.raises(DataError, match='one patient cannot'): stable_edges(z, y, groups=np.zeros(40))


@pytest.mark.parametrize('tau', [0.5, 1.01])
def test_the_bound_refuses_shares_at_which_it_does_not_hold(tau):
    with pytest.raises(DataError, match='above 1/2'): false_edges_bound(10, 182, tau, 50)
