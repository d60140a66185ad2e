"""To go on with texts and to tag their words: a small GPT-2 from news to captions, the shipped encoder at names.

    python -m experiments.language_corpus runs/language                                     # once; seconds
    python launch.py --config=configs/language.py:news --workdir=runs/language/news/seed0   # the language model to start from
    python launch.py --config=configs/language.py:captions,lora --workdir=runs/language/captions,lora
    python launch.py --config=configs/language.py:names,full --workdir=runs/language/names,full
    python -m experiments.run language --workdir=runs/language                              # all of it, with the table

`news` learns the texts of AG News in windows of 128 word pieces (Radford et al. 2018, eq. 1); `captions` goes on with a tenth of
Multi30k's English captions and is judged by the perplexity of its test set of 2016; `names` finds the names of AG News in lower
case (experiments/language_corpus.py), 1,000 texts to learn from, judged by entities as seqeval counts them. The methods are those
of configs/text.py; rates are guesses, not tuned.
"""

from collections.abc import Iterator

import ml_collections

PREPARED = 'runs/language'
CAPTIONS = '../shared/data/multi30k.tar/multi30k/data/task1/raw'
TOKENIZER = dict(name='pretrained', source='shipped:text_encoder')
DECODER = dict(name='gpt2', vocabulary=8192, length=128, width=128, depth=4, heads=4, dropout=0.1)
ENCODER = dict(name='bert_tiny', vocabulary=8192, length=128, depth=4, heads=4, pool='mean', dropout=0.1)
PRETRAINED = dict(source='shipped:text_encoder', ignore=['params/backbone/mlm/.*'], fresh=['head/.*'])
WINDOWS = dict(tokenizer=TOKENIZER, length=128)
WORDS = dict(tokenizer=TOKENIZER, length=128, buckets=[64, 128], class_names=['O', 'B-NAME', 'I-NAME'])


def adamw(peak: float) -> dict:
    return dict(name='adamw', lr=dict(name='slanted_triangular', peak=peak), weight_decay=0.01)


# name -> what learns, and config.model.peft where there is one.
METHODS = {
    'scratch': ([('.*', adamw(1e-3))], None),
    'probe': ([('head/.*', adamw(1e-2))], None),
    'full': ([('.*', adamw(1e-3))], None),
    'bitfit': (dict(name='bias_only', optimizer=adamw(3e-3)), None),
    'lora': ([('(adapters|head)/.*', adamw(2e-3))], dict(name='lora', rank=8)),
}
LANGUAGE = ('scratch', 'full', 'bitfit', 'lora')  # a language model has no head to probe


def get_config(arg: str = 'names,lora') -> ml_collections.ConfigDict:
    task, _, method = arg.partition(',')
    c = ml_collections.ConfigDict()
    c.name = f'Texts, {arg}'
    if task == 'names':
        tags(c, method)
    else:
        windows(c, task, method)
    train, peft = METHODS[method or 'scratch']
    if peft:
        c.model.peft = peft
    c.stages = [dict(name=arg, epochs={'news': 4, 'captions': 8, 'names': 6}[task], train=train)]
    c.batch_size = 16
    c.clip_norm = 1.0
    c.eval_every = 100
    c.log_every = 20
    c.select_by = 'val/f1' if task == 'names' else 'val/loss'
    c.keep = 1
    return c


def windows(c: ml_collections.ConfigDict, task: str, method: str) -> None:
    c.model = dict(DECODER)
    if method not in ('', 'scratch'):
        c.model.source = f'{PREPARED}/news/seed0/model.safetensors'
    if task == 'captions':
        learnt, rest, judged = (
            f'{CAPTIONS}/train.en.gz[:10%]',
            f'{CAPTIONS}/val.en.gz',
            f'{CAPTIONS}/test_2016_flickr.en.gz',
        )
    else:
        learnt, rest, judged = (f'{PREPARED}/news.txt[{part}]' for part in (':90%', '90%:95%', '95%:'))
    specs = dict(train=learnt, eval=rest, test=judged)
    c.data = {name: dict(spec=f'packed:{spec}', **WINDOWS) for name, spec in specs.items()}
    c.objective = dict(name='causal_lm')


def tags(c: ml_collections.ConfigDict, method: str) -> None:
    c.model = dict(ENCODER) if method == 'scratch' else dict(ENCODER, **PRETRAINED)
    specs = dict(train='train.conll[:10%]', eval='train.conll[90%:]', test='test.conll')
    c.data = {name: dict(spec=f'conll:{PREPARED}/capitals.{spec}', **WORDS) for name, spec in specs.items()}
    c.objective = dict(name='token_labelling')


def sweep() -> Iterator[tuple[str, dict]]:
    yield 'news', {'seed': 0}
    for method in LANGUAGE:
        yield f'captions,{method}', {'seed': 0}
    for method in METHODS:
        yield f'names,{method}', {'seed': 0}
