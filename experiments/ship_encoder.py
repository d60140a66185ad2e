"""A run of configs/pretrain_mlm.py becomes what the project ships: weights in float16, vocabulary, card.

python -m experiments.ship_encoder runs/text_encoder          # of a run that goes on, its newest checkpoint
"""

import datetime
import json
import sys
from pathlib import Path

import numpy as np

from configs.pretrain_mlm import CORPUS, MODEL
from tl_jax import pretrained
from tl_jax.errors import UserError
from tl_jax.pretrained.sources import SHIPPED, sha256
from tl_jax.trees import unflatten
from tl_jax.workdir import read_records

NAME = 'text_encoder'
TRAINED_ON = (
    '1.5 million words of the training texts in ../shared/data/text.tar.xz and multi30k.tar, without any text of an '
    'evaluation split, part of one, or text that shares eight words in a row with one (experiments/text_corpus.py)'
)


def newest(workdir: Path) -> tuple[Path, int]:
    """The weights that a run has come to, and the step they are of."""
    summary = workdir / 'summary.json'
    if summary.is_file():
        return workdir / 'model.safetensors', json.loads(summary.read_text())['selected_step']
    steps = sorted(int(folder.name) for folder in (workdir / 'checkpoints').glob('[0-9]*'))
    if not steps:
        raise UserError(f'{workdir}: has no checkpoint yet')
    return workdir / 'checkpoints' / str(steps[-1]) / 'state', steps[-1]


def ship(workdir: Path) -> dict:
    """Writes the three files and returns the card."""
    path, step = newest(workdir)
    tensors = {
        name: np.asarray(tensor.array()).astype(np.float16)
        for name, tensor in pretrained.read(path).tensors.items()
        if name.startswith('params/')
    }
    config = json.loads((workdir / 'config.json').read_text())
    records = [r for r in read_records(workdir / 'metrics.jsonl') if r['step'] <= step]
    held_out = [{k: r[k] for k in ('step', 'val/loss', 'val/accuracy')} for r in records if 'val/accuracy' in r]
    fields = {k: v for k, v in MODEL.items() if k != 'name'}
    target = SHIPPED / f'{NAME}.safetensors'
    about = dict(model=MODEL, class_names=[], classification=False, input_dtype='int32', dtype='float32')
    pretrained.save_variables(target, unflatten(tensors), {'tl_jax': json.dumps(about)})
    vocabulary = SHIPPED / NAME / 'vocab.txt'
    vocabulary.parent.mkdir(exist_ok=True)
    vocabulary.write_bytes(Path(CORPUS, 'vocab.txt').read_bytes())
    card = dict(
        model=MODEL['name'],
        fields=fields,
        trained_on=TRAINED_ON,
        made_by=[
            'python -m experiments.text_corpus runs/text_corpus',
            'python launch.py --config=configs/pretrain_mlm.py --workdir=runs/text_encoder',
            'python -m experiments.ship_encoder runs/text_encoder',
        ],
        input='texts of up to 128 tokens of its vocab.txt, in lower case',
        licence='Apache-2.0; the texts have their own, see ../shared/DATA.md',
        sha256=sha256(target),
        bytes=target.stat().st_size + vocabulary.stat().st_size,
        parameters=int(sum(tensor.size for tensor in tensors.values())),
        step=step,
        of_steps=config['stages'][0]['steps'],
        held_out=held_out,
        seconds=max((r['seconds'] for r in records if 'seconds' in r), default=None),
        date=datetime.date.today().isoformat(),
    )
    (SHIPPED / f'{NAME}.json').write_text(json.dumps(card, indent=1) + '\n')
    return card


if __name__ == '__main__':
    try:
        print(json.dumps(ship(Path(sys.argv[1])), indent=1))
    except UserError as error:
        sys.exit(f'error: {error}')
