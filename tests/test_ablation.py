"The ablation's file, its command, and the figures of its page."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import t as student

from conftest import ROOT
from cxrlg.ablation import ablation_outputs, ablation_table, compare_ablation, read_ablation
from cxrlg.corrections import Outputs
from cxrlg.core import DataError
from cxrlg.eval import macro_auc, simulate
from cxrlg.phantom import make_phantom, with_uncertain
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


@pytest.mark.parametrize(
    'text, says',
    [
        ('sets: {}', 'variants is missing or unknown'),
        ('[1, 2]', 'mapping'),
        ('sets: {a: {base: no.yaml}}\nvariants: {}', 'there is no configuration'),
        ('sets: {}\nvariants: {}', 'has no set'),
        ('sets: {a: {base: base.yaml}}\nvariants: {no: {ema: 0}}', 'is not text'),
        ('sets: {a: {base: base.yaml}}\nvariants: {no_flip: {ema: 0}}', 'every table has'),
        ('sets: {a: {base: base.yaml}}\nvariants: {x: {arms: [none, l1]}}', 'a variant has one arm'),
        ('sets: {a: {base: base.yaml}}\nvariants: {x: {seeds: [1]}}', 'the seeds of full'),
        ('sets: {a: {base: base.yaml}}\nvariants: {x: {locked: 0.1}}', 'give it to the set'),
        ('sets: {a: {base: 3}}\nvariants: {}', 'is to have base'),
        ('sets: {a: {base: base.yaml}}\nvariants: {x: {epoch: 1}}', "did you mean 'epochs'"),
        ('sets: {a: {base: base.yaml}}\nvariants: {x: {epochs: 0}}', 'a, x: epochs=0'),
        ('sets: {', 'not valid YAML'),
    ],
)
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
    t, one = ablation_table(out, n_boot=300), ablation_table(
        Outputs(y, out.logits[:1], patients, out.folds, out.labels, dict(again=out.arms['again'][:1])), n_boot=300
    )
    assert t.se['again'] > (t.high['again'] - t.low['again'])/3.92*.99 and t.verdict['again'] in ('equivalent', 'undecided')
    assert one.verdict['again'] == '' and np.isnan(one.p['again']) and np.isfinite(one.low['again'])


def test_three_seeds_are_judged_by_students_t_and_one_convention_stands_in_a_table():
    y, z, patients = simulate(300, [.3, .2, .1], 1.5, seed=3)
    def runs(seed): return np.stack([z + np.random.default_rng([seed, s]).normal(size=z.shape) for s in range(3)])
    out = Outputs(y, runs(0), patients, patients % 2, list('ABC'), dict(again=runs(1), better=runs(2) + 2 * y))
    own, holm_ = (ablation_table(out, n_boot=200, adjusted=how) for how in ('none', 'holm'))
    assert (
        own.p['again'] == pytest.approx(2 * student.sf(abs(own.change['again']) / own.se['again'], own.df['again']))
        and own.df['again'] < 300
    )
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


POLICIES = ['ignore', 'zeros', 'soft'] # `ones` differs from `zeros` in a value only
HEDGED = dict(data_args={'n_patients': 60, 'uncertain_share': .3}, size=32, n_splits=2, arch='test_resnet', epochs=1, bs=8, threads=1)


def policies(folder, named, **more):
    "A study's configuration that names several policies"
    (folder/'hedged.yaml').write_text(yaml.safe_dump(HEDGED | dict(uncertain=named) | more))
    return folder/'hedged.yaml'


def test_a_list_of_policies_is_an_ablation_with_the_first_as_reference(tmp_path):
    found = read_ablation(policies(tmp_path, ['zeros', 'ignore', 'soft']), out_dir='runs')['hedged']
    assert {v: (c['uncertain'], c.get('definite', False)) for v, c in found.items()} == dict(
        full=('zeros', True), ignore=('ignore', False), soft=('soft', False)
    )
    assert [c['study'] for c in found.values()] == ['hedged_full', 'hedged_ignore', 'hedged_soft']
    (tmp_path/'base.yaml').write_text('epochs: 1')
    (tmp_path/'sets.yaml').write_text('sets: {a: {base: base.yaml}}\nvariants: {bce: {loss: bce}, uncertain: [zeros]}')
    sets = read_ablation(tmp_path/'sets.yaml')['a']
    assert {v: c.get('definite', False) for v, c in sets.items()} == dict(full=False, bce=False, zeros=True)


