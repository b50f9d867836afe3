"""`make lock-check`: pip's dry run of requirements.lock for Linux x86-64 and macOS arm64, Python 3.11, 3.12 and 3.13.
Needs a package index.

pip reads environment markers for the interpreter it runs on, whatever `--platform` says, so the markers are evaluated here first."""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.markers import Marker

LOCK = Path(__file__).resolve().parents[1] / 'requirements.lock'
PLATFORMS = {
    'Linux x86-64': (
        [f'manylinux_2_{v}_x86_64' for v in range(28, 4, -1)]
        + ['manylinux2014_x86_64', 'manylinux2010_x86_64', 'manylinux1_x86_64'],
        dict(sys_platform='linux', platform_system='Linux', platform_machine='x86_64', os_name='posix'),
    ),
    'macOS arm64': (
        [f'macosx_{v}_0_arm64' for v in (15, 14, 13, 12, 11)] + ['macosx_11_0_universal2', 'macosx_10_9_universal2'],
        dict(sys_platform='darwin', platform_system='Darwin', platform_machine='arm64', os_name='posix'),
    ),
}


def lines_for(environment):
    "Requirements whose marker holds, without markers and comments"
    for line in LOCK.read_text().splitlines():
        requirement, _, marker = re.sub(r'\s+#.*', '', line).partition(';')
        if requirement.strip() and not line.startswith('#') and (not marker or Marker(marker).evaluate(environment)):
            yield requirement.strip()


def check(name, python):
    "pip's verdict on one platform and one Python"
    tags, env = PLATFORMS[name]
    wanted = sorted(
        lines_for(
            env
            | dict(
                python_version=python,
                python_full_version=f'{python}.9',
                implementation_name='cpython',
                platform_python_implementation='CPython',
            )
        )
    )
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp)/'lock.txt').write_text('\n'.join(wanted))
        args = [
            sys.executable,
            '-m',
            'pip',
            'install',
            '-q',
            '--dry-run',
            '--ignore-installed',
            '--ignore-requires-python',
            *(['--no-deps'] if env['sys_platform'] == 'darwin' else []),
            '--only-binary=:all:',
            '--target',
            f'{tmp}/x',
            '--python-version',
            f'{python}.9',
            '--implementation',
            'cp',
            *(a for t in tags for a in ('--platform', t)),
            '-r',
            f'{tmp}/lock.txt',
        ]
        run = subprocess.run(args, capture_output=True, text=True)
    errors = [l for l in run.stderr.splitlines() if l.startswith('ERROR') and 'Ignored' not in l]
    print(
        f'{name}, Python {python}: {len(wanted)} packages, '
        + ('every one has a wheel' if run.returncode == 0 else '; '.join(errors)),
        flush=True,
    )
    return run.returncode


if __name__ == '__main__': sys.exit(max(check(name, python) for name in PLATFORMS for python in ('3.11', '3.12', '3.13')))
