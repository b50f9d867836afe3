"The ablation's file, its command, and the figures of its page."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import t as student

from conftest import ROOT
from cxrlg.ablation import ablation_outputs, ablation_table, read_ablation
from cxrlg.corrections import Outputs
from cxrlg.core import DataError
from cxrlg.eval import macro_auc, simulate
from cxrlg.results import example_study, read_study
from cxrlg.study import expand


def command(*args):
    "The command as a user calls it: exit status and lines of standard error"
    run = subprocess.run([Path(sys.executable).parent/'cxrlg_ablation', *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stderr.strip().splitlines()


def test_each_variant_changes_what_it_says_and_nothing_else():
    changes = yaml.safe_load((ROOT/'configs'/'ablation.yaml').read_text())['variants']
    for variants in read_ablation(ROOT/'configs'/'ablation.yaml').values():
        for name, change in changes.items():
            full, other = (expand(variants[v]) for v in ('full', name))
            assert len(full) == len(other)
            for a, b in zip(full, other):
                differ = {k for k in vars(a) if getattr(a, k) != getattr(b, k)} - {'study'}
                assert differ == {'arm' if k == 'arms' else k for k in change}, name


@pytest.mark.parametrize('text, says', [
    ('sets: {}', 'variants is missing or unknown'), ('[1, 2]', 'mapping'), ('sets: {a: {base: no.yaml}}\nvariants: {}', 'there is no configuration'),
    ('sets: {}\nvariants: {}', 'has no set'), ('sets: {a: {base: base.yaml}}\nvariants: {no: {ema: 0}}', 'is not text'), ('sets: {a: {base: base.yaml}}\nvariants: {no_flip: {ema: 0}}', 'every table has'),
    ('sets: {a: {base: base.yaml}}\nvariants: {x: {arms: [none, l1]}}', 'a variant has one arm'), ('sets: {a: {base: base.yaml}}\nvariants: {x: {seeds: [1]}}', 'the seeds of full'),
    ('sets: {a: {base: base.yaml}}\nvariants: {x: {locked: 0.1}}', 'give it to the set'), ('sets: {a: {base: 3}}\nvariants: {}', 'is to have base'), ('sets: {a: {base: base.yaml}}\nvariants: {x: {epoch: 1}}', "did you mean 'epochs'"), ('sets: {a: {base: base.yaml}}\nvariants: {x: {epochs: 0}}', 'a, x: epochs=0'), ('sets: {', 'not valid YAML')])
def test_the_command_refuses_a_wrong_file_in_one_line(tmp_path, text, says):
    (tmp_path/'base.yaml').write_text('epochs: 1')
    (tmp_path/'ablation.yaml').write_text(text)
    code, lines = command(tmp_path/'ablation.yaml', '--out_dir', tmp_path/'runs')
    assert code == 2 and len(lines) == 1 and lines[0].startswith('cxrlg_ablation: ') and says in lines[0], lines
    assert not (tmp_path/'runs').exists()


def test_the_command_names_an_unknown_set():
    code, lines = command('configs/ablation.yaml', '--sets', 'chest')
    assert code == 2 and "no set 'chest': it has phantom, nih128" in lines[0]


@pytest.fixture()
def sets(tmp_path):
    "Two simulated studies of one set"
    for v in ('full', 'same'): example_study(tmp_path/f's_{v}', arms=('none',), seeds=(42, 43), n_patients=300)
    return tmp_path


def test_the_same_models_differ_by_nothing(sets):
    t = ablation_table(*ablation_outputs(sets, 's', ['same']), n_boot=100)
    assert t.change['same'] == 0 and t.low['same'] == t.high['same'] == 0 and t.verdict['same'] == 'equivalent' and t.change['no_flip'] != 0


def test_an_unfinished_variant_is_not_compared(sets):
    (sets/'s_same'/'none'/'seed43'/'fold1'/'done.json').unlink()
    with pytest.raises(DataError, match='not finished .*seed43/fold1'): ablation_outputs(sets, 's', ['same'])


def test_training_noise_is_no_effect():
    "Two trainings of one recipe: without several seeds there is no verdict, with them the noise of training counts"
    y, z, patients = simulate(400, [.3, .2, .1], 1.5, seed=3)
    noisy = lambda seed: np.stack([z + np.random.default_rng([seed, s]).normal(size=z.shape) for s in range(3)])
    out = Outputs(y, noisy(0), patients, patients % 2, list('ABC'), dict(again=noisy(1)))
    t, one = ablation_table(out, n_boot=300), ablation_table(Outputs(y, out.logits[:1], patients, out.folds, out.labels, dict(again=out.arms['again'][:1])), n_boot=300)
    assert t.se['again'] > (t.high['again'] - t.low['again'])/3.92*.99 and t.verdict['again'] in ('equivalent', 'undecided')
    assert one.verdict['again'] == '' and np.isnan(one.p['again']) and np.isfinite(one.low['again'])


def test_three_seeds_are_judged_by_students_t_and_one_convention_stands_in_a_table():
    y, z, patients = simulate(300, [.3, .2, .1], 1.5, seed=3)
    def runs(seed): return np.stack([z + np.random.default_rng([seed, s]).normal(size=z.shape) for s in range(3)])
    out = Outputs(y, runs(0), patients, patients % 2, list('ABC'), dict(again=runs(1), better=runs(2) + 2 * y))
    own, holm_ = (ablation_table(out, n_boot=200, adjusted=how) for how in ('none', 'holm'))
    assert own.p['again'] == pytest.approx(2 * student.sf(abs(own.change['again']) / own.se['again'], own.df['again'])) and own.df['again'] < 300
    assert 'p_holm' not in own and (own.adjusted.drop('full') == 'not adjusted').all()
    assert holm_.p_holm.min() == pytest.approx(2 * own.p.min()) and (holm_.adjusted.drop('full') == 'Holm, over the comparisons').all()
    assert own.verdict['better'] == holm_.verdict['better'] == 'better'
    with pytest.raises(DataError, match='no adjustment'): ablation_table(out, adjusted='bonferroni')


def test_a_variant_with_a_graph_shows_its_own_change(tmp_path):
    example_study(tmp_path/'s_full', arms=('none',), n_patients=300)
    example_study(tmp_path/'s_graph', arms=('prox',), n_patients=300)
    out, _ = ablation_outputs(tmp_path, 's', ['graph'])
    t, study = ablation_table(out, n_boot=20), read_study(tmp_path/'s_graph').frequent(30)
    def macro(kind):
        p, y, fold = study.probs('prox', study.grid('prox'), kind)[0], study.targets(study.folds), study.films(study.folds).fold
        return np.mean([macro_auc(y[fold == k], p[fold == k]).macro for k in study.folds])
    assert t.own_change['graph'] == pytest.approx(macro('tta') - macro('before'), abs=1e-9)
    assert t.layer['graph'] in ('layer acts', 'layer inactive') and np.isnan(t.own_change['no_flip']) and t.layer['no_flip'] == ''


def test_folds_of_no_variant_are_refused(sets):
    out, _ = ablation_outputs(sets, 's', ['same'])
    with pytest.raises(DataError, match='which is no variant'): ablation_table(out, dict(typo=out.folds), n_boot=10)