@pytest.mark.parametrize('named, says', [
    (['ignore'], 'name two policies or more'),
    (['zeros', 'zeros'], 'each once'),
    (['ignore', 'one'], "uncertain='one': use ignore, zeros, ones, soft"),
    (['ignore', {'Edema': 'ones'}], 'a plain name without slashes'),
])
def test_policies_that_cannot_be_compared_are_refused_in_one_line(tmp_path, named, says):
    code, lines = command(policies(tmp_path, named), '--out_dir', tmp_path/'runs')
    assert code == 2 and len(lines) == 1 and says in lines[0], lines
    assert not (tmp_path/'runs').exists()


def test_policies_share_folds_and_are_judged_on_the_definite_labels(tmp_path):
    path = policies(tmp_path, POLICIES)
    run = subprocess.run(
        [Path(sys.executable).parent/'cxrlg_ablation', path, '--out_dir', tmp_path/'runs'], cwd=ROOT, capture_output=True, text=True
    )
    out, names = tmp_path/'runs', ['full', *POLICIES[1:]]
    assert run.returncode == 0 and 'hedged.csv' in run.stdout and all(v in run.stdout for v in names), run.stderr
    t = compare_ablation(path, out, n_boot=50, min_pos=3)['hedged']
    assert len({(out/f'hedged_{v}'/'folds.csv').read_bytes() for v in names}) == 1
    truth = make_phantom(n_patients=60, size=16)[0]
    hedged = with_uncertain(truth, .3)
    for v in names:
        study = read_study(out/f'hedged_{v}')
        films, y, p = study.films((0, 1)), study.targets((0, 1)), study.probs('none', ((42,), (0, 1)))[0]
        want = hedged[study.labels].mask(hedged[study.labels] == -1).iloc[films['row']].reset_index(drop=True)
        assert np.array_equal(y.to_numpy(), want.to_numpy(), equal_nan=True)
        use = [j for j, l in enumerate(y) if min((y[l] == 1).sum(), (y[l] == 0).sum()) >= 3]
        by_hand = [macro_auc(y[films.fold == k].iloc[:, use], p[films.fold == k][:, use]).macro for k in (0, 1)]
        assert t.auc[v] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert t.change['soft'] == pytest.approx(t.auc['soft'] - t.auc['full']) and t.low['soft'] <= t.change['soft'] <= t.high['soft']
    assert pd.read_csv(out/'hedged.csv', index_col=0).auc.tolist() == pytest.approx(t.auc.tolist())


def test_a_mapping_by_finding_has_no_other_policy_to_compare_with(tmp_path):
    (tmp_path/'base.yaml').write_text('epochs: 1')
    (tmp_path/'sets.yaml').write_text('sets: {a: {base: base.yaml}}\nvariants: {own: {uncertain: {Edema: ones}}}')
    says = 'a, own: uncertain is a mapping by finding, which has no other policy'
    with pytest.raises(DataError, match=says): read_ablation(tmp_path/'sets.yaml')


@pytest.mark.parametrize('name, says', [('phantom_separate', 'findings of their own'), ('nih128_separate', 'findings of their own')])
def test_networks_with_findings_of_their_own_have_no_table(tmp_path, capsys, name, says):
    assert compare_ablation(ROOT/'configs'/f'{name}.yaml', tmp_path) == {}
    assert says in capsys.readouterr().out


def test_a_set_of_some_folds_has_no_table(tmp_path, capsys):
    (tmp_path/'base.yaml').write_text('{study: base, data: phantom, n_splits: 3, folds: [0], arms: [none]}')
    (tmp_path/'some.yaml').write_text('{sets: {part: {base: base.yaml, parameters: {}}}, variants: {no_ema: {ema: 0}}}')
    assert compare_ablation(tmp_path/'some.yaml', tmp_path) == {}
    assert 'not every fold' in capsys.readouterr().out
