"The ablation's file, its command, and the figures of its page."
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT
from cxrlg.ablation import read_ablation
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
    ('sets: {a: {base: base.yaml}}\nvariants: {x: {epoch: 1}}', "did you mean 'epochs'"), ('sets: {a: {base: base.yaml}}\nvariants: {x: {epochs: 0}}', 'a, x: epochs=0'), ('sets: {', 'not valid YAML')])
def test_the_command_refuses_a_wrong_file_in_one_line(tmp_path, text, says):
    (tmp_path/'base.yaml').write_text('epochs: 1')
    (tmp_path/'ablation.yaml').write_text(text)
    code, lines = command(tmp_path/'ablation.yaml', '--out_dir', tmp_path/'runs')
    assert code == 2 and len(lines) == 1 and lines[0].startswith('cxrlg_ablation: ') and says in lines[0], lines
    assert not (tmp_path/'runs').exists()


def test_the_command_names_an_unknown_set():
    code, lines = command('configs/ablation.yaml', '--sets', 'chest')
    assert code == 2 and "no set 'chest': it has phantom, nih128" in lines[0]
