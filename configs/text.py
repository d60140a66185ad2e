"""The shipped text encoder at seven tasks, by every plain way to adapt it.

    python launch.py --config=configs/text.py:trec,lora --workdir=runs/text/trec,lora
    python launch.py --config=configs/text.py --workdir=runs/text --mode=sweep       # all of them, one table

The encoder (configs/pretrain_mlm.py: 1.9 million parameters, 1.5 million words) meets SST-2 (film reviews, phrases to train
on), MR (the same, sentences), SUBJ (is it opinion?), TREC (what does a question ask for?), CoLA (is it a sentence? by
Matthews' correlation, `mcc`) and two of pairs: MRPC (do both say the same?) and RTE (does the second follow?). A tenth of the
training texts, or the set's own validation file, chooses the checkpoint; SST-2, CoLA and RTE are judged on GLUE's development
set, whose test labels are not public, MR and SUBJ on a fifth held out by the copy at hand, TREC and MRPC on their test sets;
which parts of their texts the encoder has seen, its card says. `scratch` has the same network and words without what it
learnt. The rates are guesses, not tuned; `adapters` leaves the norms frozen, which Houlsby et al. train. Reads
../shared/data/text.tar.xz.
"""

from collections.abc import Iterator

import ml_collections

ARCHIVE = '../shared/data/text.tar.xz'
SENTEVAL = f'{ARCHIVE}/senteval_cr_mr_mpqa_subj_sst2'
GLUE = f'{ARCHIVE}/glue_cola_rte_wnli/data'
QUESTIONS = f'{ARCHIVE}/trec/data/TREC'

MODEL = dict(name='bert_tiny', vocabulary=8192, length=128, depth=4, heads=4, pool='mean', dropout=0.1)
PRETRAINED = dict(source='shipped:text_encoder', ignore=['params/backbone/mlm/.*'], fresh=['head/.*'])
TEXT = dict(tokenizer=dict(name='pretrained', source='shipped:text_encoder'), length=64, buckets=[16, 32, 64])


def review(spec: str) -> dict:
    return dict(spec=f'tsv:{SENTEVAL}/{spec}', columns=['label', 'text'], text='text', **TEXT)


def phrase(name: str) -> dict:
    return dict(spec=f'tsv:{ARCHIVE}/sst2_agnews/data/SST-2/{name}.tsv', text='sentence', **TEXT)


def judgement(name: str) -> dict:
    columns = ['source', 'label', 'mark', 'text']
    return dict(spec=f'tsv:{GLUE}/CoLA/{name}.tsv', columns=columns, text='text', **TEXT)


def question(name: str, **options) -> dict:
    # `city What county is Modesto in ?	LOC`: the finer class stands ahead of the question.
    pattern = r'\S+ (?P<text>.*\S)\s*\t(?P<label>\w+)'
    kinds = ['ABBR', 'DESC', 'ENTY', 'HUM', 'LOC', 'NUM']
    return dict(spec=f'tsv:{QUESTIONS}/{name}', pattern=pattern, text='text', class_names=kinds, **TEXT, **options)


# The encoder learnt from single texts, a sentence of a pair as one: what tells the second of a pair is new to it.
PAIR = dict(TEXT, length=128, buckets=[32, 64, 128])


def paraphrase(spec: str) -> dict:
    columns = dict(text=['#1 String', '#2 String'], label='Quality')
    return dict(spec=f'tsv:{ARCHIVE}/mrpc/msr_paraphrase_{spec}', **columns, **PAIR)


def entailment(name: str) -> dict:
    text, kinds = ['sentence1', 'sentence2'], ['entailment', 'not_entailment']
    # The validation file has no first line with the columns' names.
    columns = dict(columns=['index', *text, 'label']) if name == 'val' else {}
    return dict(spec=f'tsv:{GLUE}/RTE/{name}.tsv', text=text, class_names=kinds, **columns, **PAIR)


# Many questions stand twice in these files, and ten of the test set's among them.
ONCE = dict(unique=True, without=f'{QUESTIONS}/test.txt')
# name -> the data, epochs, and what chooses the checkpoint.
TASKS = {
    'sst2': (dict(train=phrase('train'), eval=phrase('dev'), test=phrase('test')), 1, 'accuracy'),
    'mr': (
        dict(train=review('MR/train.tsv[:90%]'), eval=review('MR/train.tsv[90%:]'), test=review('MR/dev.tsv')),
        4,
        'accuracy',
    ),
    'subj': (
        dict(train=review('SUBJ/train.tsv[:90%]'), eval=review('SUBJ/train.tsv[90%:]'), test=review('SUBJ/dev.tsv')),
        3,
        'accuracy',
    ),
    'trec': (
        dict(
            train=question('{train,dev}.txt[:90%]', **ONCE),
            eval=question('{train,dev}.txt[90%:]', **ONCE),
            test=question('test.txt'),
        ),
        8,
        'accuracy',
    ),
    'cola': (dict(train=judgement('train'), eval=judgement('val'), test=judgement('dev')), 5, 'mcc'),
    'mrpc': (
        dict(train=paraphrase('train.txt[:90%]'), eval=paraphrase('train.txt[90%:]'), test=paraphrase('test.txt')),
        4,
        'accuracy',
    ),
    'rte': (
        dict(train=entailment('train'), eval=entailment('val'), test=entailment('dev')),
        4,
        'accuracy',
    ),
}


def adamw(peak: float) -> dict:
    return dict(name='adamw', lr=dict(name='slanted_triangular', peak=peak), weight_decay=0.01)


def adapter(peak: float) -> list:
    return [('adapters/.*', adamw(peak)), ('head/.*', adamw(peak))]


# name -> what learns, and config.model.peft where there is one.
METHODS = {
    'scratch': ([('.*', adamw(1e-3))], None),
    'probe': ([('head/.*', adamw(1e-2))], None),
    'full': ([('.*', adamw(5e-4))], None),
    # Howard & Ruder 2018, arXiv:1801.06146, as in ELECTRA (Clark et al. 2020): each layer at 0.8 times the rate of the next.
    'llrd': (dict(name='layerwise_decay', optimizer=adamw(7e-4), decay=0.8), None),
    'bitfit': (dict(name='bias_only', optimizer=adamw(3e-3)), None),
    'lora': (adapter(2e-3), dict(name='lora', rank=8)),
    'adapters': (adapter(2e-3), dict(name='houlsby', width=16)),
    'prefix': (adapter(5e-3), dict(name='prefix', tokens=8)),
}


def get_config(arg: str = 'sst2,lora') -> ml_collections.ConfigDict:
    task, method = arg.split(',')
    data, epochs, metric = TASKS[task]
    train, peft = METHODS[method]
    c = ml_collections.ConfigDict()
    c.name = f'Text encoder → {task}, {method}'
    c.model = MODEL if method == 'scratch' else dict(MODEL, **PRETRAINED)
    if peft:
        c.model.peft = peft
    c.data = data
    c.batch_size = 32
    c.stages = [dict(name=method, epochs=epochs, train=train)]
    c.clip_norm = 1.0
    c.eval_every = 200
    c.log_every = 50
    c.select_by = f'val/{metric}'
    c.keep = 1
    return c


def sweep() -> Iterator[tuple[str, dict]]:
    for task in TASKS:
        for method in METHODS:
            yield f'{task},{method}', {'seed': 0}
