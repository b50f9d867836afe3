"The README's figures are those of the committed out-of-fold logits."
import re

import numpy as np
import pytest

from conftest import ROOT
from cxrlg.controls import load_outputs
from cxrlg.eval import macro_auc

README = (ROOT/'README.md').read_text()


def mean_fold_auc(out, z, labels):
    "Mean over seeds and folds of the fold's macro AUC"
    cols = [out.labels.index(l) for l in labels]
    return np.mean([macro_auc(out.targets[out.folds == k][:, cols], s[out.folds == k][:, cols]).macro for s in z for k in np.unique(out.folds)])


def row(start, arm):
    "The macro AUC in the README's table of results: the row of an arm, in the block that opens with a text"
    block = README[README.index(start):]
    return float(re.search(rf'^.*\| {arm}[^|]*\| (0\.\d+)', block, flags=re.M).group(1))


@pytest.mark.parametrize('arm', ['none', 'l1', 'prox'])
@pytest.mark.parametrize('name, start, judged', [('phantom', 'phantom (drawn)', 'all'), ('nih128', '[nih128]', 'all'), ('nih128', 'the same, 13 findings', 'frequent')])
def test_macro_auc_in_the_readme(name, start, judged, arm):
    out = load_outputs(ROOT/'nbs'/'results'/f'{name}_outputs.npz')[0]
    labels = [l for l, n in zip(out.labels, np.nansum(out.targets, 0)) if judged == 'all' or n >= 30]
    assert len(labels) == (13 if judged == 'frequent' else 14)
    z = out.logits if arm == 'none' else out.arms[arm]
    assert mean_fold_auc(out, z, labels) == pytest.approx(row(start, arm), abs=.0006)


def test_no_patient_is_in_two_folds_or_locked_as_well():
    out, locked, _ = load_outputs(ROOT/'nbs'/'results'/'nih128_outputs.npz')
    assert all(len(set(out.folds[out.patients == p])) == 1 for p in set(out.patients)) and not set(out.patients) & set(locked[2])
