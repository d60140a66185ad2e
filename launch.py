"""The one command: trains, evaluates, predicts, compares variants, exports; here, on SLURM or on a TPU pod.

python launch.py --config=configs/quickstart.py:probe --workdir=runs/probe
python launch.py --config=configs/quickstart.py --workdir=runs/quickstart --mode=sweep
python launch.py --config=configs/finetune.py:probe --workdir=runs/fitted --mode=probe
python launch.py --workdir=runs/probe --mode=predict --files='photos/*.jpg' --output=predictions.csv
python launch.py --workdir=runs/probe --mode=export --origin=torchvision --output=adapted.safetensors
python launch.py --workdir=runs/soup --mode=merge --method=greedy_soup --files='runs/full/seed*'
"""

import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax
from absl import logging

from tl_jax import jobs
from tl_jax.errors import UserError, nearest
from tl_jax.mesh import start_processes
from tl_jax.train import Preempted

FLAGS = {
    'config': 'FILE.py[:arg]; without it, the config stored in --workdir',
    'workdir': 'directory of the run',
    'mode': 'train (default), probe, eval, predict, sweep, export, merge, lr_range',
    'files': 'predict: images, or a pattern in quotes; merge: finished runs, likewise',
    'method': 'merge: greedy_soup, uniform_soup, wise_ft, task_arithmetic, ties, dare; with fields ties(density=0.2)',
    'start': 'merge: the run that the others began from',
    'output': 'predict: the csv, <workdir>/predictions.csv unless given; export: the .safetensors file, or a folder',
    'origin': 'export: whose names to write: torchvision, timm, transformers, …; peft for adapters alone',
    'merge': 'export: merge the adapters into the network; --merge=restored where that was held in few bits',
    'trials': 'sweep: of a search over the config file’s space(), 20 unless given',
    'workers': 'sweep: how many trials run at once',
    'range': 'lr_range: its ends, 1e-7,10 unless given',
    'dry_run': 'say what would be trained, and stop',
}
# What one mode alone, or two, have a use for.
MODES = {
    'files': ('predict', 'merge'),
    'method': ('merge',),
    'start': ('merge',),
    'output': ('predict', 'export'),
    'origin': ('export',),
    'merge': ('export',),
    'trials': ('sweep',),
    'workers': ('sweep',),
    'range': ('lr_range',),
    'dry_run': ('train',),
}


def parse(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the flags, and the assignments of `--config.field=value`."""
    flags, assignments = {}, []
    for argument in arguments:
        name, equals, value = argument.removeprefix('--').partition('=')
        if argument.startswith('--config.'):
            assignments.append(argument.removeprefix('--config.'))
        elif not argument.startswith('--') or name not in FLAGS:
            raise UserError(f'{argument}: unknown flag; {nearest(name, FLAGS)} or --config.FIELD=VALUE')
        else:
            flags[name] = value if equals else 'true'
    return flags, assignments


def keep_compilations() -> None:
    """Keeps compiled programs between runs: a resumed or repeated run starts at once."""
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
        jax.config.update('jax_compilation_cache_dir', os.path.join(cache, 'tl_jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def main(arguments: list[str]) -> None:
    if not arguments or '--help' in arguments:
        print(__doc__ + '\n' + '\n'.join(f'  --{name:8} {meaning}' for name, meaning in FLAGS.items()))
        return
    flags, assignments = parse(arguments)
    mode = flags.get('mode', 'train')
    if mode not in jobs.JOBS:
        raise UserError(f"--mode: unknown mode '{mode}'; {nearest(mode, jobs.JOBS)}")
    useless = next((name for name in flags if mode not in MODES.get(name, (mode,))), None)
    if useless:
        raise UserError(f'--{useless}: --mode={mode} has no use for it, --mode={" or ".join(MODES[useless])} has')
    start_processes()
    keep_compilations()
    jobs.JOBS[mode](flags, assignments)


if __name__ == '__main__':
    logging.set_verbosity(logging.WARNING)
    try:
        main(sys.argv[1:])
    except Preempted as saved:
        print(saved)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
