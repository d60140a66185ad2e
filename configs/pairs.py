"""Two towers: images and the names of what they show, sentences and their translations.

    python launch.py --config=configs/pairs.py:multi30k --workdir=runs/multi30k

    mnist      digits and their names, both towers from scratch (CLIP's loss; examples of one digit belong together)
    lit        the same with the shipped network, frozen: the text tower is fitted to its features (LiT, arXiv:2111.07991)
    omniglot   characters and the names of their 38 alphabets; tested on other drawings of the same characters
    multi30k   English captions and their German translations (Elliott et al. 2016, arXiv:1605.00459), 29,000 pairs; bags of
               hashed words and parts of words in place of a network that reads word order

Reads ../shared/data. Figures: `to_text_recall@1` and `from_text_recall@1` (for multi30k English to German and back among the
1,000 sentences of test_2016_flickr; chance 0.1 %) and `zero_shot_accuracy` (chance 10 %, for omniglot 2.6 %).
What was measured: experiments/results/pairs/table.md.
"""

from collections.abc import Iterator

import ml_collections

DATA = '../shared/data'
DIGITS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
TEMPLATES = ['{}', 'the digit {}', 'a handwritten {}']
ARGS = ('mnist', 'lit', 'omniglot', 'multi30k')


def get_config(arg: str = 'mnist') -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = f'Two towers, {arg}'
    c.log_every = 50
    {'mnist': mnist, 'lit': lit, 'omniglot': omniglot, 'multi30k': multi30k}[arg](c)
    return c


def mnist(c: ml_collections.ConfigDict) -> None:
    c.model = dict(name='convnet', widths=[16, 32, 64], num_classes=64)
    c.data = _images(
        f'pairs:npz:{DATA}/mnist.npz', ['train[5000:]', 'train[:5000]', 'test'], captions=DIGITS, templates=TEMPLATES
    )
    c.objective = dict(name='contrastive', positives='class', text=_bytes(64))
    c.batch_size = 256
    c.stages = [dict(name='both', epochs=1, train=[('.*', _adam(2e-3))])]


def lit(c: ml_collections.ConfigDict) -> None:
    mnist(c)
    c.model = dict(c.model, num_classes=0, source='shipped:mnist_convnet', ignore=['params/head/.*'])
    c.objective.text.num_classes = 576
    c.stages = [dict(name='text', steps=200, train=[('text/.*|temperature/.*', _adam(2e-3))])]


def omniglot(c: ml_collections.ConfigDict) -> None:
    # The split of the few-shot papers is by alphabet; here every alphabet has to be known, and the drawings are new.
    c.model = dict(name='convnet', widths=[32, 64, 64], norm='batch', num_classes=64)
    parts = ['trainval[:80%]', 'trainval[80%:90%]', 'trainval[90%:]']
    c.data = _images(f'pairs:omniglot:{DATA}', parts, class_pattern='([^/]*)/.*rot000')
    c.objective = dict(name='contrastive', positives='class', text=_bytes(64))
    c.batch_size = 256
    c.stages = [dict(name='both', epochs=6, train=[('.*', _adam(2e-3))])]


def multi30k(c: ml_collections.ConfigDict) -> None:
    tokenizer = dict(name='hashed', vocabulary=16384, ngrams=[3, 4])
    part = lambda split: dict(
        spec=f'bitext:{DATA}/multi30k.tar/multi30k/data/task1/raw/{split}.{{en,de}}.gz', tokenizer=tokenizer, length=128
    )
    tower = dict(name='text_bag', vocabulary=16384, width=128, dense=[], num_classes=128)
    c.model = tower
    c.data = dict(train=part('train'), eval=part('val'), test=part('test_2016_flickr'))
    c.objective = dict(name='contrastive', text=tower)
    c.batch_size = 256
    c.eval_batch_size = 500
    c.stages = [dict(name='both', epochs=10, train=[('.*', _adam(2e-3))])]


def sweep() -> Iterator[tuple[str, dict]]:
    for arg in ARGS:
        yield arg, {}


def _images(root: str, parts: list[str], **options) -> dict:
    train, held_out, test = (dict(spec=f'{root}/{part}', tokenizer='bytes', length=32, **options) for part in parts)
    return dict(train=train, eval=held_out, test=test, train_transform=['to_float'], eval_transform=['to_float'])


def _bytes(dim: int) -> dict:
    return dict(name='text_transformer', vocabulary=257, length=32, width=32, depth=1, mlp_width=64, num_classes=dim)


def _adam(peak: float) -> dict:
    return dict(name='adam', lr=dict(name='cosine', peak=peak))
