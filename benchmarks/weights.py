"""Gigabytes a second at which files of weights become arrays, and the memory that takes: ours beside torch's and safetensors'.

    python benchmarks/weights.py [--megabytes=400] [--rounds=3] [--folder=DIR]

Each way of loading has processes of its own, on one core, that take turns. The files are in the page cache. A load ends when
every tensor is there: as arrays that own their memory ("numpy", "jax", "torch"), or as views of the mapped file of which one
byte a page was read ("views"). Seconds are of the processor, user and system, so that what else runs on the machine does not
count; the figures are the fastest of all loads. The memory is the highest resident size above that before the load, as a
multiple of the file. The ratio is to the reference of the same kind. Where torch is not installed its lines are left out.

Measured with --rounds=1, 400 MB a file, on one of two cores shared with other work (load 12), torch 2.13, jax 0.10.2:

                          ours jax        ours numpy      reference, owning its memory       ours views, reference's
    float32.safetensors   2.3, 1.17 ×     2.4, 1.04 ×     safetensors.torch  4.5, 2.01 ×     83 GB/s, 90
    bfloat16.safetensors  2.0, 1.09 ×     2.3, 1.02 ×     safetensors.torch  4.0, 2.01 ×     62 GB/s, 39
    float32.pth           1.9, 1.17 ×     2.3, 1.04 ×     torch.load         1.9, 1.00 ×     77 GB/s, 58
    float32.msgpack       (not measured)  1.9, 1.04 ×     flax               0.6, 2.04 ×     126 GB/s, none

in GB/s and multiples of the file; the last line and the views are of an earlier run of the same day. One run to the next differs
by a third. What remains: `np.array` of a view takes twice the time of torch's `clone`, in half the memory.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDE = 2048  # A tensor is SIDE × SIDE.
# For each file the ways to load it; the first of each kind without "ours" is the reference of that kind.
WAYS = {
    'float32.safetensors': ('ours jax', 'ours numpy', 'safetensors torch', 'ours views', 'safetensors views'),
    'bfloat16.safetensors': ('ours jax', 'ours numpy', 'safetensors torch', 'ours views', 'safetensors views'),
    'float32.pth': ('ours jax', 'ours numpy', 'torch.load torch', 'ours views', 'torch.load views'),
    'float32.msgpack': ('ours jax', 'ours numpy', 'flax numpy', 'ours views'),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--megabytes', type=int, default=400, help='of each file')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--folder', type=Path, help='of the files; temporary unless given')
    parser.add_argument('--measure', nargs=2, metavar=('FILE', 'WAY'), help='used by this program itself')
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, ways in WAYS.items():
            path = Path(folder) / name
            if write(path, options.megabytes):
                report(path, ways, options.rounds)
                path.unlink()


def write(path: Path, megabytes: int) -> bool:
    """Writes a file of random tensors; False, with a line, where its library is not installed."""
    dtype = np.dtype(ml_dtypes.bfloat16 if path.stem == 'bfloat16' else np.float32)
    count = megabytes * 10**6 // (SIDE * SIDE * dtype.itemsize)
    rng = np.random.default_rng(0)
    arrays = {f'blocks.{i}.weight': rng.standard_normal((SIDE, SIDE), np.float32).astype(dtype) for i in range(count)}
    if path.suffix == '.safetensors':
        import safetensors.numpy

        safetensors.numpy.save_file(arrays, path)
    elif path.suffix == '.msgpack':
        from flax import serialization

        path.write_bytes(serialization.msgpack_serialize(arrays))
    elif importlib.util.find_spec('torch'):
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    else:
        print(f'{path.name}: left out, torch is not installed')
        return False
    return True


def report(path: Path, ways: tuple[str, ...], rounds: int) -> None:
    """Measures every way to load one file, in turns, and prints a line for each."""
    has_torch = importlib.util.find_spec('torch') is not None
    ways = tuple(way for way in ways if has_torch or way.startswith(('ours', 'flax')))
    results = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            command = [sys.executable, __file__, '--measure', str(path), way]
            results[way].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    size = path.stat().st_size
    rates = {way: size / min(result['seconds'] for result in results[way]) / 1e9 for way in ways}
    for way in ways:
        memory = max(result['peak'] for result in results[way]) / size
        views = way.endswith('views')
        reference = next((w for w in ways if not w.startswith('ours') and w.endswith('views') == views), None)
        ratio = f'  {rates[way] / rates[reference]:5.2f} × {reference}' if reference and way != reference else ''
        print(f'{path.name:22} {way:18} {rates[way]:7.2f} GB/s  {memory:5.2f} × its size in memory{ratio}', flush=True)


def measure(path: Path, way: str) -> dict[str, float]:
    """Returns the seconds of the fastest of three loads, and the bytes by which the first raised the peak of memory."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    load = loader(path, way)
    before = status('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # Sets the peak to what is resident now.
    seconds = [timed(load)]
    peak = status('VmHWM') - before
    seconds += [timed(load) for _ in range(2)]
    return {'seconds': min(seconds), 'peak': peak}


def timed(load: Callable[[], list]) -> float:
    start = time.process_time()
    arrays = load()
    seconds = time.process_time() - start
    assert arrays
    return seconds


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    with open('/proc/self/status') as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def loader(path: Path, way: str) -> Callable[[], list]:
    """Imports what a way needs and returns the function to time: it returns the arrays, all of them held."""
    library, kind = way.split()
    if library == 'ours':
        import jax
        import jax.numpy as jnp

        from tl_jax.pretrained import msgpack_file, safetensors_file, torch_file

        jnp.zeros(1).block_until_ready()  # Starts the backend.
        reader = {'.safetensors': safetensors_file, '.pth': torch_file, '.msgpack': msgpack_file}[path.suffix]
        own = {
            # By way of a copy, as `fill` needs one to transpose and cast; `jnp.asarray` would make another.
            'jax': lambda array: jax.block_until_ready(jax.device_put(np.array(array))),
            'numpy': np.array,
            'views': touched,
        }[kind]
        return lambda: [own(tensor.array()) for tensor in reader.read(path).tensors.values()]
    if library == 'flax':
        from flax import serialization

        return lambda: list(serialization.msgpack_restore(path.read_bytes()).values())
    import torch

    torch.set_num_threads(1)
    if library == 'safetensors':
        from safetensors.torch import load_file

        return lambda: [own_torch(tensor, kind) for tensor in load_file(path).values()]
    mapped = kind == 'views'
    # Without a map torch.load returns tensors that own their memory.
    return lambda: [own_torch(tensor, kind if mapped else 'owned') for tensor in torch.load(path, mmap=mapped).values()]


def own_torch(tensor, kind: str):
    """A tensor that owns its memory, or whose every page was read."""
    import torch

    if kind == 'views':
        touched(tensor.view(torch.uint8).numpy())
    return tensor.clone() if kind == 'torch' else tensor


def touched(array: np.ndarray) -> np.ndarray:
    """The array, after one byte of each of its pages was read."""
    array.reshape(-1).view(np.uint8)[::4096].max()
    return array


if __name__ == '__main__':
    main()
