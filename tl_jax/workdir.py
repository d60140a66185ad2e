"""A run is a directory: its config, its metrics line by line, its summary. Everything shown later is made from these."""

import datetime
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tl_jax.errors import UserError
from tl_jax.objectives import inputs_of

METRICS = 'metrics.jsonl'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + '\n')


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file; is its folder a finished run of tl_jax?') from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: is not valid JSON ({error}); restore it or start again in another workdir') from None


def holds_run(workdir: Path, config: Mapping[str, Any]) -> bool:
    """Whether the directory belongs to a run of this config; False where it is new.

    Raises:
      UserError: it holds a run of another config, or files that are no run's.
    """
    stored = workdir / 'config.json'
    if stored.exists():
        there, here = read_json(stored), json.loads(json.dumps(config))
        if there != here:
            difference = _first_difference(there, here, 'config')
            raise UserError(
                f'{workdir}: holds a run of another config ({difference}); use another --workdir or delete it'
            )
        return True
    if workdir.is_file():
        raise UserError(f'--workdir: {workdir} is a file; name a directory')
    if workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(f'--workdir: {workdir} is not empty and holds no run (no config.json); name a new directory')
    return False


def claim(workdir: Path, config: Mapping[str, Any]) -> None:
    """Makes the directory the run's by storing its config there."""
    if jax.process_index() == 0 and not (workdir / 'config.json').exists():
        write_json(workdir / 'config.json', config)


def _first_difference(stored: Any, given: Any, path: str) -> str:
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in sorted(stored.keys() | given.keys()):
            if stored.get(name) != given.get(name):
                return _first_difference(stored.get(name), given.get(name), f'{path}.{name}')
    if isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for i, (a, b) in enumerate(zip(stored, given, strict=True)):
            if a != b:
                return _first_difference(a, b, f'{path}[{i}]')
    return f'{path} is {json.dumps(stored)} there and {json.dumps(given)} here'


class MetricsLog:
    """Appends records to `metrics.jsonl` and TensorBoard events; process 0 alone writes.

    On resume it forgets what was recorded after the restored step, so that the file reads as if nothing had happened.
    `records` are those of the file, and grow with it.
    """

    def __init__(self, workdir: Path, records: list[dict[str, Any]], *, resume_step: int):
        self.path = workdir / METRICS
        self.records = records
        self.records[:] = [r for r in records if r['step'] <= resume_step]
        self._events = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            write_atomically(self.path, ''.join(json.dumps(r) + '\n' for r in self.records))
            self._file = self.path.open('a')
            self._events = SummaryWriter(
                str(workdir), purge_step=resume_step + 1 if resume_step else None, flush_secs=30
            )

    def write(self, step: int, stage: int, values: Mapping[str, float]) -> None:
        record = {'step': step, 'stage': stage, **values}
        self.records.append(record)
        if self._events is not None:
            self._file.write(json.dumps(record) + '\n')
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._events is not None:
            self._file.close()
            self._events.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a metrics file; a last line cut short by a kill is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def environment() -> dict[str, Any]:
    """Says what a result was computed with: packages, device, commit, command, date."""
    device = jax.devices()[0]
    return {
        'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'device': f'{jax.device_count()} × {device.device_kind} ({platform.machine()}, {os.cpu_count()} cores)',
        'versions': {'python': platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}},
        'commit': commit(),
        'command': ' '.join(sys.argv),
    }


def commit() -> str | None:
    """The commit of this code, `-dirty` where files other than results differ from it; None outside a repository."""
    root = Path(__file__).resolve().parent.parent
    run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False)
    name = run(['git', 'rev-parse', '--short', 'HEAD']).stdout.strip()
    changed = run(['git', 'status', '--porcelain', '--untracked-files=no', '--', '.', ':!experiments/results'])
    return f'{name}-dirty' if name and changed.stdout.strip() else name or None


def model_card(
    experiment: Any, objective: Any, model: Mapping[str, Any], base: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What `model.safetensors` says of itself: all that prediction needs besides the weights.

    Args:
      experiment: of the run.
      objective: of its last stage.
      model: its section, without where weights came from.
      base: which weights complete the file; None where it is whole.
    """
    config, batch, data = experiment.config, experiment.batch, experiment.data
    stream = batch[objective.streams[0]]
    # The test split's transforms, as they are of the domain that the network is for.
    judged = next(iter([*data.test, *data.eval, *data.streams]))
    # An episode's inputs stand one axis deeper, under the prefix of its part.
    plain = {'image', 'inputs', 'tokens'} & set(stream)
    inputs = inputs_of(stream) if plain else inputs_of(stream, 'support_')[0]
    inputs = inputs['tokens'] if isinstance(inputs, Mapping) else inputs
    return {
        'image_shape': str(inputs.shape[1:]),
        'tl_jax': json.dumps(
            {
                'model': model,
                'class_names': list(data.class_names),
                'classification': objective.figures is None,
                'input_shape': inputs.shape[1:],
                'input_dtype': str(inputs.dtype),
                'eval_transform': data.eval_transforms[judged],
                'dtype': config['dtype'],
                **({'base': base} if base else {}),
            }
        ),
    }


def save_predictions(path: Path, predictions: Any, class_names: Any, source: Any, *, worst: int = 12) -> None:
    """Stores predictions and the images of the most confident mistakes, so that the report needs no data source."""
    wrong = np.flatnonzero(predictions.probabilities.argmax(1) != predictions.label)
    wrong = wrong[np.argsort(-predictions.probabilities[wrong].max(1), kind='stable')][:worst]
    columns = {k: v for k, v in predictions._asdict().items() if v is not None}
    images = [_thumbnail(source.get(int(predictions.index[i]))) for i in wrong]
    if images and all(image is not None for image in images):
        height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
        columns['worst_images'] = np.stack([_centred(image, height, width) for image in images])
        columns['worst_index'] = predictions.index[wrong]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.stem}.{os.getpid()}.partial.npz')
    np.savez_compressed(partial, class_names=np.asarray(class_names, dtype=str), **columns)
    os.replace(partial, path)


def _thumbnail(example: Mapping[str, Any], size: int = 96) -> np.ndarray | None:
    image = example.get('image')
    if image is None or image.dtype != np.uint8:
        return None
    stride = max(1, -(-max(image.shape[:2]) // size))
    return image[::stride, ::stride] if image.shape[-1] == 3 else np.repeat(image[::stride, ::stride, :1], 3, -1)


def _centred(image: np.ndarray, height: int, width: int) -> np.ndarray:
    canvas = np.full((height, width, image.shape[-1]), 255, np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
